# SPDX-License-Identifier: Apache-2.0
"""Measure how fast a model decodes with sparse and with dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.cli._cases import BadUsage, backend_option, usage_errors, use_device
from flashllm.cli._parallel import RANK_STATUS, tensor_parallel, tensor_parallel_option

if TYPE_CHECKING:
    from flashllm.bench.decode_rows import DecodeRow

_MAX_SPARSITY = 0.99


def _list_models(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from flashllm.models.config import model_config
    from flashllm.models.known import CONFIGS

    for name, given in CONFIGS.items():
        config = model_config(given)
        click.echo(f"{name:<15} {config.layers:>3} blocks  {config.hidden:>6} hidden  {config.positions:>7} positions")
    context.exit()


@click.command(epilog=f"Exit status: 0 fine, 2 bad usage, or all cases are left out, 130 interrupted. {RANK_STATUS}")
@click.option(
    "--model",
    default="opt-30b",
    show_default=True,
    metavar="NAME",
    help="Model whose shapes to take; --list-models names them.",
)
@click.option(
    "--list-models",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_models,
    help="List the known models.",
)
@click.option(
    "--sparsity",
    default="0.8",
    show_default=True,
    metavar="FRACTIONS",
    help="Fractions of zeros of the sparse weights.",
)
@click.option(
    "--systems",
    default="sparse,dense",
    show_default=True,
    metavar="NAMES",
    help="What to measure, of sparse, dense, torch-compile, hf-static, torch-2:4.",
)
@click.option(
    "--format", "format_name", default="auto", show_default=True, metavar="NAME", help="Format of the sparse weights."
)
@click.option("--batch", default="8,16,32,64", show_default=True, metavar="SIZES", help="Batch sizes, comma-separated.")
@click.option(
    "--prompt", type=click.IntRange(1), default=64, show_default=True, help="Length of each prompt in tokens."
)
@click.option(
    "--output", type=click.IntRange(2), default=512, show_default=True, help="Tokens to generate after each prompt."
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Run only this many of the model's blocks, for a quick look.")
@tensor_parallel_option
@backend_option
@click.option("--device", type=click.IntRange(0), metavar="INDEX", help="Which GPU.  [default: the current one]")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Append rows to this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON Lines.")
def command(
    model: str,
    sparsity: str,
    systems: str,
    format_name: str,
    batch: str,
    prompt: int,
    output: int,
    dtype: str,
    layers: int | None,
    tp: int,
    backend: str | None,
    device: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast a model decodes with sparse and with dense weights, all else equal.

    Weights are random, generated on the GPU in the model's shapes: speed depends only on the shapes and the zeros. Each
    case prefills all prompts at once and decodes greedily, replaying a captured graph for each step. The GPU memory of
    a case is computed first; a case that does not fit is left out, and the sum is shown. Without a GPU the emulator
    runs the case and reports no times, which takes hours for any of these models.

    Other decoders, which pip install "flashllm[finetune]" provides, run on one GPU. torch-compile: a PyTorch loop with
    a static cache and the same dense weights, whose step is compiled into one CUDA graph. torch-2:4: the same with 2:4
    matrices, in fp16. hf-static: generate() of the package transformers with a static cache. They compile anew for each
    batch size, which takes long for many blocks; cases that one of them cannot run are left out, with the reason.
    """
    from rich.console import Console

    from flashllm.cli._progress import progress

    count = 0
    with usage_errors(), tensor_parallel(tp) as group:
        from flashllm.bench import decode_rows, results
        from flashllm.bench.decode_session import Sweep
        from flashllm.decoder.attention import MAX_ROWS
        from flashllm.registry import FORMATS

        notes = Console(stderr=True)
        if group.count > 1 and device is not None:
            raise BadUsage("--device: expected nothing where several ranks take the GPUs in order")
        use_device(device)
        if format_name not in ("auto", *FORMATS):
            raise BadUsage(f"--format: expected auto or one of {', '.join(FORMATS)}, got {format_name!r}")
        sweep = Sweep(
            model=model,
            sparsities=_numbers(sparsity, "--sparsity", 0.0, _MAX_SPARSITY),
            systems=_names(systems),
            format=format_name,
            batches=[int(size) for size in _numbers(batch, "--batch", 1, MAX_ROWS, whole=True)],
            prompt=prompt,
            output=output,
            dtype="bf16" if dtype == "bf16" else "fp16",
            layers=layers,
            backend=backend,
            group=group,
        )
        facts: dict[str, object] = {
            "--model": model, "--sparsity": sparsity, "--systems": systems, "--format": format_name, "--batch": batch,
            "--prompt": prompt, "--output": output, "--dtype": dtype, "--layers": layers,
        }  # fmt: skip
        group.rendezvous.agree(facts)
        saved = out if group.rank == 0 else None
        if saved is not None:
            results.ensure_rows(saved)

        def note(text: str) -> None:
            notes.print(text, soft_wrap=True, markup=False, highlight=False)

        with progress(notes, sweep.steps) as advance:
            for row in sweep.rows(advance=advance, note=note):
                count += 1
                if saved is not None:
                    decode_rows.append(saved, row)
                click.echo(row.to_json() if as_json else _line(row))
        if not count:
            raise BadUsage("all cases are left out")


def _line(row: DecodeRow) -> str:
    whats = {"flashllm": f"{row.sparsity:.0%} zeros, {row.format}", "flashllm-dense": "dense"}
    what = whats.get(row.system, row.system)
    head = f"{row.model}, {what}, batch {row.batch}: {row.weights_gb:.1f} GB of weights, {row.kv_gb:.1f} GB cache"
    if row.tokens_per_gpu_s is None:
        return f"{head}; no times without a GPU"
    line = (
        f"{head}, {row.peak_gb:.1f} GB in all; {row.tokens_per_gpu_s:.0f} tokens/GPU-s, TTFT {row.ttft_ms:.0f} ms, "
        f"TPOT {row.tpot_ms:.2f} ms"
    )
    if row.step_ms is None:
        return line
    parts = f"matrices {row.linear_ms:.2f}, attention {row.attention_ms:.2f}, sums {row.comm_ms:.2f}"
    line += f"; a step {row.step_ms:.2f} ms ({parts}, other {row.other_ms:.2f})"
    return f"{line}, {row.bound_fraction:.0%} of the bound"


def _names(text: str) -> tuple[str, ...]:
    from flashllm.bench.decode import SYSTEMS

    found = tuple(name.strip() for name in text.split(","))
    if any(name not in SYSTEMS for name in found):
        raise BadUsage(f"--systems: expected some of {', '.join(SYSTEMS)}, got {text!r}")
    return found


def _numbers(text: str, option: str, least: float, most: float, *, whole: bool = False) -> tuple[float, ...]:
    try:
        found = tuple(int(part) if whole else float(part) for part in text.split(","))
    except ValueError:
        raise BadUsage(f"{option}: expected numbers with commas, got {text!r}") from None
    if any(not least <= number <= most for number in found):
        raise BadUsage(f"{option}: expected numbers in {least}..{most}, got {text!r}")
    return found
