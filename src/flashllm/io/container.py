# SPDX-License-Identifier: Apache-2.0
"""Files of sparse weights: safetensors with a versioned ``__metadata__``.

``__metadata__`` holds ``format`` = "flashllm-weights", ``version`` = "1" and ``weights``, a JSON object
that gives for each weight its format, the version of that, and its scalar fields. Buffer B of weight W is
the tensor ``W.B``. Other tensors (biases, norms) may stand beside them and are left alone. Any safetensors
reader can open the file; nothing in it can execute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.formats.check import is_int
from flashllm.formats.weight import SparseWeight
from flashllm.io.safetensors_file import Header, TensorFile, parse_json, write_file
from flashllm.registry import FORMATS, weight_class

CONTAINER_FORMAT = "flashllm-weights"
CONTAINER_VERSION = "1"


def save_weights(path: str | Path, weights: Mapping[str, SparseWeight]) -> None:
    """Write weights to ``path`` atomically: a crash leaves the old file or the new one, never a part.

    Device weights are copied to the host first. Raises ``ArgumentError`` for no weight, a name that is
    empty or a weight of an unknown format.
    """
    if not weights:
        raise ArgumentError("weights", expected="at least one weight", got="none")
    tensors: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name, weight in weights.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError("weights", expected="names that are non-empty strings", got=repr(name))
        if not isinstance(weight, SparseWeight) or weight.format not in FORMATS:
            raise ArgumentError(f"weights[{name!r}]", expected="a SparseWeight", got=type(weight).__name__)
        described[name] = {"format": weight.format, "version": weight.VERSION, **weight.metadata()}
        for buffer, array in weight.to_host().arrays().items():
            key = f"{name}.{buffer}"
            if key in tensors:
                raise ArgumentError("weights", expected="names that give distinct buffers", got=f"{key!r} twice")
            tensors[key] = array
    metadata = {
        "format": CONTAINER_FORMAT,
        "version": CONTAINER_VERSION,
        "weights": json.dumps(described, separators=(",", ":")),
    }
    write_file(path, tensors, metadata)


def load_weights(path: str | Path, *, validate: bool = True, mmap: bool = False) -> dict[str, SparseWeight]:
    """All weights of a file, by name.

    Every weight is validated unless ``validate=False`` (only for files written by yourself: kernels
    trust the content). ``mmap`` maps the buffers read-only instead of copying them; writing into the file
    then changes them after they were validated, replacing the file (as ``save_weights`` does) leaves them
    alone. Raises ``FormatError`` that names file and field.
    """
    with TensorFile(path) as file:
        described = _describe(file.header)
        return {name: _build(file, name, described[name], validate=validate, mmap=mmap) for name in described}


def load_weight(
    path: str | Path, *, name: str | None = None, validate: bool = True, mmap: bool = False
) -> SparseWeight:
    """One weight of a file; ``name`` may be left out when it holds one. Options as in ``load_weights``."""
    with TensorFile(path) as file:
        described = _describe(file.header)
        if name is None:
            if len(described) != 1:
                raise ArgumentError("name", expected=f"one of {_listed(described)}", got="None")
            name = next(iter(described))
        if name not in described:
            raise ArgumentError("name", expected=f"one of {_listed(described)}", got=repr(name))
        return _build(file, name, described[name], validate=validate, mmap=mmap)


def _listed(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(map(repr, ordered[:20])) + more


def _describe(header: Header) -> dict[str, dict[str, Any]]:
    """The checked ``weights`` entry of the metadata."""
    for field, expected in (("format", CONTAINER_FORMAT), ("version", CONTAINER_VERSION)):
        got = header.metadata.get(field)
        if got != expected:
            raise FormatError(field=f"__metadata__.{field}", expected=repr(expected), got=brief(got), path=header.path)
    field = "__metadata__.weights"
    described = parse_json(header.metadata.get("weights", "null"), field=field, path=header.path)
    for name, fields in described.items():
        if not isinstance(fields, dict):
            raise FormatError(
                field=field, expected="a JSON object of objects", got=f"{type(fields).__name__} for {brief(name)}",
                path=header.path,
            )  # fmt: skip
    return described


def _build(file: TensorFile, name: str, fields: dict[str, Any], *, validate: bool, mmap: bool) -> SparseWeight:
    header = file.header
    kind = fields.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise FormatError(
            field=f"{name}.format", expected=f"one of {', '.join(FORMATS)}", got=brief(kind), path=header.path
        )
    # Only entries that are this weight's buffers; a weight "a" beside a weight "a.b" must not take the
    # other's.
    prefix = name + "."
    made = weight_class(kind)
    version = fields.get("version", 1)  # older files do not say it
    if not is_int(version) or version != made.VERSION:
        expected = f"{made.VERSION}, the version of {kind} that this package reads: encode the matrix again"
        raise FormatError(field=f"{name}.version", expected=expected, got=brief(version), path=header.path)
    buffers = made.BUFFERS
    missing = [b for b in buffers if prefix + b not in header.tensors]
    if missing:
        raise FormatError(field=prefix + missing[0], expected="a tensor", got="none", path=header.path)
    arrays = {b: file.read(header.tensors[prefix + b], mmap=mmap) for b in buffers}
    weight = made.from_parts(fields, arrays, path=header.path)
    if validate:
        weight.validate(path=header.path)
    return weight
