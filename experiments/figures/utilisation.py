# SPDX-License-Identifier: Apache-2.0
"""How much of the GPU's bandwidth and tensor cores cuBLAS and ours use, as in the Flash-LLM paper's figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from experiments.figures import measure, rows, style
from experiments.figures.entry import Entry
from experiments.figures.rows import Case, Final
from flashllm.gpus import model_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (8, 16, 32, 64)
ZEROS = tuple(style.ZEROS)

CAPTION = (
    "fp16, random zeros, CUDA graphs, L2 cold; newest rows in the format that auto takes, geometric means"
    " over the shapes of OPT. Bandwidth: bytes of the product over its time, over the read bandwidth of the run."
    " Tensor cores: as if W were dense, over the peak at the highest clock; 2:4 products (slot24) issue half of that."
    " Grey: cuBLAS."
)


@dataclass(frozen=True, kw_only=True)
class Use:
    """Fractions of what the GPU can do."""

    bandwidth: float
    tensor_cores: float | None
    """None for a GPU whose peak is unknown."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One GPU: ours by fraction of zeros and N, cuBLAS by N alone."""

    gpu: str
    ours: Mapping[tuple[float, int], Use]
    dense: Mapping[int, Use]


def load(root: Path) -> tuple[Panel, ...]:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    chosen = rows.chosen(root)
    return tuple(_panel(gpu, chosen[gpu]) for gpu in rows.in_order(chosen))


def _panel(gpu: str, found: Mapping[Case, Final]) -> Panel:
    model = model_of(gpu)

    def use(here: Mapping[Case, Final], *, dense: bool) -> Use:
        def bandwidth(case: Case, row: Final) -> float:
            if not dense:
                return row.floor_us / row.us
            n_bytes = 2 * (case.M * case.K + case.N * case.K + case.N * case.M)
            return row.floor_us * n_bytes / row.bytes / row.cublas_us

        flops = geometric_mean(
            2e-6 * case.M * case.K * case.N / (row.cublas_us if dense else row.us) for case, row in here.items()
        )
        read = geometric_mean(bandwidth(case, row) for case, row in here.items())
        return Use(bandwidth=read, tensor_cores=None if model is None else flops / model.tensor_flops)

    ours, dense = {}, {}
    for n in BATCHES:
        here = {case: row for case, row in found.items() if n == case.N}
        if here:
            dense[n] = use(here, dense=True)
        for zeros in ZEROS:
            at = {case: row for case, row in here.items() if zeros == case.zeros}
            if at:
                ours[zeros, n] = use(at, dense=False)
    return Panel(gpu=gpu, ours=ours, dense=dense)


def table(data: tuple[Panel, ...]) -> str:
    """The fractions, in per cent."""
    out = [CAPTION]
    for panel in data:
        out += ["", panel.gpu, "", "| system | zeros | N | bandwidth | tensor cores |", "|" + "---|" * 5]
        for n, use in panel.dense.items():
            out.append(f"| cuBLAS | | {n} | {_cells(use)} |")
        for (zeros, n), use in panel.ours.items():
            out.append(f"| flashllm | {zeros:.0%} | {n} | {_cells(use)} |")
    return "\n".join(out)


def _cells(use: Use) -> str:
    return f"{use.bandwidth:.0%} | " + ("" if use.tensor_cores is None else f"{use.tensor_cores:.1%}")


def plot(data: tuple[Panel, ...]) -> dict[str, Figure]:
    """One figure: a row for each GPU, bandwidth beside tensor cores."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 2.5 * len(data) + 1.3))
    grid = figure.subplots(len(data), 2, squeeze=False)
    for line, panel in zip(grid, data, strict=True):
        _draw(line[0], panel, "bandwidth")
        _draw(line[1], panel, "tensor_cores")
        line[0].set_ylabel(f"{panel.gpu}\n% of peak")
    grid[0][0].set_title("memory bandwidth")
    grid[0][1].set_title("tensor cores, as if W were dense")
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.09, right=0.985, top=1 - 0.95 / height, bottom=0.9 / height, wspace=0.1, hspace=0.3)
    figure.suptitle("y = x Wᵀ, what of the GPU is used", x=0.09, y=1 - 0.1 / height, ha="left", fontsize=11)
    handles = [Patch(color=style.QUIET, label="cuBLAS")]
    handles += [Patch(color=color, label=f"{zeros:.0%} zeros") for zeros, color in style.ZEROS.items()]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.08, 1 - 0.3 / height), ncols=6, fontsize=7.5)
    style.add_caption(figure, CAPTION, x=0.09, y=0.1 / height, width=150)
    return {"utilisation-auto": figure}


def _draw(axes: Axes, panel: Panel, what: str) -> None:
    width = 0.8 / (len(ZEROS) + 1)
    for j, n in enumerate(BATCHES):
        bars = [(style.QUIET, panel.dense.get(n))]
        bars += [(style.ZEROS[zeros], panel.ours.get((zeros, n))) for zeros in ZEROS]
        for i, (color, use) in enumerate(bars):
            if use is not None and (used := getattr(use, what)) is not None:
                axes.bar(j + (i - len(ZEROS) / 2) * width, 100 * used, width, color=color)
    axes.set_xticks(range(len(BATCHES)), [f"N = {n}" for n in BATCHES])


ENTRY = Entry(name="utilisation", load=load, plot=plot, table=table, sweeps=(measure.AUTO,))
