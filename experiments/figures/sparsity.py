# SPDX-License-Identifier: Apache-2.0
"""The sparsity figure of the Flash-LLM repository: time of every system on one shape, over zeros from 60 to 99 %.

The repository's own lines, from an A100, are in a panel of their own. It does not name the shape: its times are those
of 36864 x 9216 with N = 8 or 16, and the latter is what we measure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

M, K, N = 36864, 9216, 16
ZEROS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
SYSTEMS = ("cusparse", "sputnik", "sparta", "sparta-cusparselt", "tca-bme", "cublas", "flashllm")
_PUBLISHED = {"FlashLLM": "flashllm", "SparTA": "sparta", "Sputnik": "sputnik", "cuSPARSE": "cusparse"}

CAPTION = (
    f"W {M}x{K}, N = {N}, fp16, random zeros. Solid: measured here, CUDA graphs, L2 cold, all systems in one run, our"
    " own code or the vendor's library. Dashed: read off the figure in the Flash-LLM repository (A100, L2 warm, the"
    " authors' kernels; shape inferred): other hardware, not to be divided by ours."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Microseconds over the fraction of zeros, by system."""

    title: str
    published: bool
    lines: Mapping[str, Mapping[float, float]]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    return (*(_measured(one) for one in rows.compared(root, measure.ZEROS.what)), _published(root))


def _measured(one: Compared) -> Panel:
    lines: dict[str, dict[float, float]] = {}
    for name in SYSTEMS:
        cases = one.systems.get(name, {})
        found = {case.zeros: row.us for case, row in cases.items() if case[:3] == (M, K, N)}
        if found:
            lines[name] = {zeros: found[zeros] for zeros in sorted(found) if zeros in ZEROS}
    return Panel(title=f"{one.gpu}, commit {', '.join(one.commits)}", published=False, lines=lines)


def _published(root: Path) -> Panel:
    figures: dict[str, Any] = json.loads((root / "reference" / "published_figures.json").read_text(encoding="utf-8"))
    figure = figures["fig_sparsity_sweep_ms"]
    zeros = [percent / 100 for percent in figure["sparsity"]]
    lines = {
        ours: {z: ms * 1e3 for z, ms in zip(zeros, figure[theirs], strict=True) if ms is not None and z in ZEROS}
        for theirs, ours in _PUBLISHED.items()
    }
    lines["cublas"] = dict.fromkeys(ZEROS, figure["cuBLAS"] * 1e3)
    return Panel(title="published, A100", published=True, lines=lines)


def table(data: tuple[Panel, ...]) -> str:
    """The times in microseconds."""
    out = [CAPTION]
    for panel in data:
        out += ["", f"{panel.title}, us", ""]
        out += [f"| system | {' | '.join(f'{z:.0%}' for z in ZEROS)} |", "|" + "---|" * (len(ZEROS) + 1)]
        for name in SYSTEMS:
            line = panel.lines.get(name, {})
            if line:
                out.append(f"| {name} | {' | '.join(f'{line[z]:.1f}' if z in line else '' for z in ZEROS)} |")
    return "\n".join(out)


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure, a panel for each machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(data) + 0.6, 4.6))
    panels = figure.subplots(1, len(data), sharex=True, sharey=True, squeeze=False)[0]
    for axes, panel in zip(panels, data, strict=True):
        _draw(axes, panel)
    panels[0].set_ylabel("us")
    figure.subplots_adjust(left=0.08, right=0.98, top=0.78, bottom=0.25, wspace=0.06)
    figure.suptitle(f"y = x Wᵀ over zeros, {M}x{K}, N = {N}", x=0.08, y=0.98, ha="left", fontsize=11)
    _add_legend(figure, [name for name in SYSTEMS if any(name in panel.lines for panel in data)])
    style.add_caption(figure, CAPTION, x=0.08, y=0.02, width=int(52 * len(data) + 8))
    return {"sparsity-sweep": figure}


def _draw(axes: Axes, panel: Panel) -> None:
    for name, line in panel.lines.items():
        _, color, marker = style.SYSTEMS[name]
        places = [ZEROS.index(zeros) for zeros in line]
        dashes = "--" if panel.published else "-"
        fill = "white" if panel.published else color
        axes.plot(places, list(line.values()), color=color, marker=marker, mfc=fill, markersize=4, linestyle=dashes)
    axes.set_yscale("log")
    axes.set_xticks(range(len(ZEROS)), [f"{100 * zeros:g}" for zeros in ZEROS])
    axes.set_xlabel("zeros, %")
    axes.set_title(panel.title, fontsize=8.5)


def _add_legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, markersize=4.5, label=label)
        for label, color, marker in (style.SYSTEMS[name] for name in names)
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.07, 0.94), ncols=len(names), fontsize=7.5)


ENTRY = Entry(name="sparsity", load=load, plot=plot, table=table, sweeps=(measure.ZEROS,))
