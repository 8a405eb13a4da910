# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory models take while decoding, and so how many GPUs they need: computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import style
from experiments.figures.entry import Entry
from flashllm.bench.decode_memory import MemoryPlan, plan_memory
from flashllm.bench.decode_weights import DENSE, PARTS
from flashllm.engine.shard import Shard
from flashllm.errors import ArgumentError
from flashllm.models.known import known_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPT, OUTPUT, BATCH = 64, 512, 8
MODELS = ("opt-13b", "opt-30b", "opt-66b", "opt-175b", "llama-2-7b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b",
          "llama-3.1-405b", "qwen2.5-72b")  # fmt: skip
WEIGHTS: tuple[tuple[str, float, str], ...] = (
    ("dense", 0.0, style.QUIET),
    ("60 % zeros, bitmap", 0.6, style.ZEROS[0.6]),
    ("80 % zeros, slot24", 0.8, style.ZEROS[0.8]),
)
FORMATS = {0.0: DENSE, 0.6: "bitmap", 0.8: "slot24"}
GPUS = {"H100 80GB": 81.0e9, "H200": 149.3e9}
"""Bytes that a process finds free."""
LINES = {
    "H100 80GB": GPUS["H100 80GB"],
    "H200": GPUS["H200"],
    "2 H200": 2 * GPUS["H200"],
    "4 H200": 4 * GPUS["H200"],
}
"""Lines drawn with their names; others would coincide with these."""
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)

CAPTION = (
    f"fp16, {PROMPT} tokens of prompt and {OUTPUT} of output, the plan of `flashllm decode-bench`: weights, keys and"
    " values, activations, workspace. More GPUs divide heads and feed-forward units (tensor parallelism), where the"
    " model can be divided so."
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model with one kind of weights."""

    model: str
    weights: str
    zeros: float
    plan: MemoryPlan
    """On one GPU, at batch ``BATCH``."""
    needed: dict[str, int | None]
    """By GPU, the number needed at batch ``BATCH``; None: more than the model can be divided among."""
    batch: dict[str, int | None]
    """By GPU, the largest batch on one; None: none fits."""


def plan(model: str, zeros: float, *, batch: int, gpus: int = 1) -> MemoryPlan | None:
    """What each of ``gpus`` needs; None where the model cannot be divided among so many."""
    config, shard = known_config(model), Shard(count=gpus)
    try:
        shard.check(config)
    except ArgumentError:
        return None
    formats = dict.fromkeys(PARTS, FORMATS[zeros])
    return plan_memory(config, formats, sparsity=zeros, batch=batch, prompt=PROMPT, output=OUTPUT, shard=shard)


def load(root: Path) -> tuple[Fit, ...]:
    """Computed anew; no file is read."""
    return tuple(_fit(model, label, zeros) for model in MODELS for label, zeros, _ in WEIGHTS)


def _fit(model: str, label: str, zeros: float) -> Fit:
    here = plan(model, zeros, batch=BATCH)
    assert here is not None

    def fits(batch: int, gpus: int, free: float) -> bool:
        part = plan(model, zeros, batch=batch, gpus=gpus)
        return part is not None and part.needed <= free

    return Fit(
        model=model,
        weights=label,
        zeros=zeros,
        plan=here,
        needed={gpu: next((c for c in COUNTS if fits(BATCH, c, free)), None) for gpu, free in GPUS.items()},
        batch={gpu: next((b for b in BATCHES if fits(b, 1, free)), None) for gpu, free in GPUS.items()},
    )


def table(data: tuple[Fit, ...]) -> str:
    """GB, GPUs and batches."""
    names = list(GPUS)
    heads = [f"GPUs, {name}" for name in names] + [f"largest batch on one {name}" for name in names]
    out = [CAPTION, "", f"| model | weights | GB at batch {BATCH} | {' | '.join(heads)} |", "|" + "---|" * 7]
    for one in data:
        cells = [str(one.needed[name] or "cannot be divided so far") for name in names]
        cells += [_batch(one.batch[name]) for name in names]
        out.append(f"| {one.model} | {one.weights} | {one.plan.needed / 1e9:.1f} | {' | '.join(cells)} |")
    return "\n".join(out)


def _batch(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size} or more" if size == BATCHES[0] else str(size)


def plot(data: tuple[Fit, ...]) -> dict[str, Figure]:
    """One figure: GB of each model, and what GPUs have."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 5.6))
    axes = figure.subplots()
    height = 0.8 / len(WEIGHTS)
    for turn, (_, zeros, color) in enumerate(WEIGHTS):
        rows = [one for one in data if one.zeros == zeros]
        places = [place + (turn - (len(WEIGHTS) - 1) / 2) * height for place in range(len(rows))]
        weights = [(one.plan.matrices + one.plan.other_weights) / 1e9 for one in rows]
        rest = [one.plan.needed / 1e9 - weight for one, weight in zip(rows, weights, strict=True)]
        axes.barh(places, weights, height * 0.9, color=color)
        axes.barh(places, rest, height * 0.9, left=weights, color=color, alpha=0.4)
    for text, limit in LINES.items():
        axes.axvline(limit / 1e9, color=style.INK, **style.FLOOR)
        axes.text(limit / 1e9, -0.75, text, fontsize=7, ha="center", color=style.INK)
    axes.set_xscale("log")
    axes.set_yticks(range(len(MODELS)), MODELS)
    axes.set_ylim(len(MODELS) - 0.5, -0.6)
    axes.set_xlim(left=3)
    axes.set_xlabel(f"GB at batch {BATCH}; pale: keys and values, activations, workspace")
    axes.grid(axis="x")
    handles = [Patch(color=color, label=label) for label, _, color in WEIGHTS]
    axes.legend(handles=handles, loc="lower right", fontsize=7.5, frameon=True, facecolor="white", edgecolor="none")
    figure.subplots_adjust(left=0.13, right=0.98, top=0.88, bottom=0.17)
    figure.suptitle("What decoding takes of the memory", x=0.13, y=0.98, ha="left", fontsize=11)
    style.add_caption(figure, CAPTION, x=0.13, y=0.015, width=140)
    return {"fit-memory": figure}


ENTRY = Entry(name="fit", load=load, plot=plot, table=table)
