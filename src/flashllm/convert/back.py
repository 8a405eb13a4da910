# SPDX-License-Identifier: Apache-2.0
"""Converts sparse weights back to a Hugging Face directory: dense, with one tensor for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.formats.check import is_int
from flashllm.formats.weight import SparseWeight
from flashllm.io.files import claimed, copy_file, make_empty
from flashllm.io.hf_directory import SINGLE_NAME
from flashllm.io.manifest import Manifest, Member, rows_of
from flashllm.io.safetensors_file import LAYOUT_NAMES
from flashllm.io.sparse_model import SparseModel
from flashllm.io.tensor_writer import TensorWriter, write_checkpoint_index
from flashllm.models.directory import with_type, write_config
from flashllm.progress import Advance, ignore

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file, as in Hugging Face's own writer."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A matrix or another tensor, and the tensors of the checkpoint that it becomes."""

    name: str
    members: tuple[Member, ...]
    shape: tuple[int, ...]
    dtype: DType
    is_matrix: bool

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)


def to_hugging_face(
    directory: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES, progress: Advance = ignore
) -> tuple[Path, ...]:
    """Write the sparse weights in ``directory`` as a Hugging Face checkpoint; returns its files of tensors.

    Every value that was kept has the bits it had; a pruned one is +0.0, even where it was -0.0. Fused layers are
    separate again. ``config.json`` is that of the source, with the type that the matrices have now. ``out`` must be new
    or empty; ``config.json``, without which no reader takes it for a checkpoint, is written last. A file has at most
    ``shard_bytes`` of tensors, or a single stored tensor. Takes memory for the largest matrix, dense and sparse. Raises
    ``ArgumentError``, ``FormatError`` for damaged files, and ``OSError``.
    """
    if not is_int(shard_bytes) or shard_bytes < 1:
        raise ArgumentError("shard_bytes", expected="a positive integer", got=repr(shard_bytes))
    model = SparseModel(directory)
    shards = _shards(model.manifest, shard_bytes)
    with claimed(Path(out)) as target:
        make_empty(target)
        for name, path in model.companions().items():
            copy_file(path, target / name)
        names = []
        for number, shard in enumerate(shards, 1):
            name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            progress(name, 0)
            _write(model, target / name, shard)
            names.append(name)
            progress(name, 1)
        if len(names) > 1:
            write_checkpoint_index(target, names)
        write_config(target, _config(model))
    return tuple(target / name for name in names)


def shard_count(directory: str | Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """How many files of tensors :func:`to_hugging_face` will write. Raises as it does."""
    return len(_shards(SparseModel(directory).manifest, shard_bytes))


def _shards(manifest: Manifest, shard_bytes: int) -> list[list[_Stored]]:
    shards: list[list[_Stored]] = [[]]
    size = 0
    for stored in _all(manifest):
        if shards[-1] and size + stored.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.nbytes
    return shards


def _all(manifest: Manifest) -> Iterator[_Stored]:
    """Tensors outside the blocks first: they begin with the embedding."""
    for part in sorted(manifest.parts, key=lambda part: bool(part.weights)):
        for w in part.weights:
            yield _Stored(name=w.name, members=w.members, shape=w.shape, dtype=w.dtype, is_matrix=True)
        for t in part.tensors:
            yield _Stored(name=t.name, members=t.members, shape=t.shape, dtype=t.dtype, is_matrix=False)


def _write(model: SparseModel, path: Path, shard: list[_Stored]) -> None:
    expected = [member.name for stored in shard for member in stored.members]
    with TensorWriter(path, metadata={"format": "pt"}, expected=expected) as writer:
        for stored in shard:
            array = _dense(model, stored)
            for member, place in rows_of(stored.members):
                rows = array if len(stored.members) == 1 else array[place]
                with writer.tensor(member.name, LAYOUT_NAMES[stored.dtype], rows.shape) as out:
                    out.write(rows)


def _dense(model: SparseModel, stored: _Stored) -> NDArray[Any]:
    found: Any = model.matrix(stored.name, mmap=True) if stored.is_matrix else model.dense(stored.name, mmap=True)
    return np.asarray(found.to_dense() if isinstance(found, SparseWeight) else found)


def _config(model: SparseModel) -> dict[str, Any]:
    types = {weight.dtype for weight in model.manifest.weights.values()}
    return with_type(model.config, types.pop()) if len(types) == 1 else dict(model.config)
