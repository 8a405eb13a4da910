# SPDX-License-Identifier: Apache-2.0
"""Prune a model."""

from __future__ import annotations

from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, BadUsage, usage_errors
from flashllm.cli._models import (
    array_module,
    device_option,
    length_option,
    parse_part,
    part_option,
    refuse_options,
    refuse_packed,
)
from flashllm.statuses import INTERRUPTED


@click.command(epilog="Exit status: 0 fine, 2 bad usage or an unreadable file, 130 interrupted.")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory for the pruned model."
)
@click.option(
    "--method",
    type=click.Choice(["magnitude", "magnitude-row", "wanda", "sparsegpt"]),
    default="wanda",
    show_default=True,
    help="What decides which elements go.",
)
@click.option("--sparsity", type=float, required=True, metavar="FRACTION", help="Fraction of zeros, e.g. 0.6.")
@click.option(
    "--ratios",
    type=click.Choice(["uniform", "owl", "global"]),
    default="uniform",
    show_default=True,
    help="Zeros of a block: as many in each, fewer where it has outliers, or by one threshold (magnitude only).",
)
@click.option("--calib", type=READ_FILE, metavar="FILE", help="Text to calibrate with.")
@part_option
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="How many windows of text to calibrate with.",
)
@length_option
@device_option
def command(
    model: Path,
    out: Path,
    method: str,
    sparsity: float,
    ratios: str,
    calib: Path | None,
    part: str,
    samples: int,
    length: int,
    device: str,
) -> None:
    """Prune the linear layers of a model.

    MODEL is a Hugging Face directory with safetensors, or a GGUF file. wanda and sparsegpt need text: any UTF-8 file
    that resembles what the model is used for. The result is a Hugging Face directory; run the same command again to
    continue an interrupted run. `flashllm convert` packs the result, `flashllm eval` measures what it has lost.
    """
    from rich.console import Console

    from flashllm.cli._progress import progress

    with usage_errors():
        from flashllm.io.checkpoint import open_checkpoint
        from flashllm.models.config import model_config
        from flashllm.models.text import read_text, windows
        from flashllm.models.tokenizer import load_tokenizer
        from flashllm.prune.methods import METHODS
        from flashllm.prune.run import Settings, prune

        settings = Settings(method=method, sparsity=sparsity, ratios=ratios)  # type: ignore[arg-type]
        settings.check()
        refuse_packed(model)
        if not METHODS[method].calibrates:
            refuse_options(("calib", "part", "samples", "length"), f"with --method {method}, which needs no text")
        elif calib is None:
            raise BadUsage(f"--calib: {method} needs a text to calibrate with")
        with open_checkpoint(model) as checkpoint:
            config = model_config(checkpoint.config, path=str(model))
            tokens = None
            if calib is not None:
                text = read_text(calib, part=parse_part(part))
                tokens = windows(load_tokenizer(checkpoint), text, count=samples, length=length).tokens
            blocks = config.layers * (2 if ratios == "owl" else 1)
            try:
                with usage_errors(MemoryError), progress(Console(stderr=True), blocks) as advance:
                    found = prune(
                        checkpoint,
                        out,
                        settings,
                        tokens=tokens,
                        text=None if calib is None else f"{calib.name} {part}",
                        xp=array_module(device),
                        advance=advance,
                    )
            except KeyboardInterrupt:
                click.echo("interrupted; run the same command again to continue", err=True)
                raise SystemExit(INTERRUPTED) from None
    click.echo(
        f"{out}: {found.zeros:,} of {found.elements:,} weights are zeros, {found.sparsity:.2%}; {found.seconds:.1f} s"
    )
