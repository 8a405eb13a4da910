# SPDX-License-Identifier: Apache-2.0
"""The ablation of the Flash-LLM kernel's ideas: our Tiled-CSL kernel without one of them at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IDEAS: Mapping[str, tuple[str, str]] = {
    "row-order": ("words in row order, not by bank", "#0072b2"),
    "no-overlap": ("loads, stores and products one after the other", "#009e73"),
    "clear-all": ("whole tiles cleared, not what was written", "#e69f00"),
}
"""What is left out, and its colour."""

CAPTION = (
    "Tiled-CSL kernel, fp16, random zeros, CUDA graphs, L2 cold; the newest rows of `flashllm bench"
    " --ablation`. A bar is the time without the idea over the time with all, both of one run: above 1 the idea pays."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One GPU: the time with all ideas by case, and the time without one by idea and case."""

    gpu: str
    whole: Mapping[Case, float]
    without: Mapping[str, Mapping[Case, float]]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    return tuple(
        Panel(gpu=gpu, whole=times[""], without={idea: times.get(idea, {}) for idea in IDEAS})
        for gpu, times in rows.ablation(root).items()
    )


def table(data: tuple[Panel, ...]) -> str:
    """The times in microseconds."""
    out = [CAPTION]
    for panel in data:
        out += ["", f"{panel.gpu}, us", ""]
        out += [f"| MxK | N | zeros | with all | {' | '.join(IDEAS)} |", "|" + "---|" * (4 + len(IDEAS))]
        for case, us in sorted(panel.whole.items()):
            others = [panel.without[idea].get(case) for idea in IDEAS]
            texts = ["" if other is None else f"{other:.1f} ({other / us:.2f} x)" for other in others]
            out.append(f"| {case.M}x{case.K} | {case.N} | {case.zeros:.0%} | {us:.1f} | {' | '.join(texts)} |")
    return "\n".join(out)


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure, a panel for each GPU."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 2.6 * len(data) + 1.3))
    panels = figure.subplots(len(data), 1, sharey=True, squeeze=False)[:, 0]
    for axes, panel in zip(panels, data, strict=True):
        _draw(axes, panel)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.08, right=0.99, top=1 - 0.85 / height, bottom=1.0 / height, hspace=0.45)
    figure.suptitle("What each idea of the kernel is worth", x=0.08, y=1 - 0.1 / height, ha="left", fontsize=11)
    handles = [Patch(color=color, label=label) for label, color in IDEAS.values()]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.07, 1 - 0.28 / height), ncols=3, fontsize=7.5)
    style.add_caption(figure, CAPTION, x=0.08, y=0.1 / height, width=150)
    return {"ablation-tiled-csl": figure}


def _draw(axes: Axes, panel: Panel) -> None:
    cases = sorted(panel.whole)
    width = 0.8 / len(IDEAS)
    for i, (idea, (_, color)) in enumerate(IDEAS.items()):
        here = [(j, panel.without[idea][case] / panel.whole[case]) for j, case in enumerate(cases)]
        axes.bar([j + (i - 1) * width for j, _ in here], [ratio - 1 for _, ratio in here], width, bottom=1, color=color)
    axes.axhline(1, color=style.INK, linewidth=0.9)
    axes.set_xticks(range(len(cases)), [f"{case.M}x{case.K}\n{case.zeros:.0%}" for case in cases], fontsize=6.5)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_ylabel("time / with all ideas")
    axes.set_title(f"{panel.gpu}, N = {', '.join(str(n) for n in sorted({case.N for case in cases}))}", loc="left")


ENTRY = Entry(name="ablation", load=load, plot=plot, table=table, sweeps=(measure.ABLATION,))
