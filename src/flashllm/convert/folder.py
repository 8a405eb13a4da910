# SPDX-License-Identifier: Apache-2.0
"""The directory of a conversion: who may write into it, what of an earlier run stays, what is written last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from flashllm.convert.plan import FilePlan
from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import locked, open_regular
from flashllm.io.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    NOTE,
    Identity,
    Manifest,
    Part,
    parse_part,
    read_json,
)
from flashllm.io.safetensors_file import read_header, replacing


@contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """Make ``directory`` if it is not there, and hold its lock: two conversions into it come one after the other.

    Raises ``ArgumentError`` for something else than a directory, ``OSError``.
    """
    if directory.exists() and not directory.is_dir():
        raise ArgumentError("out", expected="a directory, or nothing yet", got=f"a file at {str(directory)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        with locked(handle):
            yield directory
    finally:
        os.close(handle)


def prepare(
    directory: Path, checkpoint: Checkpoint, identity: Identity, plans: Sequence[FilePlan], *, resume: bool
) -> dict[str, Part]:
    """Write what stands beside the tensors; the parts of the files that are whole already, by file name.

    Raises ``ArgumentError`` for a directory that is not empty without ``resume``, and with it for one that holds
    something else than this conversion makes; ``FormatError`` for a damaged file.
    """
    companions = checkpoint.companions()
    config = json.dumps(dict(checkpoint.config), indent=2) + "\n"
    there = {entry.name for entry in directory.iterdir()}
    if there and not resume:
        raise ArgumentError(
            "out", expected="a new or empty directory, or --resume to go on", got=f"{str(directory)!r} with files"
        )
    ours = {CONFIG_FILE, MANIFEST_FILE, *companions, *(plan.file for plan in plans)}
    torn = {name for name in there if name.startswith(".") and name.endswith(".tmp") and _stem(name) in ours}
    if foreign := sorted(there - ours - torn):
        raise ArgumentError(
            "out", expected="files of the same conversion and no others", got=f"{brief(foreign[0])} in {directory}"
        )
    if CONFIG_FILE in there and read_json(directory / CONFIG_FILE) != json.loads(config):
        raise ArgumentError("out", expected=f"the {CONFIG_FILE} of the same model", got=f"another in {directory}")
    parts = {plan.file: _kept(directory / plan.file, plan, identity) for plan in plans if plan.file in there}
    for name in torn:
        (directory / name).unlink(missing_ok=True)  # of a run that was killed: nobody else writes, we hold the lock
    write_beside(directory, config, checkpoint)
    return parts


def write_beside(directory: Path, config: str, checkpoint: Checkpoint) -> None:
    """Write ``config.json`` and copy the companions of the checkpoint, each whole or not at all."""
    for name, path in checkpoint.companions().items():
        copy_file(path, directory / name)
    write_text(directory / CONFIG_FILE, config)


def finish(directory: Path, manifest: Manifest) -> None:
    """Write the manifest: the directory is whole."""
    write_text(directory / MANIFEST_FILE, json.dumps(manifest.as_json(), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Put a file with ``text`` in place of ``path``: whole, or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file; ``target`` appears whole. Raises ``FormatError`` for something else, ``OSError``."""
    with open_regular(source) as read, replacing(target) as written:
        shutil.copyfileobj(read, written)


def _stem(name: str) -> str:
    """Of the name that a file has while it is written: ``.NAME.PROCESS-RANDOM.tmp``."""
    return name[1:].rpartition(".tmp")[0].rpartition(".")[0]


def _kept(path: Path, plan: FilePlan, identity: Identity) -> Part:
    header = read_header(path)
    text = header.metadata.get(NOTE)
    if text is None:
        raise FormatError(field=f"__metadata__.{NOTE}", expected="an entry", got="none", path=str(path))
    found, part = parse_part(text, file=plan.file, path=str(path))
    if found != identity:
        raise ArgumentError(
            "out", expected="files of the same conversion", got=f"{path} of another: {_difference(found, identity)}"
        )
    listed = [*(one.name for one in part.weights), *(one.name for one in part.tensors)]
    if listed != [one.name for one in (*plan.matrices, *plan.tensors)]:
        raise FormatError(
            field=f"__metadata__.{NOTE}", expected="the tensors of this block", got=brief(listed), path=str(path)
        )
    return part


def _difference(found: Identity, wanted: Identity) -> str:
    """The first entry in which they differ."""
    one, other = asdict(found), asdict(wanted)
    pairs = [("flashllm", one["flashllm"], other["flashllm"])]
    for group in ("options", "source"):
        pairs += [(key, one[group][key], other[group][key]) for key in one[group]]
    name, was, is_now = next((name, was, now) for name, was, now in pairs if was != now)
    return f"{name} {brief(was)}, now {brief(is_now)}"
