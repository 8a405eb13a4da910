# SPDX-License-Identifier: Apache-2.0
"""The kernel figure of the Flash-LLM paper: TFLOP/s of every system on the shapes of OPT at 70, 80 and 90 % zeros.

Counted as in the paper, as if W were dense. The paper's own bars, from an A100, are hatched in panels of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Case, Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZEROS = (0.7, 0.8, 0.9)
BATCHES = (8, 16, 32)
OURS = ("cusparse", "sputnik", "cublas-notc", "cublas", "sparta", "sparta-cusparselt", "tca-bme", "flashllm")
THEIRS = ("sputnik", "cublas", "sparta", "flashllm")
_PUBLISHED = {"sputnik": "sputnik", "cublas": "cublas", "sparta": "sparta", "flashllm": "flash"}

CAPTION = (
    "fp16, random zeros; TFLOP/s as if W were dense. Filled: measured here, CUDA graphs, L2 cold, all in one sweep, our"
    " own code or the vendor's library. Hatched: read off the figure in the Flash-LLM repository (A100 80GB, L2 warm,"
    " the authors' kernels): other hardware, not to be divided by ours."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Bars of one N: TFLOP/s by system and case."""

    machine: str
    n: int
    hatched: bool
    bars: Mapping[str, Mapping[Case, float]]

    @property
    def title(self) -> str:
        """N and the machine."""
        return f"N = {self.n}: {self.machine}"


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    published = _published(root)
    panels = []
    for n in BATCHES:
        for one in rows.compared(root):
            bars = {name: _tflops(one, name, n) for name in OURS}
            machine = f"{one.gpu}, commit {', '.join(one.commits)}"
            panels.append(Panel(machine=machine, n=n, hatched=False, bars=bars))
        panels.append(Panel(machine="published, A100 80GB", n=n, hatched=True, bars=published[n]))
    return tuple(panels)


def _tflops(one: Compared, system: str, n: int) -> dict[Case, float]:
    """TFLOP/s by case; a dense system's only time for a shape and N stands for every fraction of zeros."""
    cases = one.systems.get(system, {})
    if system.startswith("cublas"):
        newest = {case[:3]: row.us for case, row in cases.items()}
        found = {Case(*shape, zeros): us for shape, us in newest.items() for zeros in ZEROS}
    else:
        found = {case: row.us for case, row in cases.items()}
    return {
        case: 2 * case.M * case.N * case.K / us * 1e-6
        for case, us in sorted(found.items())
        if n == case.N and case.zeros in ZEROS
    }


def _published(root: Path) -> dict[int, dict[str, dict[Case, float]]]:
    figure: dict[str, Any] = json.loads((root / "reference" / "published_figures.json").read_text(encoding="utf-8"))
    names, values = figure["kernel_fig"]["names"], figure["kernel_fig"]["tflops"]
    found: dict[int, dict[str, dict[Case, float]]] = {}
    for n in BATCHES:
        cases = [Case(int(m), int(k), n, int(percent) / 100) for m, k, percent in (name.split("/") for name in names)]
        found[n] = {
            ours: dict(zip(cases, map(float, values[str(n)][theirs]), strict=True))
            for ours, theirs in _PUBLISHED.items()
        }
    return found


def advantage(data: tuple[Panel, ...]) -> dict[str, dict[tuple[str, float], float]]:
    """By machine, other system and fraction of zeros: Flash-LLM's speed over theirs, geometric mean over shapes and N.

    Over the cases that both have; Flash-LLM is the authors' kernel in the published bars and ours in the others.
    """
    found: dict[str, dict[tuple[str, float], float]] = {}
    for machine in dict.fromkeys(panel.machine for panel in data):
        panels = [panel for panel in data if panel.machine == machine]
        for name in OURS[:-1]:
            for zeros in ZEROS:
                ratios = [
                    height / panel.bars[name][case]
                    for panel in panels
                    for case, height in panel.bars.get("flashllm", {}).items()
                    if case.zeros == zeros and case in panel.bars.get(name, {})
                ]
                if ratios:
                    found.setdefault(machine, {})[name, zeros] = geometric_mean(ratios)
    return found


def table(data: tuple[Panel, ...]) -> str:
    """Flash-LLM's speed over that of the others, and the height of every bar."""
    out = [CAPTION]
    for machine, ratios in advantage(data).items():
        out += ["", f"flashllm over another system, geometric mean over shapes and N: {machine}", ""]
        out += [f"| | {' | '.join(f'{zeros:.0%}' for zeros in ZEROS)} |", "|" + "---|" * (1 + len(ZEROS))]
        for name in dict.fromkeys(name for name, _ in ratios):
            texts = [f"{ratios[name, zeros]:.2f}" if (name, zeros) in ratios else "" for zeros in ZEROS]
            out.append(f"| {name} | {' | '.join(texts)} |")
    for panel in data:
        names = [name for name in OURS if panel.bars.get(name)]
        out += ["", panel.title, ""]
        out += [f"| MxK | zeros | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
        for case in _cases(panel.bars):
            heights = [panel.bars[name].get(case) for name in names]
            texts = ["" if height is None else f"{height:.1f}" for height in heights]
            out.append(f"| {case.M}x{case.K} | {case.zeros:.0%} | {' | '.join(texts)} |")
    return "\n".join(out)


def _cases(bars: Mapping[str, Mapping[Case, float]]) -> list[Case]:
    """In the paper's order: by size of the model, then as a layer uses them."""
    return sorted({case for here in bars.values() for case in here}, key=lambda c: (min(c.M, c.K), c.K, c.M, c.zeros))


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure, a panel for each N and machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.1 * len(data) + 1.4))
    for axes, panel in zip(figure.subplots(len(data), 1), data, strict=True):
        _draw(axes, panel)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.045, right=0.995, top=1 - 0.75 / height, bottom=0.8 / height, hspace=0.5)
    figure.suptitle(
        "y = x Wᵀ on the shapes of OPT-30B, 66B and 175B", x=0.045, y=1 - 0.12 / height, ha="left", fontsize=11
    )
    _add_legend(figure, 1 - 0.28 / height)
    style.add_caption(figure, CAPTION, x=0.045, y=0.12 / height, width=220)
    return {"kernels-opt": figure}


def _draw(axes: Axes, panel: Panel) -> None:
    cases = _cases(panel.bars)
    shown: Sequence[str] = THEIRS if panel.hatched else OURS
    width = 0.8 / len(shown)
    for i, name in enumerate(shown):
        _, color, _ = style.SYSTEMS[name]
        x = [j + (i - (len(shown) - 1) / 2) * width for j, case in enumerate(cases) if case in panel.bars.get(name, {})]
        heights = [panel.bars[name][case] for case in cases if case in panel.bars.get(name, {})]
        if panel.hatched:
            axes.bar(x, heights, width, edgecolor=color, **style.OTHERS)
        else:
            axes.bar(x, heights, width, color=color)
    axes.set_title(panel.title, loc="left", fontsize=8)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_xticks(range(len(cases)), [f"{case.zeros:.0%}" for case in cases], fontsize=6)
    for j in range(0, len(cases), len(ZEROS)):
        middle = j + (len(ZEROS) - 1) / 2
        axes.annotate(
            f"{cases[j].M}x{cases[j].K}", (middle, 0), (0, -17), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=6.5,
        )  # fmt: skip
        if j:
            axes.axvline(j - 0.5, color=style.RULE, linewidth=0.6)
    axes.set_ylabel("TFLOP/s")


def _add_legend(figure: Figure, top: float) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=style.SYSTEMS[name][1], label=style.SYSTEMS[name][0]) for name in OURS]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.04, top), ncols=len(handles), fontsize=7.5)


ENTRY = Entry(name="kernels", load=load, plot=plot, table=table, sweeps=(measure.SYSTEMS,))
