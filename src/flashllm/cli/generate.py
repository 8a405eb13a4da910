# SPDX-License-Identifier: Apache-2.0
"""Continue prompts with a model, sparse or dense."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.cli._parallel import RANK_STATUS, tensor_parallel, tensor_parallel_option

if TYPE_CHECKING:
    from flashllm.engine.generate import Generation, Report
    from flashllm.formats.base import DType

_MOST_BYTES = 1 << 28
_HEADING = 60  # characters of a prompt


@click.command(
    epilog=f"Exit status: 0 fine, 1 a failure, 2 bad usage or an unreadable file, 130 interrupted. {RANK_STATUS}"
)
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option("--prompt", "given", multiple=True, metavar="TEXT", help="What to continue; may be given several times.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Prompts, one per line."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="How many tokens to add to each prompt at most.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the likeliest token.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Sample from the K likeliest tokens; 0: from all.",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that hold this share of the probability.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the first prompt; each further prompt adds 1.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cuda", "emulator", "reference"]),
    default="auto",
    show_default=True,
    help="auto: a GPU, or without one the emulator. reference: packed matrices by NumPy, the rest emulated.",
)
@click.option("--dense", is_flag=True, help="Expand packed matrices to dense ones first, for comparison.")
@click.option(
    "--dtype", type=click.Choice(["fp16", "bf16"]), help="Type of weights and activations.  [default: as stored]"
)
@click.option("--no-stop", is_flag=True, help="Continue past tokens that end a text.")
@click.option("--raw-tokens", is_flag=True, help="Read and print token numbers instead of text: needs no tokenizer.")
@tensor_parallel_option
@click.option("--json", "as_json", is_flag=True, help="Print texts, tokens and times as one line of JSON.")
def command(
    model: Path,
    given: tuple[str, ...],
    file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    backend: str,
    dense: bool,
    dtype: str | None,
    no_stop: bool,
    raw_tokens: bool,
    tp: int,
    as_json: bool,
) -> None:
    """Continue prompts with a model.

    MODEL is a directory that `flashllm convert` wrote, whose packed matrices are multiplied in packed form, a Hugging
    Face directory with safetensors, or a GGUF file. The continuation of a single prompt is printed as it is generated.
    Several prompts are continued together, and their texts printed one after another at the end. Times go to stderr.
    Without a GPU the emulator runs the same kernels on the CPU, which suits only tiny models.
    """
    from rich.console import Console

    with usage_errors(), tensor_parallel(tp) as group:
        from flashllm.backends import select
        from flashllm.cli._progress import progress
        from flashllm.engine.generate import ModelFiles, check_prompts, generate_text
        from flashllm.engine.runtime import open_runtime
        from flashllm.engine.sampling import SamplingOptions

        notes = Console(stderr=True, highlight=False)

        def read_prompts() -> tuple[list[str], list[dict[str, Any]]]:
            found = _prompts(given, file)
            each = [
                SamplingOptions(
                    temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + index, max_new_tokens=max_new_tokens
                )
                for index in range(len(found))
            ]
            return found, [asdict(one) for one in each]

        # All ranks compute what rank 0 was asked to: FILE need not exist for the others.
        texts, sampling = group.of_rank_0(read_prompts, name="--prompts")
        options = [SamplingOptions(**one) for one in sampling]
        with ModelFiles(model, dtype=cast("DType | None", dtype), dense=dense) as files:

            def encode_prompts() -> tuple[list[list[int]], tuple[int, ...]]:
                found = [_numbers(text) if raw_tokens else files.text.encode(text) for text in texts]
                check_prompts(files.config, found, options)
                return found, () if no_stop else files.text.stop_tokens

            prompts, stops = group.of_rank_0(encode_prompts, name="--prompts")
            group.shard.check(files.config)
            selected = select(backend)
            if group.count > 1:
                if selected.name != "cuda":
                    raise BadUsage(f"--backend {backend}: expected cuda for several ranks")
                facts = {"model": files.fingerprint, "--dtype": dtype, "--dense": dense}
                group.rendezvous.agree(facts, called={"model": f"another checkpoint at {model}"})
            runtime = open_runtime(backend)
            if selected.name != "cuda":
                note = f"kernels emulated on this CPU ({selected.reason}), which is slow: for tiny models"
                notes.print(note, soft_wrap=True, markup=False)
            with usage_errors(MemoryError), progress(notes, files.config.layers) as advance:
                loaded = files.load(runtime, shard=group.shard, advance=advance)
        with usage_errors(MemoryError):
            generation = generate_text(loaded, prompts, options, stop_tokens=stops, communicator=group.communicator)
        try:
            if as_json:
                click.echo(json.dumps(_result(model, generation)))
            elif len(prompts) == 1:
                _stream(generation, raw=raw_tokens)
            else:
                _print_all(generation, texts, raw=raw_tokens)
        finally:
            runtime.close()
        notes.print(_summary(generation.report), soft_wrap=True)


def _prompts(given: tuple[str, ...], file: Path | None) -> list[str]:
    """The prompts of the options, then the lines of the file that are not empty."""
    from flashllm.io.files import read_utf8

    try:
        lines = "" if file is None else read_utf8(file, most_bytes=_MOST_BYTES).replace("\r\n", "\n")
    except FileNotFoundError:  # reported here and not by click: other machines of a group need not have the file
        raise BadUsage(f"--prompts: expected a file, found none at '{file}'") from None
    found = [*given, *filter(None, lines.split("\n"))]
    if not found:
        raise BadUsage("--prompt: expected at least one, or some in the file of --prompts, got none")
    return found


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise BadUsage(f"--prompt: expected numbers of tokens with --raw-tokens, got {text!r}") from None


def _stream(generation: Generation, *, raw: bool) -> None:
    for piece in generation:
        if not raw:
            click.echo(piece.text, nl=False)
        elif piece.token is not None:
            click.echo(f"{piece.token} ", nl=False)
    click.echo()


def _print_all(generation: Generation, texts: list[str], *, raw: bool) -> None:
    for _ in generation:
        pass
    for index, prompt in enumerate(texts):
        one_line = " ".join(prompt.split())
        shown = one_line if len(one_line) <= _HEADING else one_line[:_HEADING] + "..."
        click.echo(f"{'' if index == 0 else chr(10)}== {index + 1}: {shown} ==")
        click.echo(" ".join(map(str, generation.tokens[index])) if raw else generation.texts[index])


def _result(model: Path, generation: Generation) -> dict[str, Any]:
    for _ in generation:
        pass
    report = generation.report
    return {
        "model": str(model),
        "sequences": [
            {
                "prompt_tokens": prompt,
                "tokens": generation.tokens[index],
                "text": generation.texts[index],
                "stopped": generation.stopped(index),
            }
            for index, prompt in enumerate(generation.prompts)
        ],
        "first_token_seconds": report.first_token_seconds,
        "token_seconds": report.token_seconds,
        "seconds": report.seconds,
        "tokens_per_second": report.tokens_per_second,
    }


def _summary(report: Report) -> str:
    behind = "" if report.token_seconds is None else f", then {1e3 * report.token_seconds:.2f} ms per token"
    return (
        f"{sum(report.prompt_tokens):,} tokens read, first new one after {report.first_token_seconds:.2f} s{behind}; "
        f"{sum(report.new_tokens):,} new tokens in {report.seconds:.2f} s, {report.tokens_per_second:.1f} per second"
    )
