# SPDX-License-Identifier: Apache-2.0
"""The fraction of zeros from which each system is faster than cuBLAS: geometric mean speed-ups over zeros, by N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (8, 16, 32, 64)
ZEROS = tuple(style.ZEROS)
SPARSE = ("flashllm", "tca-bme", "sparta", "sparta-cusparselt", "sputnik", "cusparse")
DENSE = ("mma-2:4", "cusparselt-2:4", "torch-fp8", "torch-int4", "cublas-notc")
"""Systems whose time does not depend on the zeros of the case: 2:4 has half zeros, the others none; fp8 and int4 have
fewer bits."""

CAPTION = (
    "fp16, random zeros, CUDA graphs, L2 cold, all systems beside each other in one sweep; geometric mean over the"
    " shapes of OPT, each over the best of cuBLAS there. Dotted: systems that do not use unstructured zeros (2:4 has"
    " its own half of them, fp8 and int4 are dense matrices of fewer bits: another trade of accuracy)."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One GPU and N: the means of each system by fraction of zeros, or the single mean of a dense system."""

    gpu: str
    commits: tuple[str, ...]
    n: int
    sparse: Mapping[str, Mapping[float, float]]
    dense: Mapping[str, float]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    return tuple(_panel(one, n) for one in rows.compared(root) for n in BATCHES)


def _panel(one: Compared, n: int) -> Panel:
    def mean(system: str, zeros: float | None) -> float | None:
        cases = one.systems.get(system, {})
        here = [row.speedup for case, row in cases.items() if n == case.N and zeros in (None, case.zeros)]
        return geometric_mean(here) if here else None

    sparse = {name: {z: value for z in ZEROS if (value := mean(name, z)) is not None} for name in SPARSE}
    dense = {name: value for name in DENSE if (value := mean(name, None)) is not None}
    return Panel(gpu=one.gpu, commits=one.commits, n=n, sparse=sparse, dense=dense)


def crossover(means: Mapping[float, float]) -> float | None:
    """The fraction of zeros at which the speed-up passes 1, interpolated linearly in its logarithm between two means.

    ``None`` where all are on one side.
    """
    ordered = sorted(means.items())
    for (zeros, below), (more, above) in pairwise(ordered):
        if below < 1 <= above:
            return zeros + (more - zeros) * log(1 / below) / log(above / below)
    return None


def _crossover_text(means: Mapping[float, float]) -> str:
    found = crossover(means)
    if found is not None:
        return f"{found:.0%}"
    if not means:
        return ""
    return f"below {min(means):.0%}" if min(means.items())[1] >= 1 else f"above {max(means):.0%}"


def table(data: tuple[Panel, ...]) -> str:
    """Means and crossovers."""
    out = [CAPTION]
    for panel in data:
        out += ["", f"{panel.gpu}, commit {', '.join(panel.commits)}, N = {panel.n}", ""]
        out += [f"| system | {' | '.join(f'{z:.0%}' for z in ZEROS)} | faster from |", "|" + "---|" * (len(ZEROS) + 2)]
        for name, means in panel.sparse.items():
            if means:
                texts = [f"{means[z]:.2f}" if z in means else "" for z in ZEROS]
                out.append(f"| {name} | {' | '.join(texts)} | {_crossover_text(means)} |")
        for name, value in panel.dense.items():
            out.append(f"| {name} | {' | '.join([f'{value:.2f}'] * len(ZEROS))} | |")
    return "\n".join(out)


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure: a row for each GPU, a column for each N."""
    figure = style.draw_panels(
        data,
        _draw,
        height=3.3,
        title="y = x Wᵀ, from how many zeros on it pays",
        caption=CAPTION,
        labels=("zeros", "speed-up over cuBLAS"),
        systems=(*SPARSE, *DENSE),
        dotted=DENSE,
        legend_columns=6,
    )
    return {"crossover-systems": figure}


def _draw(axes: Axes, panel: Panel) -> None:
    axes.axhline(1, color=style.INK, linewidth=0.9)
    for name, means in panel.sparse.items():
        _, color, marker = style.SYSTEMS[name]
        width = 1.8 if name == "flashllm" else 1.1
        axes.plot(list(means), list(means.values()), color=color, marker=marker, markersize=4, linewidth=width)
    for name, value in panel.dense.items():
        _, color, marker = style.SYSTEMS[name]
        ends = (ZEROS[0], ZEROS[-1])
        axes.plot(ends, (value, value), color=color, marker=marker, markersize=4, linewidth=0.9, linestyle=":")
    axes.set_yscale("log")
    marks: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1, 2, 4)
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.yaxis.minorticks_off()
    axes.set_xticks(ZEROS, [f"{zeros:.0%}" for zeros in ZEROS])


ENTRY = Entry(name="crossover", load=load, plot=plot, table=table, sweeps=(measure.SYSTEMS,))
