# SPDX-License-Identifier: Apache-2.0
"""Train a pruned model with its zeros fixed."""

from __future__ import annotations

import math
from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, BadUsage, usage_errors
from flashllm.cli._models import parse_part, part_option, refuse_packed
from flashllm.statuses import INTERRUPTED


@click.command(epilog="Exit status: 0 fine, also where --minutes ended it, 2 bad usage, 130 interrupted.")
@click.argument("model", type=click.Path(path_type=Path, file_okay=False), metavar="MODEL")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory for the trained model.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=READ_FILE,
    metavar="FILE",
    help="UTF-8 text to train on; may be given several times.",
)
@part_option
@click.option(
    "--teacher",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The model before pruning: learn its predictions instead of the text.",
)
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Training steps in all.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Windows per step.")
@click.option("--length", type=click.IntRange(2), default=1024, show_default=True, help="Length of a window in tokens.")
@click.option("--learning-rate", type=float, default=2e-4, show_default=True, help="Peak learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the order of windows.")
@click.option("--minutes", type=float, metavar="M", help="Stop after M minutes; the same command continues from there.")
@click.option("--device", default="cuda", show_default=True, help="PyTorch device to train on.")
def command(
    model: Path,
    out: Path,
    texts: tuple[Path, ...],
    part: str,
    teacher: Path | None,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    seed: int,
    minutes: float | None,
    device: str,
) -> None:
    """Train a pruned model with its zeros fixed.

    MODEL is a Hugging Face directory, as `flashllm prune` writes. Pruned weights stay zero; everything else is
    trained. Ctrl-C and --minutes save the state; run the same command again to continue. Needs PyTorch and
    transformers: pip install "flashllm[finetune]".
    """
    from rich.console import Console

    from flashllm.cli._progress import progress

    if minutes is not None and not minutes > 0:
        raise BadUsage(f"--minutes: expected a positive number, got {minutes}")
    with usage_errors():
        import numpy as np

        from flashllm.io.checkpoint import open_checkpoint
        from flashllm.models.text import read_text
        from flashllm.models.tokenizer import load_tokenizer
        from flashllm.prune.finetune import Settings, finetune

        settings = Settings(steps=steps, batch=batch, length=length, learning_rate=learning_rate, seed=seed)
        settings.check()
        refuse_packed(model)
        with open_checkpoint(model) as checkpoint:
            tokenizer = load_tokenizer(checkpoint)
        chosen = parse_part(part)
        tokens = np.concatenate([np.array(tokenizer.encode(read_text(text, part=chosen)).ids) for text in texts])
        names = ", ".join(text.name for text in texts)
        try:
            with progress(Console(stderr=True), steps) as advance:
                done = finetune(
                    model,
                    out,
                    tokens,
                    settings,
                    teacher=teacher,
                    text=f"{names} {part}",
                    device=device,
                    seconds=math.inf if minutes is None else minutes * 60,
                    advance=advance,
                )
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            raise SystemExit(INTERRUPTED) from None
    end = f"{out}" if done.finished else f"{out} holds the state: run the same command again to go on"
    click.echo(f"{done.steps} of {steps} steps, loss {done.loss:.4f}, {done.seconds:.1f} s: {end}")
