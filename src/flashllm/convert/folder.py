# SPDX-License-Identifier: Apache-2.0
"""The directory of a conversion: what of an earlier run stays, what is written last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flashllm.convert.plan import FilePlan
from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import torn_files, write_text
from flashllm.io.hf_directory import CONFIG_NAME, MAX_CONFIG_BYTES
from flashllm.io.manifest import (
    MANIFEST_FILE,
    NOTE,
    Identity,
    Manifest,
    Part,
    parse_part,
)
from flashllm.io.safetensors_file import read_header, read_json
from flashllm.models.directory import companion_names, config_text, write_companions, write_config


def prepare(
    directory: Path, checkpoint: Checkpoint, identity: Identity, plans: Sequence[FilePlan], *, resume: bool
) -> dict[str, Part]:
    """Write the files beside the tensors; returns the parts of the files that are already whole, by file name.

    Raises ``ArgumentError`` for a directory that is not empty without ``resume``, and with ``resume`` for one that
    holds anything that this conversion does not make; ``FormatError`` for a damaged file.
    """
    there = {entry.name for entry in directory.iterdir()}
    if there and not resume:
        raise ArgumentError(
            "out", expected="a new or empty directory, or --resume to go on", got=f"{str(directory)!r} with files"
        )
    ours = {CONFIG_NAME, MANIFEST_FILE, *companion_names(checkpoint), *(plan.file for plan in plans)}
    torn = {file.name for file in torn_files(directory, ours)}
    if foreign := sorted(there - ours - torn):
        raise ArgumentError(
            "out", expected="files of the same conversion and no others", got=f"{brief(foreign[0])} in {directory}"
        )
    config = json.loads(config_text(checkpoint.config))
    if CONFIG_NAME in there and read_json(directory / CONFIG_NAME, most_bytes=MAX_CONFIG_BYTES) != config:
        raise ArgumentError("out", expected=f"the {CONFIG_NAME} of the same model", got=f"another in {directory}")
    parts = {plan.file: _kept(directory / plan.file, plan, identity) for plan in plans if plan.file in there}
    for name in torn:
        (directory / name).unlink(missing_ok=True)  # of a run that was killed: we hold the lock, so nobody else writes
    write_companions(checkpoint, directory)
    write_config(directory, checkpoint.config)
    return parts


def finish(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which marks the directory as complete."""
    write_text(directory / MANIFEST_FILE, json.dumps(manifest.as_json(), indent=1) + "\n")


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
