# SPDX-License-Identifier: Apache-2.0
"""Show what is in a weight, how its products would run, and which format suits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.cli._cases import BadUsage, ToRead, usage_errors
from flashllm.cli._models import refuse_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashllm.inspection import Inspection, Planned, Target
    from flashllm.matmul.auto import Ranking

_WIDTH = 100
_MARK = {"measured": "*", "model and measured": "(*)", "model": ""}


@click.command(epilog="Exit status: 0 fine, 2 bad usage or an unreadable file.")
@click.argument("file", required=False, type=ToRead(path_type=Path), metavar="[FILE]")
@click.option("--tensor", metavar="NAME", help="Only this tensor of FILE; needed for one of several dense ones.")
@click.option("--shape", "shapes", multiple=True, metavar="MxK", help="Instead of FILE: shapes, comma-separated.")
@click.option("--sparsity", metavar="FRACTIONS", help="With --shape: fractions of zeros.  [default: 0.8]")
@click.option("--dtype", metavar="TYPE", help="With --shape: fp16 or bf16.  [default: fp16]")
@click.option("--n", "n", default="8,16,32", show_default=True, metavar="SIZES", help="Batch sizes N, comma-separated.")
@click.option("--gpu", metavar="NAME", help="GPU to estimate times for.  [default: the current one, else H100 80GB]")
@click.option(
    "--sample",
    is_flag=True,
    help="Decode packed weights, and pack rows of them to learn what other formats would take; otherwise that is "
    "estimated for zeros at random places. Dense matrices are always sampled.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per weight on stdout; the manifest of a directory."
)
def command(
    file: Path | None,
    tensor: str | None,
    shapes: tuple[str, ...],
    sparsity: str | None,
    dtype: str | None,
    n: str,
    gpu: str | None,
    sample: bool,
    as_json: bool,
) -> None:
    """Show what is in a weight, how its products would run, and which format suits it.

    FILE is a .safetensors file of packed weights, all of which are shown; a dense matrix (.npy, .npz of SciPy, or a
    tensor of a .safetensors file), which is packed in the best format; or a directory that `flashllm convert` wrote,
    whose layers are listed, or with --json its manifest. Times come from the model in docs/auto.md or, if marked *,
    were measured by `flashllm tune` on this GPU. Needs no GPU.
    """
    with usage_errors():
        from flashllm import inspection
        from flashllm.bench.cases import parse_batches, parse_shapes, parse_sparsities
        from flashllm.formats.bits import check_dtype

        if (file is None) == (not shapes):
            raise BadUsage("give either FILE or --shape")
        for option, given in (("--sparsity", sparsity), ("--dtype", dtype)):
            if file is not None and given is not None:
                raise BadUsage(f"{option}: expected nothing beside FILE, which has its own, got {given}")
        if file is None and (tensor is not None or sample):
            raise BadUsage("--tensor and --sample go with FILE")
        if file is not None and file.is_dir():
            refuse_options(("tensor", "n", "gpu", "sample"), "beside a directory")
            from flashllm.cli._directory import show_directory

            show_directory(file, as_json=as_json)
            return
        batches = parse_batches(n)
        target = _target(gpu)
        if file is not None:
            found = inspection.inspect_file(file, tensor, batches, target=target, sample=sample)
        else:
            kind = check_dtype(dtype or "fp16")
            found = [
                inspection.inspect_shape(shape, 1.0 - zeros, batches, target=target, dtype=kind)
                for shape in parse_shapes(shapes)
                for zeros in parse_sparsities(sparsity or "0.8")
            ]
    if as_json:
        for one in found:
            click.echo(json.dumps(inspection.as_json(one), allow_nan=False))
        return
    _print(found, target)


def _target(name: str | None) -> Target:
    from flashllm.gpus import DEFAULT_GPU, facts_of, find_gpu, gpu_of
    from flashllm.inspection import Target

    if name is None:
        from flashllm.device import device_facts, gpu_problem

        if gpu_problem() is None:
            facts = device_facts()
            return Target(gpu=gpu_of(facts), facts=facts)
    gpu = find_gpu(name or DEFAULT_GPU)
    return Target(gpu=gpu, facts=facts_of(gpu))


def _print(found: list[Inspection], target: Target) -> None:
    from rich.console import Console
    from rich.text import Text

    from flashllm.bench.tables import show

    gpu = target.gpu
    parts: list[RenderableType] = [
        Text(
            f"for {gpu.name}: {gpu.sm_count} multiprocessors, {gpu.clock_mhz:.0f} MHz, {gpu.read_gbps:.0f} GB/s "
            f"({gpu.source})"
        )
    ]
    for one in found:
        parts += ["", *map(Text, _facts(one))]
        parts.append(_ranking_table(one.ranking, None if one.weight is None else one.weight.format))
        if one.plans:
            parts.append(_plan_table(one.plans))
        parts += map(Text, _advice(one))
    marks = {candidate.source for one in found for candidate in one.ranking.candidates}
    if marks - {"model"}:
        parts.append(Text("* measured by `flashllm tune` on this GPU, (*) for some N"))
    show(Console(highlight=False), parts, file_width=_WIDTH)


def _facts(found: Inspection) -> list[str]:
    contents, w = found.contents, found.weight
    m, k = contents.shape
    density = contents.density if w is None else w.density
    name = "" if found.name == f"{m}x{k}" else f"{found.name}: "
    lines = [f"{name}{m}x{k} {contents.dtype}, {100 * (1 - density):.2f} % zeros"]
    if w is not None:
        verb = "packed here as" if found.packed_here else "packed as"
        lines.append(
            f"  {verb} {w.format}: {w.nnz:,} stored in {w.nbytes:,} bytes, "
            f"{w.bytes_per_element:.3f} per element (dense: 2)"
        )
    if found.fill is not None:
        fill = found.fill
        lines.append(f"  tiles filled {fill.least:.3f} to {fill.most:.3f}, mean {fill.mean:.3f}")
    return lines


def _ranking_table(ranking: Ranking, current: str | None) -> RenderableType:
    from rich.table import Table

    table = Table(title="formats, fastest first", title_justify="left")
    table.add_column("format")
    for heading in ("MB", "% of\ndense", *(f"us at\nN = {n}" for n in ranking.dense.us)):
        table.add_column(heading, justify="right")
    table.add_column("why", overflow="fold")
    for candidate in (*ranking.candidates, ranking.dense):
        mark = _MARK[candidate.source]
        table.add_row(
            f"[bold]{candidate.format}[/]" if candidate.format == current else candidate.format,
            f"{candidate.weight_bytes / 1e6:.2f}",
            f"{100 * candidate.weight_bytes / ranking.dense.weight_bytes:.1f}",
            *(f"{us:.1f}{mark}" for us in candidate.us.values()),
            candidate.reason,
        )
    return table


def _plan_table(plans: dict[int, Planned]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="plans", title_justify="left")
    for heading in ("N", "us", "reading", "decoding", "blocks", "workspace"):
        table.add_column(heading, justify="right")
    table.add_column("kernel, and why", overflow="fold")
    for n, planned in plans.items():
        made, likely = planned.plan, planned.expected
        times = ["-"] * 3
        if likely is not None and made.expansion is not None:
            times = [f"{likely.expand_us:.1f}", "-", "-"]
        elif likely is not None:
            times = [f"{us:.1f}" for us in (likely.kernel.us, likely.kernel.read_us, likely.kernel.decode_us)]
        table.add_row(
            str(n),
            *times,
            "x".join(map(str, made.grid)),
            f"{made.workspace_bytes:,}",
            escape(f"{made.label}\n{made.reason}"),
        )
    return table


def _advice(found: Inspection) -> list[str]:
    """Where the sizes come from, which format to take, and how much faster it is."""
    ranking, best = found.ranking, found.ranking.best
    if found.contents.packed_rows:
        lines = [f"MB of formats not packed whole: from packing {found.contents.packed_rows:,} rows"]
    else:
        lines = ["MB of formats not packed: estimated for zeros at random places, on the high side"]
    gain = ranking.dense.mean_us / best.mean_us
    over = f"{gain:.2f} times as fast as dense"
    if gain < 1:
        over = f"slower than dense, which takes {gain:.2f} of its time"
    own = next((c for c in ranking.candidates if found.weight and c.format == found.weight.format), None)
    if found.weight is None or own is best:
        lines.append(f"best, by the geometric mean over N: {best.format}, {over}")
    else:
        more = "" if own is None else f" {100 * (own.mean_us / best.mean_us - 1):.1f} % faster than {own.format} and"
        lines.append(f"better, by the geometric mean over N: {best.format},{more} {over}")
    return lines
