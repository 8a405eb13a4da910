# SPDX-License-Identifier: Apache-2.0
"""Measure how well a model predicts a text."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, BadUsage, usage_errors
from flashllm.cli._models import array_module, device_option, length_option, parse_part, part_option


@click.command(
    epilog="Exit status: 0 fine, 1 sparse and dense logits disagree, 2 bad usage or an unreadable file,"
    " 130 interrupted."
)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option("--text", required=True, type=READ_FILE, metavar="FILE", help="UTF-8 text to evaluate on.")
@part_option
@click.option(
    "--windows",
    "count",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="How many windows of text to evaluate.",
)
@length_option
@click.option("--check", is_flag=True, help="Compare logits with dense products (converted models).")
@device_option
@click.option(
    "--backend",
    type=click.Choice(["cuda", "emulator", "reference"]),
    help="What multiplies packed matrices.  [default: cuda on a GPU, else reference, which is NumPy]",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Append the result to this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the row as JSON.")
def command(
    model: Path,
    text: Path,
    part: str,
    count: int,
    length: int,
    check: bool,
    device: str,
    backend: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how well a model predicts a text: perplexity and bits per byte.

    MODEL is a Hugging Face directory with safetensors, a GGUF file, or a directory that `flashllm convert` wrote, whose
    packed matrices are multiplied in packed form. Bits per byte can be compared between models with different
    tokenizers. Use text that the model was not pruned with: --part 0:0.5 for `flashllm prune`, --part 0.5:1 here.
    """
    from rich.console import Console

    from flashllm.cli._progress import progress

    with usage_errors():
        from flashllm.bench import quality_rows, results
        from flashllm.bench.evaluation import Evaluation

        chosen = parse_part(part)
        if device == "gpu" and backend in ("reference", "emulator"):
            raise BadUsage(f"--backend {backend}: expected --device cpu or auto, got gpu")
        xp = array_module("cpu" if backend in ("reference", "emulator") else device)
        if backend == "cuda" and xp.__name__ == "numpy":
            raise BadUsage("--backend cuda: expected a GPU that is used, got --device cpu or none")
        with Evaluation(model, xp=xp, backend=backend) as evaluation:
            for option, given in (("--check", check), ("--backend", backend is not None)):
                if given and not evaluation.is_packed:
                    raise BadUsage(
                        f"{option}: expected a model that `flashllm convert` made, got one that is not packed"
                    )
            windows = evaluation.windows(text, part=chosen, count=count, length=length)
            if out is not None:
                results.ensure_rows(out)
            blocks = evaluation.config.layers * (4 if check else 1)
            with usage_errors(MemoryError), progress(Console(stderr=True), blocks) as advance:
                row = evaluation.measure(windows, text=f"{text.name} {part}", check=check, advance=advance)
        if out is not None:
            quality_rows.append(out, row)
    if as_json:
        click.echo(json.dumps(json.loads(row.to_json()), indent=2))
    else:
        click.echo(
            f"{row.model}: perplexity {_number(row.ppl, '.2f')}, {_number(row.bits_per_byte, '.3f')} bits per byte,"
            f" {row.tokens:,} tokens of"
            f" {row.text}, {row.sparsity_real:.1%} zeros, {row.format}, {row.seconds:.1f} s"
        )
        if row.check is not None:
            click.echo(
                f"logits: largest error {_number(row.logit_error, '.4g')},"
                f" dense 16-bit products {_number(row.logit_error_dense, '.4g')}: "
                + ("agree" if row.check == "pass" else "disagree")
            )
    if row.check == "fail":
        raise SystemExit(1)


def _number(value: float | None, form: str) -> str:
    return "no number" if value is None else format(value, form)
