# SPDX-License-Identifier: Apache-2.0
"""How all figures look: type, colours that colour-blind readers can tell apart, hatching for systems by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZEROS: Mapping[float, str] = {0.5: "#0072b2", 0.6: "#56b4e9", 0.7: "#009e73", 0.8: "#e69f00", 0.9: "#d55e00"}
"""Colour of a fraction of zeros, from the palette of Okabe and Ito (2008)."""
SYSTEMS: Mapping[str, tuple[str, str, str]] = {
    "flashllm": ("flashllm", "#d55e00", "o"),
    "cublas": ("cuBLAS", "#6b6b6b", "s"),
    "cublas-notc": ("cuBLAS, no tensor cores", "#b5b5b5", "D"),
    "tca-bme": ("TCA-BME (SpInfer)", "#0072b2", "^"),
    "sparta": ("SparTA", "#009e73", "v"),
    "sparta-cusparselt": ("SparTA, cuSPARSELt", "#66c2a5", "d"),
    "sputnik": ("Sputnik", "#e69f00", "P"),
    "cusparse": ("cuSPARSE", "#cc79a7", "X"),
    "mma-2:4": ("2:4, our kernel", "#56b4e9", "<"),
    "cusparselt-2:4": ("2:4, cuSPARSELt", "#56b4e9", ">"),
    "torch-fp8": ("fp8, torch", "#222222", "*"),
    "torch-int4": ("int4, torch", "#222222", "1"),
}
"""Label, colour and marker of a system."""
DECODERS: Mapping[str, tuple[str, str, str]] = {
    "flashllm-dense": ("dense", "#6b6b6b", "o"),
    "torch-compile": ("dense, torch.compile", "#cc79a7", "X"),
    "torch-2:4": ("2:4, torch.compile", "#0072b2", "v"),
    "hf-static": ("dense, transformers", "#222222", "*"),
}
"""The same for the systems that decode whole models, besides our engine with zeros."""
INK, QUIET, RULE = "#222222", "#6b6b6b", "#d9d9d9"
"""Text, secondary text and cuBLAS, lines of the grid."""
OTHERS: Mapping[str, Any] = {"hatch": "////", "facecolor": "white", "linewidth": 0.9}
"""Bars of systems that are not ours; their edge has the colour."""
FLOOR: Mapping[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 0.9, "alpha": 0.85}
"""Lines at the time that memory alone would take."""

_SETTINGS: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "savefig.dpi": 130,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "flashllm",
    "pdf.fonttype": 42,
}


@contextmanager
def applied() -> Iterator[None]:
    """Figures made and saved within this context look like this."""
    import matplotlib

    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_SETTINGS, "backend": "agg"}
    with matplotlib.rc_context(settings):
        yield


def metadata(suffix: str, stamp: str) -> dict[str, str | None]:
    """What a file of this format says of itself: ``stamp``, and no time, so that it changes only with what is drawn."""
    return {
        "png": {"Software": None, "Description": stamp},
        "svg": {"Date": None, "Description": stamp},
        "pdf": {"CreationDate": None, "Subject": stamp},
    }[suffix]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """``places``, moved apart as little as a single pass does, so that no two are closer than ``gap``."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[float]] = []  # [centre, members]
    for i in order:
        groups.append([places[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, members = groups.pop()
            before, others = groups[-1]
            groups[-1] = [(centre * members + before * others) / (members + others), members + others]
    moved = [centre + gap * (k - (members - 1) / 2) for centre, members in groups for k in range(int(members))]
    out = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        out[i] = place
    return out


def label_right(axes: Axes, x: float, labels: Sequence[tuple[str, float, str]], *, gap: float) -> None:
    """Texts to the right of ``x``, each with its height and colour, moved apart to be ``gap`` from each other."""
    heights = spread([height for _, height, _ in labels], gap)
    for (text, _, color), height in zip(labels, heights, strict=True):
        axes.text(x, height, text, color=color, fontsize=7, va="center", ha="left")


def draw_panels(
    panels: Sequence[Any],
    draw: Callable[[Axes, Any], None],
    *,
    height: float,
    title: str,
    caption: str,
    labels: tuple[str, str],
    systems: Sequence[str],
    dotted: Sequence[str] = (),
    legend_columns: int,
) -> Figure:
    """A figure with a row of panels, ``height`` inches high, for each GPU of ``panels``, and a column for each N.

    ``labels`` are those of the x and y axes. The legend has ``systems``, some of them ``dotted``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    gpus, batches = (list(dict.fromkeys(values)) for values in zip(*((p.gpu, p.n) for p in panels), strict=True))
    whole = height * len(gpus) + 1.2
    figure = Figure(figsize=(11, whole))
    grid = figure.subplots(len(gpus), len(batches), sharex=True, sharey=True, squeeze=False)
    for panel in panels:
        axes = grid[gpus.index(panel.gpu)][batches.index(panel.n)]
        draw(axes, panel)
        axes.set_title(f"N = {panel.n}")
    for line, gpu in zip(grid, gpus, strict=True):
        line[0].set_ylabel(f"{gpu}\n{labels[1]}")
    for axes in grid[-1]:
        axes.set_xlabel(labels[0])
    figure.subplots_adjust(left=0.075, right=0.99, top=1 - 1.0 / whole, bottom=0.95 / whole, wspace=0.07, hspace=0.1)
    figure.suptitle(title, x=0.075, y=1 - 0.1 / whole, ha="left", fontsize=11)
    add_caption(figure, caption, x=0.075, y=0.1 / whole, width=180)
    handles = [
        Line2D(
            [], [], color=color, marker=marker, markersize=4.5, linestyle=":" if name in dotted else "-", label=label
        )
        for name in systems
        for label, color, marker in [SYSTEMS[name]]
    ]
    top = 1 - 0.3 / whole
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.065, top), ncols=legend_columns, fontsize=7.5)
    return figure


def add_caption(figure: Figure, text: str, *, x: float, y: float, width: int) -> None:
    """Add what readers must know, in lines of ``width`` characters, above position ``x``, ``y`` of the figure."""
    lines = fill(text, width)
    figure.text(x, y, lines, fontsize=7, color=QUIET, ha="left", va="bottom", linespacing=1.35)
