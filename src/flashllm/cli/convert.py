# SPDX-License-Identifier: Apache-2.0
"""Convert a pruned checkpoint to a directory of sparse weights, or such a directory back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.cli._cases import usage_errors
from flashllm.cli._models import refuse_options, refuse_packed
from flashllm.registry import FORMATS
from flashllm.statuses import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from flashllm.convert.run import Conversion

_OPTIONS = ("format", "n", "dtype", "no_fuse", "gpu", "device", "resume")
"""Options of a conversion to sparse weights that --to hf does not use."""


@click.command(
    epilog="Exit status: 0 done, 2 bad usage, or a checkpoint or directory that cannot be converted, 130 interrupted."
)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Directory to write, new or empty.",
)
@click.option(
    "--to",
    type=click.Choice(["sparse", "hf"]),
    default="sparse",
    show_default=True,
    help="hf: MODEL is a directory of sparse weights, OUT becomes a dense checkpoint of Hugging Face.",
)
@click.option(
    "--format",
    type=click.Choice(["auto", *FORMATS, "dense"]),
    default="auto",
    show_default=True,
    help="auto: for each matrix the one that suits it, by docs/auto.md, or dense where that is faster or smaller.",
)
@click.option("--n", default="8,16,32", show_default=True, metavar="SIZES", help="Batch sizes N that auto chooses for.")
@click.option("--gpu", metavar="NAME", help="GPU that auto chooses for.  [default: the current one, else H100 80GB]")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "fp16", "bf16"]),
    default="keep",
    show_default=True,
    help="keep: 16-bit tensors stay as they are, wider ones become fp16.",
)
@click.option("--no-fuse", is_flag=True, help="Keep q, k and v, and gate and up, as separate matrices.")
@click.option(
    "--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Where to encode."
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Keep the blocks that an earlier run has finished.")
def command(
    model: Path,
    out: Path,
    to: str,
    format: str,
    n: str,
    gpu: str | None,
    dtype: str,
    no_fuse: bool,
    device: str,
    resume: bool,
) -> None:
    """Convert a pruned checkpoint to a directory of sparse weights, or such a directory back.

    MODEL is a Hugging Face directory with safetensors, or a .gguf file; its zeros are what was pruned, by whatever
    tool. OUT receives one file for each block, and flashllm.json, which `flashllm inspect OUT` shows.
    """
    from rich.console import Console

    notes = Console(stderr=True, highlight=False)
    with usage_errors():
        if to == "hf":
            refuse_options(_OPTIONS, "with --to hf")
            _to_hugging_face(model, out, notes)
            return
        if format != "auto":
            refuse_options(("n", "gpu"), f"with --format {format}: auto chooses by it")
        refuse_packed(model)
        from flashllm.bench.cases import parse_batches
        from flashllm.cli._progress import progress
        from flashllm.convert.run import convert
        from flashllm.gpus import find_gpu
        from flashllm.io.checkpoint import open_checkpoint

        batches = parse_batches(n)
        target = None if gpu is None else find_gpu(gpu)
        with open_checkpoint(model) as checkpoint:
            layers = checkpoint.config.get("num_hidden_layers")
            total = (layers if isinstance(layers, int) else 0) + 1
            try:
                with usage_errors(MemoryError), progress(notes, total) as advance:
                    made = convert(
                        checkpoint,
                        out,
                        format=format,
                        n=batches,
                        dtype=dtype,
                        fuse=not no_fuse,
                        gpu=target,
                        device=device,
                        resume=resume,
                        progress=advance,
                    )
            except KeyboardInterrupt:
                click.echo("interrupted; the same command with --resume goes on", err=True)
                raise SystemExit(INTERRUPTED) from None
    for line in _summary(made, out):
        click.echo(line)


def _to_hugging_face(model: Path, out: Path, notes: Console) -> None:
    from flashllm.cli._progress import progress
    from flashllm.convert.back import shard_count, to_hugging_face

    with progress(notes, shard_count(model)) as advance:
        files = to_hugging_face(model, out, progress=advance)
    total = sum(file.stat().st_size for file in files)
    click.echo(f"{out}: {len(files)} file{'s' * (len(files) > 1)} of tensors, {total / 1e6:,.2f} MB")


def _summary(made: Conversion, out: Path) -> list[str]:
    manifest, seconds = made.manifest, made.seconds
    totals = manifest.totals()
    kinds = [weight.format for weight in manifest.weights.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    share = 100 * totals["bytes_stored"] / totals["bytes_dense"]
    lines = [
        f"{out}: {len(manifest.parts) - 1} blocks, {totals['weights']} matrices: {counts}",
        f"matrices: {100 * totals['sparsity']:.2f} % zeros, {totals['bytes_stored'] / 1e6:,.2f} MB, "
        f"{share:.1f} % of dense; other tensors: {totals['other_bytes'] / 1e6:,.2f} MB",
    ]
    if totals["changed"]:
        lines.append(f"{totals['changed']:,} values changed by rounding")
    if made.kept_files:
        lines.append(f"{made.kept_files} of {len(manifest.parts)} files were there already")
    if seconds.encoding_gbps is not None and seconds.whole_gbps is not None:
        lines.append(
            f"{seconds.matrix_bytes / 1e6:,.2f} MB of dense matrices: encoded at {seconds.encoding_gbps:.3f} GB/s "
            f"({seconds.encoding:.1f} s), with choosing ({seconds.choosing:.1f} s) and writing "
            f"{seconds.whole_gbps:.3f} GB/s ({seconds.whole:.1f} s)"
        )
    return lines
