# SPDX-License-Identifier: Apache-2.0
"""Measure the kernel choices for given shapes on this GPU and remember the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashllm.cli._cases import case_options, usage_errors, use_device

if TYPE_CHECKING:
    from flashllm.bench.plan_cases import Work
    from flashllm.matmul.tune import TuneResult


@click.command()
@case_options
def command(
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    weights: Path | None,
    tensor: str | None,
    sparsity: str | None,
    n: str | None,
    dtype: str | None,
    pattern: str | None,
    formats: str | None,
    seed: int,
    device: int | None,
) -> None:
    """Measure the kernel choices for given shapes on this GPU and remember the best.

    Later plans for the same format, shape, density, N and GPU use the results, and so does the choice of the format:
    without --format, or with `auto`, every format is measured. Needs a GPU. Without options it measures the 12 weight
    shapes of OPT-30B, 66B and 175B.
    """
    with usage_errors():
        from flashllm import backends
        from flashllm.bench.plan_cases import plan_work

        use_device(device)
        backends.select("cuda")
        work = plan_work(
            backend="cuda",
            models=models,
            shapes=shapes,
            weights=weights,
            tensor=tensor,
            sparsity=sparsity,
            n=n,
            dtype=dtype,
            pattern=pattern,
            seed=seed,
            formats=formats,
            gpu=None,
        )
        _print(_tune(work))


def _tune(work: Work) -> list[tuple[str, TuneResult]]:
    from flashllm.device import memory_errors
    from flashllm.matmul.tune import tune
    from flashllm.registry import weight_class

    found: list[tuple[str, TuneResult]] = []
    with click.progressbar(work.groups, label="tuning", item_show_func=_title) as groups:
        for group in groups:
            for fraction in group.sparsities:
                with memory_errors(f"weights of {group.title}", group.dense_bytes):
                    dense = work.source.dense(group, fraction, device=True)
                packed = [weight_class(name).from_dense(dense, dtype=group.dtype) for name in group.formats]
                del dense
                for weight in packed:
                    title = f"{group.title} {100 * weight.sparsity:.1f} % {weight.format}"
                    found += [(title, result) for result in tune(weight, group.batches)]
    return found


def _title(group: Any) -> str | None:
    return None if group is None else str(group.title)


def _print(found: list[tuple[str, TuneResult]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flashllm.bench.tables import show

    if not found:
        return
    table = Table(title="fastest kernels, L2-cold", title_justify="left")
    table.add_column("weights", overflow="fold")
    for heading in ("N", "us", "untuned\nus", "tried", "blocks"):
        table.add_column(heading, justify="right")
    table.add_column("kernel", overflow="fold")
    for title, result in found:
        table.add_row(
            escape(title),
            str(result.n),
            f"{result.median_us:.2f}",
            f"{result.heuristic_us:.2f}",
            str(result.measured),
            "x".join(map(str, result.plan.grid)),
            escape(result.plan.label),
        )
    console = Console(highlight=False)
    show(console, [table], file_width=160)
    console.print(f"remembered in {found[-1][1].path}", soft_wrap=True)
