# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint as a forward pass needs them, one block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashllm.errors import FormatError
from flashllm.io.checkpoint import Checkpoint
from flashllm.models.config import ModelConfig, bias_shapes, tensor_shapes

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tensors of a block, named without its prefix."""

    small: Mapping[str, Any]
    """Norms and biases, e.g. ``input_layernorm.weight``."""
    linears: Mapping[str, Any]
    """Matrices [M, K], named without ``.weight``, e.g. ``self_attn.q_proj``."""


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ``FormatError`` for a tensor that is missing or of another shape than the configuration says."""
    wanted = tensor_shapes(config)
    wanted |= {name: shape for name, shape in bias_shapes(config).items() if name in checkpoint.tensors}
    for name, shape in wanted.items():
        found = checkpoint.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            got = "none" if found is None else f"shape {list(found.shape)}"
            raise FormatError(
                field=name, expected=f"a tensor of shape {list(shape)}", got=got, path=str(checkpoint.path)
            )


def outside(checkpoint: Checkpoint, config: ModelConfig, *, xp: Any = np, dtype: Any = np.float32) -> dict[str, Any]:
    """Embeddings, final norm and head, which is the embedding if the model ties them."""
    head = config.layout.head
    found = before_blocks(checkpoint, config, xp=xp, dtype=dtype)
    found[head] = found[config.layout.embedding] if config.tied else _read(checkpoint, head, xp, dtype)
    return found


def before_blocks(
    checkpoint: Checkpoint, config: ModelConfig, *, xp: Any = np, dtype: Any = np.float32
) -> dict[str, Any]:
    """As :func:`outside` but without the head, for callers that need only the embeddings."""
    return {name: _read(checkpoint, name, xp, dtype) for name in (config.layout.embedding, *config.layout.outside)}


def block(checkpoint: Checkpoint, config: ModelConfig, layer: int, *, xp: Any = np, dtype: Any = np.float32) -> Block:
    """Block ``layer`` as arrays of ``xp`` (NumPy or CuPy) and ``dtype``."""
    layout = config.layout
    prefix = layout.prefix(layer) + "."
    matrices = set(layout.linears(layer))
    small: dict[str, Any] = {}
    linears: dict[str, Any] = {}
    for name in block_names(checkpoint, config, layer):
        array = _read(checkpoint, name, xp, dtype)
        if name in matrices:
            linears[name.removeprefix(prefix).removesuffix(".weight")] = array
        else:
            small[name.removeprefix(prefix)] = array
    return Block(small=small, linears=linears)


def block_names(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Names of all tensors of block ``layer``, in the order of the checkpoint."""
    prefix = config.layout.prefix(layer) + "."
    return tuple(name for name in checkpoint.tensors if name.startswith(prefix))


def outside_names(checkpoint: Checkpoint, config: ModelConfig) -> tuple[str, ...]:
    """Names of all tensors that are in no block."""
    prefixes = tuple(config.layout.prefix(layer) + "." for layer in range(config.layers))
    return tuple(name for name in checkpoint.tensors if not name.startswith(prefixes))


def _read(checkpoint: Checkpoint, name: str, xp: Any, dtype: Any) -> Any:
    array = checkpoint.read(name)
    if str(array.dtype) not in _FLOATS:  # 8-bit types come with scales
        raise FormatError(
            field=name, expected=f"one of {', '.join(_FLOATS)}", got=str(array.dtype), path=str(checkpoint.path)
        )
    return xp.asarray(array.astype(dtype))
