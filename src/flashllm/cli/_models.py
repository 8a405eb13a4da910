# SPDX-License-Identifier: Apache-2.0
"""What the commands for whole models share: options, and the rejection of options that would have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from flashllm.cli._cases import BadUsage

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto: on the GPU where there is one.",
)
part_option = click.option(
    "--part",
    default="0:1",
    show_default=True,
    metavar="FROM:TO",
    help="Part of the text, as fractions: 0:0.5 is its first half.",
)
length_option = click.option(
    "--length", type=click.IntRange(2), default=512, show_default=True, help="Length of a window in tokens."
)


def array_module(device: str) -> Any:
    """NumPy or CuPy, as option ``--device`` says. Raises :class:`BadUsage` for a GPU that is not there."""
    import numpy

    from flashllm.device import gpu_problem

    problem = gpu_problem() if device != "cpu" else ""
    if problem is None:
        import cupy

        return cupy
    if device == "gpu":
        raise BadUsage(f"--device gpu: {problem}")
    return numpy


def given_options(names: Iterable[str]) -> list[str]:
    """Which of these parameters were given on the command line, by their option names: ``["--to"]``."""
    context = click.get_current_context()
    found = [name for name in names if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    return [next(one.opts[0] for one in context.command.params if one.name == name) for name in found]


def refuse_options(names: Iterable[str], beside: str) -> None:
    """Raise :class:`BadUsage` if one of these parameters was given: it has no effect ``beside`` ("with --to hf")."""
    for option in given_options(names):
        raise BadUsage(f"{option}: expected nothing {beside}")


def refuse_packed(model: Path) -> None:
    """Raise :class:`BadUsage` for a directory of sparse weights, where a checkpoint is expected."""
    from flashllm.io.sparse_model import is_sparse_model

    if is_sparse_model(model):
        raise BadUsage(
            f"MODEL: expected a checkpoint, got sparse weights in {model}; `flashllm convert --to hf` turns them back"
        )


def parse_part(text: str) -> tuple[float, float]:
    """``"0:0.5"`` -> (0.0, 0.5). Raises :class:`BadUsage`."""
    first, _, last = text.partition(":")
    try:
        part = (float(first), float(last))
    except ValueError:
        raise BadUsage(f"--part: expected two fractions such as 0:0.5, got {text!r}") from None
    if not 0.0 <= part[0] < part[1] <= 1.0:
        raise BadUsage(f"--part: expected fractions a < b in 0..1, got {text!r}")
    return part
