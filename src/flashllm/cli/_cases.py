# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options that choose cases, and errors that exit with status 2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from flashllm.errors import USAGE_ERRORS
from flashllm.registry import FORMATS
from flashllm.statuses import BAD_USAGE


class BadUsage(click.ClickException):
    """A request that cannot be fulfilled: one line, exit status 2."""

    exit_code = BAD_USAGE


@contextmanager
def usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of ``kinds`` (default: ``USAGE_ERRORS``) into :class:`BadUsage`.

    A pipe that its reader has closed, as ``head`` does, is no error of usage: click ends the command silently.
    """
    caught: tuple[type[Exception], ...] = kinds or USAGE_ERRORS
    try:
        yield
    except BrokenPipeError:
        raise
    except caught as error:
        raise BadUsage(str(error)) from error


def refuse_same_file(option: str, path: Path, others: Mapping[str, Path | None]) -> None:
    """Raise :class:`BadUsage` if ``path``, which ``option`` replaces, is also one of ``others``, by their names."""
    for name, other in others.items():
        if other is not None and path.resolve() == other.resolve():
            raise BadUsage(f"{option}: expected another file than {name}, got '{path}' for both")


def use_device(device: int | None) -> None:
    """Make GPU ``device`` the current one; ``None`` leaves it as it is. Raises :class:`BadUsage` if it is not there."""
    if device is None:
        return
    from flashllm.device import device_count

    count, problem = device_count()
    if problem is not None:
        raise BadUsage(f"--device: expected the number of a GPU, got {device}, but {problem}")
    if device >= count:
        raise BadUsage(f"--device: expected a GPU from 0 to {count - 1}, got {device}")
    import cupy

    cupy.cuda.Device(device).use()


backend_option = click.option(
    "--backend",
    type=click.Choice(["cuda", "emulator", "reference"]),
    help="Default: cuda where there is a GPU, else the CPU emulator where there is g++, else NumPy.",
)

format_option = click.option(
    "--format",
    "formats",
    metavar="NAMES",
    help=f"Formats to pack the weights in, comma-separated: {', '.join(FORMATS)}; auto: the command chooses.  "
    "[default: auto, or that of a packed FILE]",
)


class ToRead(click.Path):
    """A path that must exist; a missing one is reported in one line."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Raises :class:`BadUsage` if nothing exists at the path."""
        path = super().convert(value, param, ctx)
        if param is not None and not Path(os.fsdecode(path)).exists():
            name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.strip("[].")
            raise BadUsage(f"{name}: expected a file, found none at '{os.fsdecode(path)}'")
        return path


READ_FILE = ToRead(path_type=Path, dir_okay=False)
"""Type of options and arguments that name a file to read."""

_CASE_OPTIONS = (
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="NAMES",
        help="Models, comma-separated; `flashllm bench --list-models` names them.",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="MxK",
        help="Weight shapes, e.g. 28672x8192; repeatable or comma-separated.",
    ),
    click.option("--weights", type=READ_FILE, metavar="FILE", help="A matrix from .npz (SciPy), .npy or .safetensors."),
    click.option("--tensor", metavar="NAME", help="Which tensor of FILE."),
    click.option(
        "--sparsity", metavar="FRACTIONS", help="Fractions of zeros, comma-separated.  [default: 0.7,0.8,0.9]"
    ),
    click.option("--n", "n", metavar="SIZES", help="Batch sizes N, comma-separated.  [default: 8,16,32]"),
    click.option("--dtype", metavar="TYPE", help="fp16 or bf16.  [default: fp16]"),
    click.option(
        "--pattern",
        metavar="NAME",
        help="Where the zeros are: uniform, row-equal, per-row, skewed, columns, block.  [default: uniform]",
    ),
    format_option,
    click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="Seed of the random weights.",
    ),
    click.option(
        "--device",
        type=click.IntRange(0),
        default=None,
        metavar="INDEX",
        help="Which GPU.  [default: the current one]",
    ),
)


def case_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to measure."""
    for option in reversed(_CASE_OPTIONS):
        function = option(function)
    return function
