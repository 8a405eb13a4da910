# SPDX-License-Identifier: Apache-2.0
"""Where it pays: the speed-up over cuBLAS of the format ``flashllm bench`` chooses, over zeros and N, a map per GPU."""

from __future__ import annotations

from collections import Counter
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

BATCHES = (8, 16, 32, 64)
ZEROS = tuple(style.ZEROS)

CAPTION = (
    "fp16, random zeros, CUDA graphs, L2 cold; the newest rows of the format that auto takes, each over the"
    " best of cuBLAS in the same run. Large: geometric mean over the shapes; small: lowest and highest, and the formats"
    " taken."
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fraction of zeros and one N, over all shapes that were measured."""

    speedups: tuple[float, ...]
    """Speed-ups over cuBLAS, ascending."""
    formats: tuple[str, ...]
    """The formats taken, the most frequent first."""

    @property
    def mean(self) -> float:
        """Geometric mean."""
        return geometric_mean(self.speedups)


@dataclass(frozen=True, kw_only=True)
class Map:
    """One GPU."""

    gpu: str
    commits: tuple[str, ...]
    cells: Mapping[tuple[float, int], Cell]
    """By fraction of zeros and N."""


def load(root: Path) -> tuple[Map, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    found = rows.chosen(root)
    return tuple(_map(gpu, found[gpu]) for gpu in rows.in_order(found))


def _map(gpu: str, found: Mapping[Case, Final]) -> Map:
    cells = {}
    used = set()
    for zeros in ZEROS:
        for n in BATCHES:
            here = [row for case, row in found.items() if (case.zeros, case.N) == (zeros, n)]
            if here:
                taken = Counter(row.format for row in here)
                cells[zeros, n] = Cell(
                    speedups=tuple(sorted(row.speedup for row in here)),
                    formats=tuple(sorted(taken, key=lambda name: (-taken[name], name))),
                )
                used |= {row.commit for row in here}
    return Map(gpu=gpu, commits=tuple(sorted(used)), cells=cells)


def table(data: tuple[Map, ...]) -> str:
    """The numbers of the maps, a table for each GPU."""
    out = [CAPTION]
    for one in data:
        out += ["", f"{one.gpu}, commit {', '.join(one.commits)}", ""]
        out += ["| zeros | N | geometric mean | lowest | highest | shapes | formats |", "|" + "---|" * 7]
        for (zeros, n), cell in one.cells.items():
            spread = f"{cell.mean:.2f} | {cell.speedups[0]:.2f} | {cell.speedups[-1]:.2f} | {len(cell.speedups)}"
            out.append(f"| {zeros:.0%} | {n} | {spread} | {', '.join(cell.formats)} |")
    return "\n".join(out)


def plot(data: tuple[Map, ...]) -> dict[str, Figure]:
    """One figure, a panel for each GPU."""
    from matplotlib.figure import Figure

    width = 4.14 * len(data) + 0.72
    figure = Figure(figsize=(width, 4.6))
    panels = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    highest = max(1.5, *(cell.mean for one in data for cell in one.cells.values()))
    for axes, one in zip(panels, data, strict=True):
        _draw(axes, one, highest)
    panels[0].set_ylabel("zeros")
    figure.subplots_adjust(left=0.63 / width, right=0.99, top=0.84, bottom=0.2, wspace=0.06)
    figure.suptitle("y = x Wᵀ, speed-up over cuBLAS, shapes of OPT", x=0.63 / width, y=0.97, ha="left", fontsize=11)
    style.add_caption(figure, CAPTION, x=0.63 / width, y=0.02, width=75 * len(data))
    return {"speedup-auto": figure}


def _draw(axes: Axes, one: Map, highest: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    # Below 1 the hue changes: there the dense product is faster.
    colors = LinearSegmentedColormap.from_list("over cuBLAS", [style.ZEROS[0.9], "white", style.ZEROS[0.5]])
    grid = [[one.cells[z, n].mean if (z, n) in one.cells else float("nan") for n in BATCHES] for z in ZEROS]
    axes.imshow(grid, cmap=colors, norm=TwoSlopeNorm(1, 0.5, highest), aspect="auto", alpha=0.75)
    for (zeros, n), cell in one.cells.items():
        x, y = BATCHES.index(n), ZEROS.index(zeros)
        axes.text(x, y - 0.1, f"{cell.mean:.2f}×", ha="center", va="center", fontsize=11, color=style.INK)
        spread = f"{cell.speedups[0]:.2f} - {cell.speedups[-1]:.2f}\n{', '.join(cell.formats)}"
        axes.text(x, y + 0.24, spread, ha="center", va="center", fontsize=6, color=style.INK, linespacing=1.25)
    axes.set_title(f"{one.gpu}, {', '.join(one.commits)}", fontsize=8.5)
    axes.set_xticks(range(len(BATCHES)), [f"N = {n}" for n in BATCHES])
    axes.set_yticks(range(len(ZEROS)), [f"{zeros:.0%}" for zeros in ZEROS])
    axes.grid(visible=False)
    axes.tick_params(length=0)


ENTRY = Entry(name="speedup", load=load, plot=plot, table=table, sweeps=(measure.AUTO,))
