# SPDX-License-Identifier: Apache-2.0
"""What pruning costs: perplexity of a real model over zeros, for each method, and after training with fixed zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import style
from experiments.figures.entry import Entry
from flashllm.bench import quality_rows
from flashllm.bench.quality_rows import QualityRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: Mapping[str, tuple[str, str, str]] = {
    "magnitude": ("magnitude, of a matrix", "#6b6b6b", "s"),
    "wanda": ("Wanda", "#0072b2", "^"),
    "sparsegpt": ("SparseGPT", "#d55e00", "o"),
}
"""Label, colour and marker of a method."""

CAPTION = (
    "SmolLM2-135M-Instruct (4-bit weights of its GGUF file, dequantised), every linear layer pruned alike, 16 windows"
    " of 512 tokens of the first half of the Debian Reference to calibrate with; perplexity on 8 windows of its second"
    " half."
)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Perplexities; infinite where a row has none."""

    dense: float | None
    pruned: Mapping[str, Mapping[float, float]]
    """By method and zeros."""
    trained: Mapping[str, Mapping[float, float]]
    """The same after training with fixed zeros."""
    commits: tuple[str, ...]


def load(root: Path) -> Curves:
    """Load the newest row of each case from the folder ``experiments``. Raises ``FormatError`` or ``OSError``."""
    rows: dict[tuple[str | None, float | None, bool], QualityRow] = {}
    for file in sorted((root / "results" / "quality").glob("*-smollm2.jsonl")):
        alike = [r for r in quality_rows.read(file) if r.ratios in (None, "uniform") and r.format == "dense"]
        rows |= {(r.method, r.sparsity, r.finetuned_tokens > 0): r for r in alike}
    dense = rows.get(("none", 0.0, False))

    def curves(trained: bool) -> dict[str, dict[float, float]]:
        found: dict[str, dict[float, float]] = {}
        for (method, sparsity, was_trained), row in sorted(rows.items(), key=lambda item: item[0][1] or 0.0):
            if method is not None and method in METHODS and sparsity is not None and was_trained is trained:
                found.setdefault(method, {})[sparsity] = _perplexity(row)
        return found

    return Curves(
        dense=None if dense is None else _perplexity(dense),
        pruned=curves(False),
        trained=curves(True),
        commits=tuple(sorted({(row.commit or "?")[:10] for row in rows.values()})),
    )


def _perplexity(row: QualityRow) -> float:
    return float("inf") if row.ppl is None else row.ppl


def _text(perplexity: float) -> str:
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.1e}".replace("e+0", "e").replace("e+", "e")


def table(data: Curves) -> str:
    """Perplexities by method and zeros."""
    zeros = sorted({s for curves in (data.pruned, data.trained) for found in curves.values() for s in found})
    out = [CAPTION, "", f"Commit {', '.join(data.commits)}", ""]
    out += [f"| method | 0 % | {' | '.join(f'{s:.0%}' for s in zeros)} |", "|" + "---|" * (len(zeros) + 2)]
    dense = "" if data.dense is None else _text(data.dense)
    for suffix, curves in (("", data.pruned), (", trained", data.trained)):
        for name, found in curves.items():
            texts = [_text(found[s]) if s in found else "" for s in zeros]
            out.append(f"| {METHODS[name][0]}{suffix} | {dense} | {' | '.join(texts)} |")
    return "\n".join(out)


def plot(data: Curves) -> dict[str, Figure]:
    """One figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    for curves, line in ((data.pruned, "-"), (data.trained, ":")):
        for name, found in curves.items():
            label, color, marker = METHODS[name]
            label += "" if line == "-" else ", trained with fixed zeros"
            axes.plot(
                [100 * s for s in found],
                list(found.values()),
                line,
                color=color,
                marker=marker,
                markersize=4.5,
                label=label,
            )
    if data.dense is not None:
        axes.axhline(data.dense, color=style.INK, linewidth=0.9)
        axes.text(30, data.dense * 0.93, f"dense: {data.dense:.1f}", fontsize=7, va="top", color=style.INK)
    axes.set_yscale("log")
    # Beyond that, models are useless and their differences do not matter.
    axes.set_ylim((data.dense or 10) * 0.6, 1e4)
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("perplexity")
    axes.legend(loc="upper left", fontsize=7.5)
    figure.subplots_adjust(left=0.1, right=0.98, top=0.9, bottom=0.2)
    figure.suptitle("What pruning costs a small model", x=0.1, y=0.97, ha="left", fontsize=11)
    style.add_caption(figure, CAPTION, x=0.1, y=0.02, width=120)
    return {"quality-smollm2": figure}


ENTRY = Entry(name="quality", load=load, plot=plot, table=table)
