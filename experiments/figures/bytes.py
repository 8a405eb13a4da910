# SPDX-License-Identifier: Apache-2.0
"""Bytes per weight against time, with a point per system and fraction of zeros: a roofline in units of cuBLAS.

A system on the line is as fast as its bytes allow; how far left it lies shows what its format is worth, and how far
above the line it lies shows what its decoding costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, NamedTuple

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (8, 32, 64)

CAPTION = (
    "fp16, random zeros, CUDA graphs, L2 cold, all systems beside each other in one sweep; geometric means over the"
    " shapes of OPT. To the right: bytes of W, x and y for each element of W; upwards: time over that of the best of"
    " cuBLAS. Line: those bytes at the read bandwidth of the run. Numbers: per cent of zeros; fp8 and int4 are dense"
    " matrices of fewer bits."
)


class Point(NamedTuple):
    """Means over the shapes of one system and fraction of zeros."""

    zeros: float
    bytes_per_element: float
    time: float
    """Time over cuBLAS's."""
    floor: float
    """Time that the bytes take, over cuBLAS's time."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One GPU and N."""

    gpu: str
    commits: tuple[str, ...]
    n: int
    systems: Mapping[str, tuple[Point, ...]]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    return tuple(_panel(one, n) for one in rows.compared(root) for n in BATCHES)


def _panel(one: Compared, n: int) -> Panel:
    systems = {}
    for name in style.SYSTEMS:
        cases = {case: row for case, row in one.systems.get(name, {}).items() if n == case.N}
        points = []
        # A dense system does not use the zeros: all its rows are one point.
        dense = name.startswith("cublas")
        for zeros in sorted({None if dense else case.zeros for case in cases}, key=lambda value: value or 0):
            if zeros is not None and zeros not in (*style.ZEROS, 0.0):
                continue
            here = {case: row for case, row in cases.items() if zeros in (None, case.zeros)}
            points.append(
                Point(
                    zeros=zeros or 0.0,
                    bytes_per_element=geometric_mean([row.bytes / (case.M * case.K) for case, row in here.items()]),
                    time=geometric_mean([row.us / row.cublas_us for row in here.values()]),
                    floor=geometric_mean([row.floor_us / row.cublas_us for row in here.values()]),
                )
            )
        if points:
            systems[name] = tuple(points)
    return Panel(gpu=one.gpu, commits=one.commits, n=n, systems=systems)


def table(data: tuple[Panel, ...]) -> str:
    """The points."""
    out = [CAPTION]
    for panel in data:
        out += ["", f"{panel.gpu}, commit {', '.join(panel.commits)}, N = {panel.n}", ""]
        out += ["| system | zeros | bytes per element | time / cuBLAS | time / bytes |", "|" + "---|" * 5]
        for name, points in panel.systems.items():
            for p in points:
                numbers = f"{p.bytes_per_element:.3f} | {p.time:.3f} | {p.time / p.floor:.2f}"
                out.append(f"| {name} | {p.zeros:.0%} | {numbers} |")
    return "\n".join(out)


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure: a row for each GPU, a column for each N."""
    figure = style.draw_panels(
        data,
        _draw,
        height=3.6,
        title="y = x Wᵀ, bytes against time",
        caption=CAPTION,
        labels=("bytes per element of W", "time / cuBLAS"),
        systems=tuple(style.SYSTEMS),
        legend_columns=6,
    )
    return {"bytes-systems": figure}


def _draw(axes: Axes, panel: Panel) -> None:
    every = [point for points in panel.systems.values() for point in points]
    slope = geometric_mean([point.floor / point.bytes_per_element for point in every])
    ends = (0.3, 3.3)
    axes.plot(ends, [slope * end for end in ends], color=style.INK, linewidth=0.9)
    axes.axhline(1, color=style.QUIET, linewidth=0.8)
    for name, points in panel.systems.items():
        _, color, marker = style.SYSTEMS[name]
        x, y = [point.bytes_per_element for point in points], [point.time for point in points]
        axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=0.9)
        if name == "flashllm":
            for point in points:
                axes.annotate(
                    f"{100 * point.zeros:g}", (point.bytes_per_element, point.time), (-3, 5),
                    textcoords="offset points", fontsize=6, color=color, ha="right",
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks((0.3, 0.5, 1, 2, 3), ("0.3", "0.5", "1", "2", "3"))
    axes.set_yticks((0.2, 0.5, 1, 2, 5, 10, 20), ("0.2", "0.5", "1", "2", "5", "10", "20"))
    axes.minorticks_off()
    axes.grid(visible=True, axis="both")


ENTRY = Entry(name="bytes", load=load, plot=plot, table=table, sweeps=(measure.SYSTEMS,))
