# SPDX-License-Identifier: Apache-2.0
"""The floor: the time of each kernel against the time of its bytes, for every format, shape and fraction of zeros.

A roofline with time instead of throughput, in units of cuBLAS's time in the same run, so that shapes coincide: to the
right, the bytes of the product over the read bandwidth that the run measured; upwards, the time. On the diagonal,
memory alone decides; where formats and zeros lie side by side at one height, something else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Case, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (8, 32, 64)
ZEROS = tuple(style.ZEROS)
FORMATS: Mapping[str, str] = {"tiled-csl": "s", "bitmap": "o", "slot24": "^"}
"""Marker of a format."""

CAPTION = (
    "fp16, random zeros, CUDA graphs, L2 cold; newest rows of every format and shape, cuBLAS and bandwidth of"
    " the same run. Diagonal: the time of the bytes. Grey: cuBLAS."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One GPU: the rows that are drawn, by format."""

    gpu: str
    formats: Mapping[str, Mapping[Case, Final]]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    panels = []
    newest = rows.newest_of_all(root)
    for gpu in rows.in_order(gpu for gpu, name in newest if name in FORMATS):
        drawn = {
            name: {
                case: row
                for case, row in sorted(newest.get((gpu, name), {}).items())
                if case.N in BATCHES and case.zeros in ZEROS
            }
            for name in FORMATS
        }
        panels.append(Panel(gpu=gpu, formats=drawn))
    return tuple(panels)


def table(data: tuple[Panel, ...]) -> str:
    """Geometric means of the points of each format, N and fraction of zeros."""
    out = [CAPTION]
    for panel in data:
        head = "| format | N | zeros | shapes | bytes / cuBLAS | time / cuBLAS | time / bytes |"
        out += ["", panel.gpu, "", head, "|" + "---|" * 7]
        for name, cases in panel.formats.items():
            for n in BATCHES:
                for zeros in ZEROS:
                    here = [row for case, row in cases.items() if (case.N, case.zeros) == (n, zeros)]
                    if here:
                        floor = geometric_mean([row.floor_us / row.cublas_us for row in here])
                        time = geometric_mean([row.us / row.cublas_us for row in here])
                        means = f"{floor:.3f} | {time:.3f} | {time / floor:.2f}"
                        out.append(f"| {name} | {n} | {zeros:.0%} | {len(here)} | {means} |")
    return "\n".join(out)


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure: a row for each GPU, a column for each N."""
    from matplotlib.figure import Figure

    height = 2.5 * len(data) + 1.6
    figure = Figure(figsize=(9.5, height))
    grid = figure.subplots(len(data), len(BATCHES), sharex=True, sharey=True, squeeze=False)
    top = 1.04 * max(
        row.us / row.cublas_us for panel in data for cases in panel.formats.values() for row in cases.values()
    )
    for line, panel in zip(grid, data, strict=True):
        for axes, n in zip(line, BATCHES, strict=True):
            _draw(axes, panel, n, top)
        line[0].set_ylabel(f"{panel.gpu}\ntime / cuBLAS")
    for axes, n in zip(grid[0], BATCHES, strict=True):
        axes.set_title(f"N = {n}")
    for axes in grid[-1]:
        axes.set_xlabel("time of the bytes / cuBLAS")
    figure.subplots_adjust(left=0.09, right=0.985, top=1 - 1 / height, bottom=0.8 / height, wspace=0.06, hspace=0.08)
    figure.suptitle("y = x Wᵀ, how far from what its bytes take", x=0.09, y=1 - 0.1 / height, ha="left", fontsize=11)
    _add_legend(figure, 1 - 0.26 / height)
    style.add_caption(figure, CAPTION, x=0.09, y=0.1 / height, width=160)
    return {"floor-formats": figure}


def _draw(axes: Axes, panel: Panel, n: int, top: float) -> None:
    axes.plot((0, top), (0, top), color=style.INK, linewidth=0.9)
    axes.axhline(1, color=style.QUIET, linewidth=1)
    for name, marker in FORMATS.items():
        for zeros, color in style.ZEROS.items():
            here = [row for case, row in panel.formats[name].items() if (case.N, case.zeros) == (n, zeros)]
            x, y = [row.floor_us / row.cublas_us for row in here], [row.us / row.cublas_us for row in here]
            axes.plot(x, y, marker=marker, color=color, markersize=3.6, mfc="none", linestyle="none")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, top)
    axes.grid(visible=True, axis="both")


def _add_legend(figure: Figure, y: float) -> None:
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=style.ZEROS[zeros], label=f"{zeros:.0%} zeros") for zeros in ZEROS]
    handles += [
        Line2D([], [], color=style.INK, marker=marker, mfc="none", linestyle="none", markersize=4.5, label=name)
        for name, marker in FORMATS.items()
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.08, y), ncols=8, fontsize=7.5)


ENTRY = Entry(name="floor", load=load, plot=plot, table=table, sweeps=measure.FORMATS)
