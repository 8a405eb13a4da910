# SPDX-License-Identifier: Apache-2.0
"""Decoding whole models: tokens per GPU-second by batch, and where the time of a step goes.

The paper's results for OPT-66B and OPT-175B, from its own hardware, are shown beside ours in panels of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.figures import style
from experiments.figures.entry import Entry
from flashllm.bench import decode_rows
from flashllm.bench.decode_rows import DecodeRow
from flashllm.models.known import known_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT, OUTPUT = 64, 512
FILLS: tuple[Literal["full", "none"], ...] = ("full", "none")
"""Fill styles of markers, by GPU."""
MODELS = ("opt-30b", "opt-66b", "opt-175b", "llama-3.1-70b")
PARTS: Mapping[str, tuple[str, str]] = {
    "linear_ms": ("matrices", "#d55e00"),
    "attention_ms": ("attention", "#0072b2"),
    "comm_ms": ("sums over GPUs", "#009e73"),
    "other_ms": ("other", "#b5b5b5"),
}
"""Label and colour of each part of a step."""
PUBLISHED: Mapping[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "opt66b_tokens_per_gpu_s": (
        "OPT-66B",
        (
            ("FlashLLM_2GPU", "Flash-LLM, 2 GPUs", "#d55e00"),
            ("FT_2GPU", "FasterTransformer, 2", "#6b6b6b"),
            ("FT_4GPU", "FasterTransformer, 4", "#b5b5b5"),
            ("DS_2GPU", "DeepSpeed, 2", "#0072b2"),
        ),
    ),
    "opt175b_tokens_per_gpu_s": (
        "OPT-175B",
        (("FlashLLM_4GPU", "Flash-LLM, 4 GPUs", "#d55e00"), ("FT_8GPU", "FasterTransformer, 8", "#6b6b6b")),
    ),
}
"""Series of the paper's figures, by their names in ``experiments/reference/published_figures.json``."""

CAPTION = (
    f"Random weights in the shapes of each model, fp16, full depth, {PROMPT} tokens of prompt and {OUTPUT} of output,"
    " greedy; tokens / (seconds x GPUs), prefill included. Dense and sparse run in the same engine, a CUDA graph for"
    " each step: only the products with matrices differ. Steps are timed in the middle of the output."
)
PUBLISHED_CAPTION = (
    "Below, hatched: what Flash-LLM's repository shows (A100-SXM4-80GB, 80 % zeros, read off its figures to 2 %), other"
    " people's hardware and code, not to be divided by the above."
)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The newest row of each case, and published series."""

    rows: tuple[DecodeRow, ...]
    dense: Mapping[tuple[Any, ...], float]
    """Tokens per GPU-second of dense weights, by GPU, model, GPUs, batch and run."""
    published: Mapping[str, Mapping[str, Any]]

    @property
    def commits(self) -> tuple[str, ...]:
        """Commits of the rows."""
        return tuple(sorted({(row.commit or "?")[:10] for row in self.rows}))

    def of(self, model: str) -> dict[tuple[str, str, float, int], list[DecodeRow]]:
        """Rows of a model by GPU, system, zeros and GPUs, each by batch."""
        found: dict[tuple[str, str, float, int], list[DecodeRow]] = {}
        for row in sorted(self.rows, key=lambda row: (row.gpu or "", row.system, row.sparsity, row.gpus, row.batch)):
            if row.model == model:
                found.setdefault((row.gpu or "", row.system, row.sparsity, row.gpus), []).append(row)
        return found


def load(root: Path) -> Decoded:
    """Load from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    newest: dict[tuple[Any, ...], DecodeRow] = {}
    dense: dict[tuple[Any, ...], float] = {}
    for file in sorted((root / "results" / "decode").glob("*.jsonl")):
        for row in decode_rows.read(file):
            clean = row.commit is not None and row.dirty is False
            whole = row.model in MODELS and row.dtype == "fp16" and row.layers == known_config(row.model).layers
            if clean and whole and (row.prompt, row.output) == (PROMPT, OUTPUT) and row.tokens_per_gpu_s is not None:
                newest[row.gpu, row.model, row.system, row.sparsity, row.gpus, row.batch] = row
                if row.system == "flashllm-dense":
                    dense[_run_of(row)] = row.tokens_per_gpu_s
    published = json.loads((root / "reference" / "published_figures.json").read_text(encoding="utf-8"))
    chosen = {name: published[name] for name in PUBLISHED}
    return Decoded(rows=tuple(newest.values()), dense=dense, published=chosen)


def _run_of(row: DecodeRow) -> tuple[Any, ...]:
    return (row.gpu, row.model, row.gpus, row.batch, row.run_id)


def label_of(system: str, zeros: float, gpus: int) -> str:
    """Label of a line or bar."""
    name = f"{zeros:.0%} zeros" if system == "flashllm" else style.DECODERS[system][0]
    return name + (f", {gpus} GPUs" if gpus > 1 else "")


def look_of(system: str, zeros: float) -> tuple[str, str]:
    """Colour and marker of a line."""
    if system == "flashllm":
        return style.ZEROS.get(zeros, style.QUIET), "o"
    _, color, marker = style.DECODERS[system]
    return color, marker


def table(data: Decoded) -> str:
    """Throughput, latency and memory of each case; the ratio to dense weights of the same batch, run and GPUs."""
    out = [CAPTION, "", f"Commit {', '.join(data.commits)}", ""]
    out += [
        "| model | weights | batch | tokens/GPU-s | of dense | TTFT, ms | TPOT, ms | of the bound | GB in all |",
        "|" + "---|" * 9,
    ]
    for model in MODELS:
        for (gpu, system, zeros, gpus), rows in data.of(model).items():
            for row in rows:
                base = data.dense.get(_run_of(row))
                speed = f"{row.tokens_per_gpu_s / base:.2f}" if base and row.tokens_per_gpu_s else ""
                bound = f"{row.bound_fraction:.0%}" if row.bound_fraction is not None else ""
                cells = (
                    f"{model}, {gpu.removeprefix('NVIDIA ')}",
                    f"{label_of(system, zeros, gpus)}, {row.weights_gb:.1f} GB",
                    str(row.batch),
                    f"{row.tokens_per_gpu_s:.0f}",
                    speed,
                    f"{row.ttft_ms:.0f}",
                    f"{row.tpot_ms:.1f}",
                    bound,
                    f"{row.peak_gb:.1f}",
                )
                out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def plot(data: Decoded) -> dict[str, Figure]:
    """Throughput beside what was published, and the parts of a step."""
    return {"decode-throughput": _throughput(data), "decode-step": _steps(data)}


def _throughput(data: Decoded) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7.2))
    grid = figure.subplots(2, len(MODELS), squeeze=False)
    kinds = {gpu: FILLS[i % 2] for i, gpu in enumerate(sorted({row.gpu or "" for row in data.rows}, reverse=True))}
    for axes, model in zip(grid[0], MODELS, strict=True):
        lines = data.of(model)
        for (gpu, system, zeros, gpus), rows in lines.items():
            color, marker = look_of(system, zeros)
            axes.plot(
                [row.batch for row in rows],
                [row.tokens_per_gpu_s for row in rows],
                color=color,
                marker=marker,
                markersize=4,
                linestyle="--" if gpus > 1 else "-",
                fillstyle=kinds[gpu],
                label=label_of(system, zeros, gpus),
            )
        axes.set_title(_title(model))
        axes.set_xscale("log", base=2)
        axes.set_xlim(7, 73)
        axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # of all GPUs together
        for gpu in dict.fromkeys(gpu for gpu, *_ in lines):
            entries[_short(gpu)] = Line2D([], [], color="none", marker="o", markeredgecolor="k", markerfacecolor="k",
                markersize=4, fillstyle=kinds[gpu])  # fmt: skip
        most = max([row.tokens_per_gpu_s or 0 for rows in lines.values() for row in rows], default=1)
        axes.set_ylim(0, most * max(1.35, 1 / (0.95 - 0.068 * len(entries))))  # the legend stands above lines
        axes.set_xlabel("batch")
        if axes.lines:
            axes.legend(entries.values(), entries.keys(), loc="upper left", fontsize=7)
    grid[0][0].set_ylabel("tokens per GPU-second")
    for axes, (name, (title, series)) in zip(grid[1], PUBLISHED.items(), strict=False):
        _published(axes, data.published[name], series)
        axes.set_title(f"published: {title}, A100-80GB")
    grid[1][0].set_ylabel("tokens per GPU-second")
    for axes in grid[1][len(PUBLISHED) :]:
        axes.set_axis_off()
    figure.subplots_adjust(left=0.06, right=0.99, top=0.88, bottom=0.13, wspace=0.25, hspace=0.38)
    figure.suptitle("Decoding whole models", x=0.06, y=0.97, ha="left", fontsize=11)
    style.add_caption(figure, f"{CAPTION} {PUBLISHED_CAPTION}", x=0.06, y=0.015, width=180)
    return figure


def _published(axes: Axes, values: Mapping[str, Any], series: Sequence[tuple[str, str, str]]) -> None:
    width = 0.8 / len(series)
    for turn, (name, label, color) in enumerate(series):
        shift = (turn - (len(series) - 1) / 2) * width
        bars = {place + shift: value for place, value in enumerate(values[name]) if value is not None}
        axes.bar(list(bars), list(bars.values()), width * 0.9, edgecolor=color, label=label, **style.OTHERS)
    axes.set_xticks(range(len(values["batch"])), [str(batch) for batch in values["batch"]])
    axes.set_xlabel("batch (no bar: out of memory)")
    axes.legend(loc="upper left", fontsize=6.5)


def _steps(data: Decoded) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 5.2))
    grid = figure.subplots(1, len(MODELS), squeeze=False)[0]
    stepped = {model: [r for found in data.of(model).values() for r in found if r.step_ms] for model in MODELS}
    most = max(map(len, stepped.values()), default=0)
    shown = [part for part in PARTS if any(getattr(row, part) for rows in stepped.values() for row in rows)]
    for axes, model in zip(grid, MODELS, strict=True):
        rows = sorted(stepped[model], key=lambda row: (row.gpu or "", row.batch, -row.sparsity))
        for place, row in enumerate(rows):
            left = 0.0
            for field in shown:
                value = getattr(row, field) or 0.0
                axes.barh(place, value, left=left, color=PARTS[field][1], height=0.75)
                left += value
            if row.bound_ms is not None:
                axes.plot([row.bound_ms] * 2, [place - 0.42, place + 0.42], color=style.INK, linewidth=1.2)
        names = [f"{row.batch}: {label_of(row.system, row.sparsity, row.gpus)}" for row in rows]
        if len({row.gpu for row in data.rows}) > 1:
            names = [f"{_short(row.gpu or '')}, {name}" for row, name in zip(rows, names, strict=True)]
        axes.set_yticks(range(len(rows)), names, fontsize=6.5)
        axes.set_ylim(most - 0.4, -0.6)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms of a step")
        axes.set_title(_title(model))
    handles = [Patch(color=PARTS[part][1], label=PARTS[part][0]) for part in shown]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.06, 0.94), ncols=4, fontsize=7.5)
    figure.subplots_adjust(left=0.09, right=0.99, top=0.83, bottom=0.2, wspace=0.45)
    figure.suptitle("Where the time of a decoding step goes", x=0.06, y=0.98, ha="left", fontsize=11)
    note = " A bar for each batch and system; parts: from graphs of some of the launches. Black: the time of reading."
    style.add_caption(figure, CAPTION + note, x=0.06, y=0.02, width=180)
    return figure


def _short(gpu: str) -> str:
    """``"H100"`` of ``"NVIDIA H100 80GB HBM3"``."""
    return next(iter(gpu.removeprefix("NVIDIA ").split()), "")


def _title(model: str) -> str:
    return model.upper().replace("LLAMA", "Llama")


ENTRY = Entry(name="decode", load=load, plot=plot, table=table)
