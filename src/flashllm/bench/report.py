# SPDX-License-Identifier: Apache-2.0
"""Turns rows into tables for people: on the terminal, and as markdown for a README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashllm.bench import roofline
from flashllm.bench.results import Row, latest
from flashllm.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import RenderableType

OURS = "flashllm"


@dataclass(frozen=True, kw_only=True)
class Means:
    """Speed-ups over cuBLAS of all cases of one format at one sparsity and N (``None``: at all N).

    ``format`` is ``"auto"`` for cases that each took the format chosen for them.
    """

    format: str
    sparsity: float | None
    n: int | None
    geometric: float
    lowest: float
    highest: float
    cases: int


def speedup_means(rows: Iterable[Row]) -> list[Means]:
    """Geometric mean, lowest and highest speed-up of right results: per format, sparsity and N, and per format and
    sparsity.
    """
    found: dict[tuple[str, float | None, int | None], list[float]] = {}
    for row in rows:
        if row.system == OURS and row.speedup and row.check == "pass":
            for n in (row.N, None):
                found.setdefault((label_of(row), row.sparsity, n), []).append(row.speedup)
    place = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in found))}
    ordered = sorted(found.items(), key=lambda item: (place[item[0][0]], item[0][1] or 0.0, item[0][2] or math.inf))
    return [
        Means(
            format=name,
            sparsity=sparsity,
            n=n,
            geometric=math.exp(math.fsum(map(math.log, values)) / len(values)),
            lowest=min(values),
            highest=max(values),
            cases=len(values),
        )
        for (name, sparsity, n), values in ordered
    ]


def title_of(row: Row) -> str:
    """Model and layer, or nothing."""
    return " ".join(part for part in (row.model, row.layer) if part)


def weight_of(row: Row) -> str:
    """Model, layer and shape, as far as the row has them."""
    return f"{title_of(row)} {row.M}x{row.K}".lstrip()


def label_of(row: Row) -> str:
    """The name of a mean over rows like this one: their format, or ``"auto"`` where it was chosen for each."""
    return "auto" if row.choice.endswith("-format") else row.format


def several_formats(rows: Iterable[Row]) -> bool:
    """Whether our rows have more than one format, named or chosen, so that a table must tell them apart."""
    return len({name for row in rows if row.system.startswith(OURS) for name in {row.format, label_of(row)}}) > 1


def several_means(rows: Iterable[Row]) -> bool:
    """Whether our rows give separate means for several formats."""
    return len({label_of(row) for row in rows if row.system.startswith(OURS)}) > 1


def _system(row: Row, *, several: bool) -> str:
    """The system as a table names it; with ``several`` formats, ours with its format."""
    name = f"{row.system} {row.format}" if several and row.system.startswith(OURS) else row.system
    if row.system in (OURS, f"{OURS}-pdl"):  # the rows hold the kernel instance, the same for both
        return name
    # An ablation is identified by the idea that was left out, with which its kernel's name begins.
    return f"{name} " + (row.kernel.partition(":")[0] if row.system == f"{OURS}-ablation" else row.kernel)


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def sparsity_of(row: Row) -> str:
    """The requested fraction of zeros; for a file, the actual one."""
    return f"{row.sparsity_real if row.sparsity is None else row.sparsity:.3g}"


def timing_table(rows: Sequence[Row]) -> list[RenderableType]:
    """Measured rows of a GPU run and, below, the means of the speed-ups."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="x[N,K] @ W[M,K]^T", title_justify="left")
    several = several_formats(rows)
    for heading in ("weights", "system"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "N",
        "zeros",
        "us",
        "TFLOP\n/s*",
        "GB/s",
        "% of\nroof-\nline",
        "speed-\nup",
        "error/\nbound",
        "",
    ):
        table.add_column(heading, justify="right")
    previous: tuple[object, ...] = ()
    for row in rows:
        case = (row.model, row.layer, row.M, row.K, row.N)
        if previous and case != previous:
            table.add_section()
        percent = None if row.roofline_fraction is None else 100 * row.roofline_fraction
        table.add_row(
            escape(weight_of(row)) if case != previous else "",
            escape(_system(row, several=several)),
            str(row.N),
            "dense" if row.format == "dense" else sparsity_of(row),
            _fixed(row.median_us, 2),
            _fixed(row.tflops, 1),
            _fixed(row.gbps, 0),
            _fixed(percent, 1),
            _fixed(row.speedup, 2) if row.system != "cublas" else "1",
            _fixed(row.max_err_over_bound, 3),
            "ok" if row.check == "pass" else "[red]WRONG[/]",
        )
        previous = case
    means = speedup_means(rows)
    parts: list[RenderableType] = [table, "* counted as if W were dense"]
    if means:
        summary = Table(title="speed-up over cuBLAS", title_justify="left")
        separate = several_means(rows)
        if separate:
            summary.add_column("format")
        for heading in ("zeros", "N", "geometric mean", "lowest", "highest", "cases"):
            summary.add_column(heading, justify="right")
        for index, mean in enumerate(means):
            before = means[index - 1]
            if index and (mean.format, mean.sparsity) != (before.format, before.sparsity):
                summary.add_section()
            summary.add_row(
                *([mean.format] if separate else []),
                "file" if mean.sparsity is None else f"{mean.sparsity:g}",
                "all" if mean.n is None else str(mean.n),
                f"{mean.geometric:.3f}",
                f"{mean.lowest:.3f}",
                f"{mean.highest:.3f}",
                str(mean.cases),
            )
        parts.append(summary)
    return parts


def model_table(rows: Sequence[Row], gpu: roofline.Gpu) -> list[RenderableType]:
    """Rows of a run without a GPU: bytes, the time ``gpu`` would need to move them, the check."""
    from rich.markup import escape
    from rich.table import Table

    emulated = any(row.backend == "emulator" for row in rows)
    title = "emulated, not GPU times: numerics and bytes" if emulated else "no GPU: numerics and bytes only"
    table = Table(title=title, title_justify="left")
    table.add_column("weights", overflow="fold")
    for heading in (
        "N",
        "zeros",
        "format",
        "MB",
        "% of\ndense",
        "floor\nus",
        "dense\nfloor us",
        "error/\nbound",
        "",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        weight_bytes = row.rotated_mb * 1e6 / row.copies
        dense_bytes = 2 * row.M * row.K
        floor = roofline.floor_us(row.bytes, gpu.read_gbps)
        dense_floor = roofline.floor_us(roofline.product_bytes(row.M, row.K, row.N, dense_bytes), gpu.read_gbps)
        table.add_row(
            escape(weight_of(row)),
            str(row.N),
            sparsity_of(row),
            row.format,
            f"{weight_bytes / 1e6:.2f}",
            f"{100 * weight_bytes / dense_bytes:.1f}",
            f"{floor:.2f}",
            f"{dense_floor:.2f}",
            _fixed(row.max_err_over_bound, 3),
            "ok" if row.check == "pass" else "[red]WRONG[/]",
        )
    note = (
        f"floor: modelled, not measured: all bytes moved once at {gpu.read_gbps:.0f} GB/s "
        f"({gpu.name}, {gpu.source}); no kernel is faster"
    )
    return [table, note]


def markdown(rows: Sequence[Row], *, full: bool = False, allow_dirty: bool = False) -> str:
    """Markdown of committed results: speed-up per sparsity and N (and format, where there are
    several), with ``full`` every case too.

    Of repeated measurements the last counts. Raises :class:`ArgumentError` for rows that no commit vouches
    for, that failed their check, or that must not stand in one table (several GPU models, launch or cache
    modes).
    """
    rows = latest([row for row in rows if row.kind == "kernel"])
    ours = [row for row in rows if row.system == OURS and row.speedup is not None]
    if not ours:
        raise ArgumentError("results", expected="rows of flashllm with a speed-up", got="none")
    for row in ours:
        where = f"a row of {row.M}x{row.K} N={row.N} measured {row.time_utc}"
        if row.commit is None or row.dirty is None:
            raise ArgumentError("results", expected="rows that name their commit", got=f"{where} without one")
        if row.dirty and not allow_dirty:
            raise ArgumentError("results", expected="rows of unchanged commits", got=f"{where} with local changes")
        if row.check != "pass":
            raise ArgumentError("results", expected="rows that passed their check", got=where)
    for field in ("gpu", "driver", "launch", "l2", "dtype", "pattern"):
        values = sorted({str(getattr(row, field)) for row in ours})
        if len(values) > 1:
            raise ArgumentError("results", expected=f"one {field} in a table", got=", ".join(values))
    first = ours[0]
    commits = ", ".join(sorted({str(row.commit)[:10] for row in ours}))
    dates = sorted({row.time_utc[:10] for row in ours})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    several, separate = several_formats(ours), several_means(ours)
    head, rule = ("| format ", "|---") if separate else ("", "")
    lines = [
        f"{first.gpu}, driver {first.driver}, CUDA {first.cuda}, cuBLAS {first.cublas}; {first.dtype}, "
        f"{first.pattern} zeros, L2 {first.l2}, {first.launch} launches; commit {commits}, {when}.",
        "",
        f"{head}| zeros | N | speed-up over cuBLAS (geometric mean) | lowest | highest | cases |",
        f"{rule}|---|---|---|---|---|---|",
    ]
    for mean in speedup_means(ours):
        name = "file" if mean.sparsity is None else f"{100 * mean.sparsity:g} %"
        count = "all" if mean.n is None else str(mean.n)
        cells = (name, count, f"{mean.geometric:.2f}", f"{mean.lowest:.2f}", f"{mean.highest:.2f}", str(mean.cases))
        lines.append((f"| {mean.format} " if separate else "") + f"| {' | '.join(cells)} |")
    if full:
        head, rule = ("| format ", "|---") if several else ("", "")
        lines += ["", f"{head}| weights | MxK | N | zeros | us | cuBLAS us | speed-up | % of roofline |"]
        lines += [f"{rule}|---|---|---|---|---|---|---|---|"]
        for row in ours:
            share = None if row.roofline_fraction is None else 100 * row.roofline_fraction
            start = f"| {row.format} " if several else ""
            lines.append(
                f"{start}| {title_of(row) or '-'} | {row.M}x{row.K} | {row.N} | {sparsity_of(row)} "
                f"| {_fixed(row.median_us, 1)} | {_fixed(row.cublas_us, 1)} | {_fixed(row.speedup, 2)} "
                f"| {_fixed(share, 0)} |"
            )
    return "\n".join(lines) + "\n"
