# SPDX-License-Identifier: Apache-2.0
"""A model's tensors on an engine's device: matrices packed or dense, one for each group of layers; the rest dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import FormatError
from flashllm.formats.base import DType
from flashllm.formats.bits import bfloat16, kind_of
from flashllm.formats.weight import SparseWeight
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.sparse_model import SparseModel
from flashllm.models.config import ModelConfig, block_shapes, model_config
from flashllm.models.layout import OPT_POSITIONS
from flashllm.models.packed import UnpackedModel
from flashllm.models.weights import check_tensors
from flashllm.progress import Advance, ignore

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: matrices [M, K] and vectors. The members of a group of layers form one matrix, stacked by rows."""

    qkv: Any
    out: Any
    up: Any
    """Gate and up, or the first of OPT's two feed-forward layers."""
    down: Any
    attention_norm: Any
    ffn_norm: Any
    qkv_bias: Any = None
    out_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None
    attention_norm_bias: Any = None
    ffn_norm_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None

    @property
    def matrices(self) -> tuple[Any, Any, Any, Any]:
        """The matrices, in the order of a forward pass."""
        return self.qkv, self.out, self.up, self.down


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All tensors of a model, or of one shard of it."""

    config: ModelConfig
    """Configuration of the whole model."""
    dtype: DType
    """Type of all tensors, and of what they multiply."""
    blocks: tuple[Block, ...]
    embedding: Any
    head: Any
    """[vocab, hidden]; may be the embedding itself."""
    norm: Any
    norm_bias: Any = None
    positions: Any = None
    """OPT's position embedding."""
    shard: Shard = WHOLE

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrices of all blocks."""
        return sum(int(w.nbytes) for block in self.blocks for w in block.matrices)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        outside = {id(one): one for one in (self.embedding, self.head, self.norm, self.norm_bias, self.positions)}
        vectors = [v for block in self.blocks for v in vars(block).values() if v is not None]
        return sum(int(one.nbytes) for one in (*outside.values(), *vectors) if one is not None)


class Source(Protocol):
    """Where tensors come from, on the host: arrays of 16-bit floats, or packed."""

    config: ModelConfig
    dtype: DType

    def matrix(self, name: str, members: tuple[str, ...]) -> SparseWeight | NDArray[Any]:
        """The matrix ``name`` (without ``.weight``), which holds layers ``members``: packed, or dense [M, K]."""

    def vector(self, name: str) -> NDArray[Any] | None:
        """Another tensor, of ``dtype``, by its name in a checkpoint; None if there is none."""


def load(source: Source, xp: Any, *, shard: Shard = WHOLE, advance: Advance = ignore) -> Weights:
    """All tensors of ``source``, or those of ``shard``, as arrays of ``xp``: NumPy, or CuPy on the current device.

    They are complete when it returns, for any stream. A shard of a packed matrix is packed again in the same format.
    Raises ``ArgumentError`` for a shard that the model cannot be divided into, and ``DeviceMemoryError``.
    """
    config, layout = source.config, source.config.layout
    shard.check(config)

    def vector(name: str, part: str | None = None) -> Any:
        found = source.vector(name)
        if found is None:
            return None
        return _on_device(found if part is None else shard.rows(config, part, found), xp)

    blocks = []
    for layer in range(config.layers):
        prefix = layout.prefix(layer)
        tensors: dict[str, Any] = {}
        for part, group in zip(("qkv", "out", "up", "down"), layout.groups, strict=True):
            members = tuple(f"{prefix}.{member}" for member in group.members)
            matrix = source.matrix(f"{prefix}.{group.name}", members)
            tensors[part] = _to_device(_of_shard(matrix, config, shard, part), xp)
            bias = _joined(source, members)
            if bias is not None:
                bias = shard.rows(config, part, bias) if part in ("qkv", "up") else bias
                tensors[f"{part}_bias"] = _on_device(bias, xp)
        names = (
            ("self_attn_layer_norm", "final_layer_norm")
            if config.is_opt
            else ("input_layernorm", "post_attention_layernorm")
        )
        for field, name in zip(("attention_norm", "ffn_norm"), names, strict=True):
            tensors[field] = vector(f"{prefix}.{name}.weight")
            tensors[f"{field}_bias"] = vector(f"{prefix}.{name}.bias")
        if config.qk_norm:
            tensors |= {f"{one}_norm": vector(f"{prefix}.self_attn.{one}_norm.weight") for one in "qk"}
        blocks.append(Block(**tensors))
        advance(f"block {layer}", 1)
    embedding = vector(layout.embedding)
    final = layout.outside[-1].removesuffix(".bias").removesuffix(".weight")
    loaded = Weights(
        config=config,
        dtype=source.dtype,
        blocks=tuple(blocks),
        embedding=embedding,
        head=embedding if config.tied else vector(layout.head),
        norm=vector(f"{final}.weight"),
        norm_bias=vector(f"{final}.bias"),
        positions=vector(OPT_POSITIONS) if config.is_opt else None,
        shard=shard,
    )
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()  # an engine's own stream waits for no other
    return loaded


class PackedSource:
    """A directory that ``flashllm convert`` wrote; ``dense`` expands its matrices, zeros included."""

    def __init__(self, model: SparseModel, *, dense: bool = False) -> None:
        """Raises ``FormatError`` for tensors that are missing, have another shape, or are of several types."""
        self.config = model_config(model.config, path=str(model.path))
        self._model, self._dense = model, dense
        unpacked = UnpackedModel(model)
        check_tensors(unpacked, self.config)
        self._of_members = {
            tuple(member.name.removesuffix(".weight") for member in entry.members): name
            for name, entry in model.manifest.weights.items()
        }
        kinds = {entry.dtype for entry in model.manifest.weights.values()}
        kinds |= {entry.dtype for entry in model.manifest.tensors.values()}
        if len(kinds) != 1:
            raise FormatError(
                field="dtype",
                expected="one type of all tensors: convert with --dtype fp16 or --dtype bf16",
                got=", ".join(sorted(kinds)),
                path=str(model.path),
            )
        self.dtype: DType = kinds.pop()
        self._unpacked = unpacked

    def matrix(self, name: str, members: tuple[str, ...]) -> SparseWeight | NDArray[Any]:
        """As :class:`Source` says. Raises ``FormatError`` for layers that are not joined."""
        stored = self._of_members.get(members)
        if stored is None:
            raise FormatError(
                field=name,
                expected="one matrix of all these layers: convert without --no-fuse",
                got="several",
                path=str(self._model.path),
            )
        found = self._model.matrix(stored)
        return found.to_dense() if self._dense and isinstance(found, SparseWeight) else found

    def vector(self, name: str) -> NDArray[Any] | None:
        """As :class:`Source` says."""
        return self._unpacked.read(name) if name in self._unpacked.tensors else None


class CheckpointSource:
    """A checkpoint, as dense weights of one 16-bit type."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: DType | None = None) -> None:
        """``dtype``: by default bf16 if the embedding is bf16, else fp16."""
        self.config = model_config(checkpoint.config, path=str(checkpoint.path))
        check_tensors(checkpoint, self.config)
        self._checkpoint = checkpoint
        stored = checkpoint.tensors[self.config.layout.embedding].dtype
        self.dtype: DType = dtype or ("bf16" if stored == "BF16" else "fp16")

    def matrix(self, name: str, members: tuple[str, ...]) -> NDArray[Any]:
        """As :class:`Source` says."""
        return np.concatenate([self._read(f"{member}.weight") for member in members])

    def vector(self, name: str) -> NDArray[Any] | None:
        """As :class:`Source` says."""
        return self._read(name) if name in self._checkpoint.tensors else None

    def _read(self, name: str) -> NDArray[Any]:
        array = self._checkpoint.read(name)
        if str(array.dtype) not in _FLOATS:  # 8-bit types come with scales
            raise FormatError(
                field=name, expected=", ".join(_FLOATS), got=str(array.dtype), path=str(self._checkpoint.path)
            )
        if self.dtype == "bf16":
            return array.astype(bfloat16())
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        if not np.isfinite(narrow).all() and np.isfinite(array.astype(np.float32)).all():
            raise FormatError(
                field=name,
                expected="values that fp16 can hold: use --dtype bf16",
                got="larger ones",
                path=str(self._checkpoint.path),
            )
        return narrow


def _joined(source: Source, members: tuple[str, ...]) -> NDArray[Any] | None:
    """The biases of layers, concatenated, with zeros for a layer that has none; None if no layer has one."""
    found = [source.vector(f"{member}.bias") for member in members]
    if all(one is None for one in found):
        return None
    shapes = dict(_rows_of(source.config, members))
    kind = next(one.dtype for one in found if one is not None)
    filled = [np.zeros(shapes[name], kind) if one is None else one for name, one in zip(members, found, strict=True)]
    return np.concatenate(filled)


def _rows_of(config: ModelConfig, members: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    shapes = block_shapes(config)
    for name in members:
        local = next(key for key in shapes if name.endswith(f".{key.removesuffix('.weight')}"))
        yield name, shapes[local][0]


def _of_shard(matrix: Any, config: ModelConfig, shard: Shard, part: str) -> Any:
    if shard.count == 1:
        return matrix
    if not isinstance(matrix, SparseWeight):
        return shard.matrix(config, part, matrix)
    return type(matrix).from_dense(shard.matrix(config, part, matrix.to_dense()))


def _to_device(matrix: Any, xp: Any) -> Any:
    if isinstance(matrix, SparseWeight):
        return matrix if xp is np else matrix.to_device()
    return _on_device(matrix, xp)


def _on_device(array: NDArray[Any], xp: Any) -> Any:
    """``array`` on the device, bf16 as its bits: neither CuPy nor NumPy supports that type everywhere."""
    plain = np.ascontiguousarray(array)
    if kind_of(plain.dtype) == "bf16":
        plain = plain.view(np.uint16)
    if xp is np:
        from flashllm.engine.arrays import aligned

        return aligned(plain)
    from flashllm.device import memory_errors

    with memory_errors("weights", plain.nbytes):
        return xp.asarray(plain)
