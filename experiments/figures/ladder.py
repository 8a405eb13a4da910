# SPDX-License-Identifier: Apache-2.0
"""The ladder: from the published Flash-LLM kernel through the steps of our development logs to the rows of today.

Every format has a column, every N a row. Points of a column are the steps that a kernel kept, from its log; the last is
its newest row of ``flashllm bench``, with cuBLAS and the DRAM floor of the same run. Steps are separate runs, so
columns cannot be compared with each other step by step. For each N and fraction of zeros, the variant of a step that
counts is the one with the least geometric mean over the shapes in the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Case, Final, Logged, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHAPES = ((28672, 7168), (7168, 7168))
BATCHES = (8, 16, 32)
ZEROS = (0.5, 0.7, 0.8, 0.9)
ORIGINAL = "flash-llm-original"

CAPTION = (
    "NVIDIA H100 80GB, fp16, random zeros. Hatched: the published Flash-LLM kernel as we measured it, plain launches, "
    "L2 cold, beside cuBLAS of that run."
    " Circles: steps of our development logs, each a run of its own; compare within a log only."
    " Discs: newest committed rows, CUDA graphs, L2 cold, with their factor over cuBLAS of the same run."
    " Dashed: bytes of the product over the read bandwidth measured in that run."
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a log that its kernel kept."""

    step: str
    """As the log calls it."""
    label: str
    only: str = "*"
    """Pattern of the variants that are this step, where the log has others."""
    without: str | None = None
    """One of them that is the previous kernel, or an idea that was given up."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a column is made of."""

    name: str
    title: str
    log: str
    steps: tuple[Step, ...]


FORMATS = (
    Format(
        name="tiled-csl",
        title="Tiled-CSL",
        log="tiled_csl_h100",
        steps=(
            Step(step="sweep", label="before 7", only="dbb7990"),
            Step(step="8 pieces loaded together, prefetch within the run", label="8 pieces together"),
            Step(step="9 arrivals at the end of the run", label="9 arrivals at the end", without="and wgmma"),
            Step(step="10 ends of rows weighed", label="10 row ends weighed"),
            Step(step="sweep", label="after 11", only="be0fc1a"),
        ),
    ),
    Format(
        name="bitmap",
        title="bitmap",
        log="bitmap_h100",
        steps=(
            Step(step="1 a ring for each warp", label="1 a ring for each warp"),
            Step(step="2 loads of x and masks first; two tiles a step", label="2 x and masks first", only="t1*"),
            Step(step="4 wgmma, a mask word at a time", label="4 wgmma from N = 32 on", only="wg r96*"),
            Step(step="9 wgmma, a k16 step at a time", label="9 one ring for a block"),
            Step(step="10 rows asked for at first", label="10 first rows first", without="base"),
            Step(step="the kernel after step 18", label="14 a warp feeds", only="after"),
            Step(step="19 the feeder computes once for the warp", label="19 uniform feeder"),
            Step(step="21 runs", label="21 runs"),
        ),
    ),
    Format(
        name="slot24",
        title="slot24",
        log="slot24_h100",
        steps=(
            Step(step="1 the feeder turns x too, 64 columns at a time", label="1 a feeder for all"),
            Step(step="2 whole windows asked for at once, loads before stores", label="2 whole windows"),
            Step(step="3 every warp for itself", label="3 no feeder"),
            Step(step="4 a feeder for all but x", label="4 a feeder but for x"),
            Step(
                step="5 one copying instruction for all value rows, windows stored in one place",
                label="5 one copy instruction",
            ),
            Step(step="6 the feeder computes once for the warp", label="6 uniform feeder"),
            Step(step="7 the other warps too", label="7 uniform warps"),
            Step(step="8 runs", label="8 runs"),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """The times of one format."""

    title: str
    steps: tuple[tuple[str, Mapping[Case, Logged]], ...]
    """Label and times of each step."""
    final: Mapping[Case, Final]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Everything that is drawn."""

    original: Mapping[Case, Measured]
    columns: tuple[Column, ...]


def load(root: Path) -> Ladder:
    """Load from the folder ``experiments``. Raises ``FormatError``, ``OSError``, ``KeyError`` for a step that is not in
    its log.
    """
    columns = []
    newest = rows.newest_of_all(root)
    for form in FORMATS:
        by_step = defaultdict(list)
        for entry in rows.log(root, form.log):
            by_step[entry.step].append(entry)
        missing = {step.step for step in form.steps} - by_step.keys()
        if missing:
            raise KeyError(f"{form.log}: no step {min(missing)!r}")
        steps = tuple((step.label, fastest(step, by_step[step.step])) for step in form.steps)
        columns.append(Column(title=form.title, steps=steps, final=newest.get((rows.H100, form.name), {})))
    return Ladder(original=rows.reference(root, "h100_originals", ORIGINAL), columns=tuple(columns))


def fastest(step: Step, entries: Iterable[Logged]) -> dict[Case, Logged]:
    """The times of a step: for each N and fraction of zeros, those of one variant.

    Only variants that were measured on the most shapes count; of these, the one with the least geometric mean, and of
    equals the first in the log.
    """
    groups: dict[tuple[int, float], dict[str, dict[tuple[int, int], Logged]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        if fnmatchcase(entry.variant, step.only) and entry.variant != step.without:
            case = entry.case
            groups[case.N, case.zeros][entry.variant][case.M, case.K] = entry
    chosen = {}
    for variants in groups.values():
        most = max(len(shapes) for shapes in variants.values())
        complete = [shapes for shapes in variants.values() if len(shapes) == most]
        best = min(complete, key=lambda shapes: sum(log(entry.us) for entry in shapes.values()))
        chosen.update({entry.case: entry for entry in best.values()})
    return chosen


def table(data: Ladder) -> str:
    """Every number of the figures, a table for each shape and N."""
    out = [CAPTION]
    for M, K in SHAPES:
        for n in BATCHES:
            cases = [Case(M, K, n, zeros) for zeros in ZEROS]
            out += ["", f"{M}x{K}, N = {n}, us", "", "| kernel | step | 50 % | 70 % | 80 % | 90 % |", "|" + "---|" * 6]
            out.append(_line("Flash-LLM, published", "", [_beside_cublas(data.original.get(case)) for case in cases]))
            for column in data.columns:
                for label, times in column.steps:
                    found = [times.get(case) for case in cases]
                    out.append(_line(column.title, label, [f"{t.us:.1f}" if t else "" for t in found]))
                final = [column.final.get(case) for case in cases]
                commits = sorted({row.commit for row in final if row})
                out.append(_line(column.title, f"rows, {', '.join(commits)}", [_beside_cublas(row) for row in final]))
                floors = [f"{row.floor_us:.1f}" if row else "" for row in final]
                out.append(_line(column.title, "DRAM floor", floors))
    return "\n".join(out)


def _line(kernel: str, step: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join((kernel, step, *cells))} |"


def _beside_cublas(time: Measured | None) -> str:
    return f"{time.us:.1f} ({time.speedup:.2f} x, cuBLAS {time.cublas_us:.1f})" if time else ""


def plot(data: Ladder) -> dict[str, Figure]:
    """A figure for each shape."""
    return {f"ladder-{M}x{K}": _plot_shape(data, M, K) for M, K in SHAPES}


def _plot_shape(data: Ladder, M: int, K: int) -> Figure:
    from matplotlib.figure import Figure

    top = 1.08 * max(_heights(data, M, K))
    widths = [3.4, *(len(column.steps) + 2.6 for column in data.columns)]
    figure = Figure(figsize=(11, 9))
    grid = figure.subplots(
        len(BATCHES),
        len(widths),
        sharey=True,
        gridspec_kw={
            "width_ratios": widths,
            "left": 0.06, "right": 0.99, "top": 0.875, "bottom": 0.19, "wspace": 0.06, "hspace": 0.1,
        },
    )  # fmt: skip
    for n, row in zip(BATCHES, grid, strict=True):
        _draw_original(row[0], data.original, (M, K, n))
        for axes, column in zip(row[1:], data.columns, strict=True):
            _draw_column(axes, column, (M, K, n), top=top)
        row[0].set_ylabel(f"N = {n}, µs")
    for axes in grid.flat:
        axes.set_ylim(0, top)
        axes.label_outer()
    for axes, title in zip(grid[0], ("Flash-LLM,\npublished", *(c.title for c in data.columns)), strict=True):
        axes.set_title(title)
    figure.suptitle(f"y = x Wᵀ, W {M} × {K}, time of one product", x=0.06, y=0.985, ha="left", fontsize=11)
    _add_legend(figure)
    style.add_caption(figure, CAPTION, x=0.06, y=0.012, width=178)
    return figure


def _heights(data: Ladder, M: int, K: int) -> list[float]:
    """Every time that the figure of a shape shows."""
    times = [time for column in data.columns for _, step in column.steps for time in step.items()]
    beside = [time for found in (data.original, *(column.final for column in data.columns)) for time in found.items()]
    return [
        height
        for case, heights in (
            *((case, (time.us,)) for case, time in times),
            *((case, (time.us, time.cublas_us)) for case, time in beside),
        )
        if case[:2] == (M, K) and case.N in BATCHES and case.zeros in ZEROS
        for height in heights
    ]


def _draw_original(axes: Axes, times: Mapping[Case, Measured], product: tuple[int, int, int]) -> None:
    found = [times.get(Case(*product, zeros)) for zeros in ZEROS]
    drawn = [(zeros, time) for zeros, time in zip(ZEROS, found, strict=True) if time]
    for x, (zeros, time) in enumerate(drawn):
        axes.bar(x, time.us, width=0.68, edgecolor=style.ZEROS[zeros], **style.OTHERS)
        factor = axes.annotate(f"{time.speedup:.2f}×", (x, time.us), xytext=(0, 2.5), textcoords="offset points")
        factor.set(ha="center", va="bottom", fontsize=7, color=style.INK)
        factor.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    if drawn:
        axes.axhline(drawn[0][1].cublas_us, color=style.QUIET, linewidth=1)
    axes.set_xticks(range(len(drawn)), [f"{zeros:.0%}" for zeros, _ in drawn])
    axes.set_xlim(-0.7, len(drawn) - 0.3)


def _draw_column(axes: Axes, column: Column, product: tuple[int, int, int], *, top: float) -> None:
    last = len(column.steps)
    axes.axvspan(last - 0.5, last + 1.7, color="#f4f4f4", linewidth=0, zorder=0)
    factors = []
    for zeros in ZEROS:
        case, color = Case(*product, zeros), style.ZEROS[zeros]
        points = [(x, times[case].us) for x, (_, times) in enumerate(column.steps) if case in times]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, marker="o", markersize=4, mfc="white")
        final = column.final.get(case)
        if final is None:
            continue
        axes.plot((-0.6, last + 0.25), (final.floor_us, final.floor_us), color=color, zorder=1, **style.FLOOR)
        axes.axhline(final.cublas_us, color=style.QUIET, linewidth=1, zorder=1)
        if points:
            ends = [points[-1], (last, final.us)]
            axes.plot(*zip(*ends, strict=True), color=color, linewidth=1, linestyle=":")
        axes.plot(last, final.us, color=color, marker="o", markersize=6, linestyle="none")
        factors.append((f"{final.speedup:.2f}×", final.us, color))
    style.label_right(axes, last + 0.35, factors, gap=top * 0.05)
    axes.set_xticks(range(last + 1), [*(label for label, _ in column.steps), "committed rows"])
    axes.tick_params(axis="x", rotation=40)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set_xlim(-0.6, last + 1.7)


def _add_legend(figure: Figure) -> None:
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=style.ZEROS[zeros], label=f"{zeros:.0%} zeros") for zeros in ZEROS]
    handles += [
        Patch(edgecolor=style.INK, label="published kernel, measured by us", **style.OTHERS),
        Line2D([], [], color=style.INK, marker="o", markersize=4, mfc="white", label="step of a log"),
        Line2D([], [], color=style.INK, marker="o", markersize=6, linestyle=":", label="committed rows, × over cuBLAS"),
        Line2D([], [], color=style.INK, label="DRAM floor", **style.FLOOR),
        Line2D([], [], color=style.QUIET, linewidth=1, label="cuBLAS, same run"),
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.055, 0.968), ncols=5, fontsize=7.5)


ENTRY = Entry(name="ladder", load=load, plot=plot, table=table)
