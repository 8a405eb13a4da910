# SPDX-License-Identifier: Apache-2.0
"""Check every kernel on the available backend; stops at the first wrong element."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from flashllm.cli._cases import BadUsage, backend_option, usage_errors, use_device
from flashllm.cli._progress import progress
from flashllm.registry import FORMATS

if TYPE_CHECKING:
    from rich.console import Console

    from flashllm.verify.run import Outcome


@click.command(epilog="Exit status: 0 all right, 1 something is wrong, 2 bad usage, 130 interrupted.")
@backend_option
@click.option("--quick", is_flag=True, help="The kernels that heuristics choose most, a few cases each.")
@click.option(
    "--format", "formats", metavar="NAMES", help=f"Only these formats, comma-separated, of {', '.join(FORMATS)}."
)
@click.option("--kernel", default="", metavar="TEXT", help="Only kernels whose label contains TEXT, e.g. 'kN=16,'.")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help="Emulator: kernels of this architecture; repeatable.  [default: 80 and 90a]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of operands and of emulated schedules.",
)
@click.option("--device", type=click.IntRange(0), default=None, metavar="INDEX", help="Which GPU.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per case on stdout; everything else on stderr.")
def command(
    backend: str | None,
    quick: bool,
    formats: str | None,
    kernel: str,
    archs: tuple[str, ...],
    seed: int,
    device: int | None,
    as_json: bool,
) -> None:
    """Check every kernel on the available backend; stops at the first wrong element.

    Multiplies with every kernel instance for this GPU, or on the CPU emulator for sm_80 and sm_90a, over shapes,
    numbers of columns and patterns of zeros. Small integers must give the rounded integer result exactly, random
    values must stay within the stated error bound, and NaN and infinities must act as in a dense product. Outputs are
    filled with NaN beforehand and have guards around them.
    """
    from rich.console import Console

    notes = Console(stderr=True, highlight=False)
    with usage_errors():
        from flashllm import backends
        from flashllm.bench.cases import parse_formats
        from flashllm.verify import cases as plan
        from flashllm.verify.products import multiplier

        if device is not None and backend in ("emulator", "reference"):
            raise BadUsage(f"--device: expected nothing with --backend {backend}, which uses no GPU")
        use_device(device)
        chosen = backends.select(backend)
        wanted = _archs(chosen.name, archs)
        names = None if formats is None else parse_formats(formats)
        cases = plan.build_cases(
            backend=chosen.name, archs=wanted, formats=names, quick=quick, kernel=kernel, seed=seed
        )
        made = multiplier(chosen.name)
    notes.print(_first_line(chosen.name, chosen.reason), soft_wrap=True, markup=False)

    from flashllm.verify.run import run_cases

    outcomes: list[Outcome] = []
    try:
        with progress(notes, len(cases)) as advance:
            for outcome in run_cases(cases, made, say=advance):
                outcomes.append(outcome)
                if as_json:
                    click.echo(json.dumps(_json(outcome, chosen.name)))
    finally:
        _print(outcomes, Console(stderr=as_json, highlight=False))
    if outcomes and not outcomes[-1].passed:
        notes.print(f"[red]WRONG[/] {_escaped(outcomes[-1].text)}", soft_wrap=True)
        skipped = len(cases) - len(outcomes)
        notes.print(f"{skipped:,} of {len(cases):,} cases not run", soft_wrap=True)
        sys.exit(1)


def _archs(backend: str, given: tuple[str, ...]) -> tuple[str, ...]:
    if backend == "reference":
        if given:
            raise BadUsage("--arch: expected nothing with the reference backend, which has no kernels")
        return ()
    from flashllm.jit.spec import normalize_arch
    from flashllm.verify.cases import EMULATED_ARCHS

    archs = tuple(normalize_arch(arch) for arch in given)
    if backend == "emulator":
        return archs or EMULATED_ARCHS
    from flashllm.device import device_facts

    own = str(device_facts().arch)
    if archs not in ((), (own,)):
        raise BadUsage(f"--arch: expected {own}, the GPU's (others: --backend emulator), got {', '.join(archs)}")
    return (own,)


def _first_line(backend: str, reason: str) -> str:
    if backend == "emulator":
        return f"the GPU's kernels emulated on this CPU ({reason})"
    return f"NumPy reference only, no kernels ({reason})" if backend == "reference" else reason


def _json(outcome: Outcome, backend: str) -> dict[str, Any]:
    data, wrong = outcome.case.data, outcome.wrong
    return {
        "backend": backend,
        "kernel": outcome.case.kernel,
        "arch": outcome.case.arch,
        "format": data.format,
        "encoding": data.encoding,
        "M": data.m,
        "K": data.k,
        "N": data.n,
        "dtype": data.dtype,
        "pattern": data.pattern,
        "sparsity": data.sparsity,
        "operands": data.operands,
        "seed": data.seed,
        "schedule": outcome.case.schedule,
        "check": "pass" if outcome.passed else "fail",
        "error_over_bound": _number(outcome.error_over_bound),
        "at": [wrong.n, wrong.m] if wrong else None,
        "got": _number(wrong.got) if wrong else None,
        "expected": _number(wrong.expected) if wrong else None,
        "bound": _number(wrong.bound) if wrong else None,
        "wrong_elements": wrong.wrong if wrong else 0,
        "misbehaved": outcome.misbehaved,
    }


def _number(value: float | None) -> float | str | None:
    """``value`` for JSON, which has neither NaN nor infinity: those become text."""
    return value if value is None or math.isfinite(value) else str(value)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print(outcomes: list[Outcome], console: Console) -> None:
    """One line per kernel and dtype."""
    from rich.table import Table

    from flashllm.bench.tables import show
    from flashllm.verify.cases import short_label

    if not outcomes:
        return
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome.case
        label = short_label(case.choice.spec) if case.choice else f"{case.kernel} {case.data.format}"
        groups.setdefault((f"sm_{case.arch}" if case.arch else "-", label, case.data.dtype), []).append(outcome)
    table = Table(title="y[N,M] = x[N,K] @ W[M,K]^T", title_justify="left")
    for heading in ("arch", "kernel", "shape", "N", "dtype", "pattern", "error/bound", "result"):
        table.add_column(heading, overflow="fold" if heading in ("kernel", "shape", "N", "pattern") else "ellipsis")
    everywhere = [_distinct(f"{o.case.data.m}x{o.case.data.k}" for o in found) for found in groups.values()]
    patterns = [_distinct(o.case.data.pattern_text for o in found) for found in groups.values()]
    previous_shapes = previous_patterns = ""
    for ((arch, label, dtype), found), shapes, pattern in zip(groups.items(), everywhere, patterns, strict=True):
        worst = max((o.error_over_bound for o in found if o.error_over_bound is not None), default=None)
        failed = sum(not o.passed for o in found)
        table.add_row(
            arch,
            _escaped(label),
            '"' if shapes == previous_shapes else shapes,
            _distinct(str(o.case.data.n) for o in sorted(found, key=lambda o: o.case.data.n)),
            dtype,
            '"' if pattern == previous_patterns else pattern,
            "-" if worst is None else f"{worst:.3f}",
            "[red]WRONG[/]" if failed else f"{len(found)} ok",
        )
        previous_shapes, previous_patterns = shapes, pattern
    show(console, [table], file_width=200)
    passed = sum(outcome.passed for outcome in outcomes)
    console.print(f"{passed:,} of {len(outcomes):,} cases right, {len(groups)} kernels")


def _distinct(texts: Any) -> str:
    return " ".join(dict.fromkeys(text.replace(" ", ":") for text in texts))
