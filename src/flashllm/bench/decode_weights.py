# SPDX-License-Identifier: Apache-2.0
"""Random weights of a whole model, made and packed on the device one matrix at a time: enough to measure speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flashllm.bench.data import random_matrix
from flashllm.engine.arrays import aligned
from flashllm.engine.forward import numpy_type
from flashllm.engine.shard import WHOLE, Shard
from flashllm.engine.weights import Block, Weights
from flashllm.formats.base import DType
from flashllm.models.config import ModelConfig
from flashllm.models.layout import OPT_POSITION_OFFSET
from flashllm.progress import Advance, ignore
from flashllm.registry import weight_class

PARTS = ("qkv", "out", "up", "down")
"""Matrices of a block, in the order of a pass."""
DENSE = "dense"
_EMBEDDING_STD = 0.02


def random_weights(
    config: ModelConfig,
    formats: Mapping[str, str],
    *,
    sparsity: float,
    xp: Any,
    dtype: DType = "fp16",
    shard: Shard = WHOLE,
    seed: int = 0,
    advance: Advance = ignore,
) -> Weights:
    """Weights of ``config``, or of one shard, as arrays of ``xp``: NumPy, or CuPy on the current device.

    ``formats`` has ``dense`` or the name of a format for each of :data:`PARTS`. ``sparsity`` is the fraction of zeros,
    also in dense matrices, where it changes nothing. Values are scaled to keep activations at about 1.
    """
    device = xp is not np
    blocks = []
    for layer in range(config.layers):
        matrices = {}
        for place, part in enumerate(PARTS):
            m, k = shard.shape(config, part)
            std = 1 / math.sqrt(k * (1 - sparsity)) if sparsity < 1 else 0.0
            dense = random_matrix(
                m,
                k,
                density=1 - sparsity,
                std=std,
                dtype=dtype,
                device=device,
                seed=seed + (layer * len(PARTS) + place) * shard.count + shard.index,
            )
            if formats[part] == DENSE:
                matrices[part] = dense if device else aligned(dense.view(numpy_type(dtype)))
            else:
                matrices[part] = weight_class(formats[part]).from_dense(dense, dtype=dtype)
            del dense
            if device:
                # Else later weights would be carved out of the dense matrix's memory, which the next one needs whole.
                xp.get_default_memory_pool().free_all_blocks()
        blocks.append(Block(**matrices, **_vectors(config, shard, xp, dtype)))
        advance(f"block {layer}", 1)
    embedding = _table(config.vocab, config, xp, dtype, seed=seed + 1_000_003)
    weights = Weights(
        config=config,
        dtype=dtype,
        blocks=tuple(blocks),
        embedding=embedding,
        head=embedding if config.tied else _table(config.vocab, config, xp, dtype, seed=seed + 1_000_033),
        norm=_constant(config.hidden, 1.0, xp, dtype),
        norm_bias=_constant(config.hidden, 0.0, xp, dtype) if config.is_opt else None,
        positions=_table(config.positions + OPT_POSITION_OFFSET, config, xp, dtype, seed=seed + 1_000_037)
        if config.is_opt
        else None,
        shard=shard,
    )
    if device:
        xp.cuda.Device().synchronize()  # engines work on streams of their own
    return weights


def stored_share(weights: Weights) -> float:
    """Fraction of the elements of packed matrices that is stored; 1 where all are dense."""
    packed = [w for block in weights.blocks for w in block.matrices if hasattr(w, "nnz")]
    elements = sum(w.shape[0] * w.shape[1] for w in packed)
    return sum(w.nnz for w in packed) / elements if elements else 1.0


def _vectors(config: ModelConfig, shard: Shard, xp: Any, dtype: DType) -> dict[str, Any]:
    def ones(size: int) -> Any:
        return _constant(size, 1.0, xp, dtype)

    def zeros(size: int) -> Any:
        return _constant(size, 0.0, xp, dtype)

    hidden = config.hidden
    found = {"attention_norm": ones(hidden), "ffn_norm": ones(hidden)}
    if config.is_opt:
        found |= {"attention_norm_bias": zeros(hidden), "ffn_norm_bias": zeros(hidden)}
        found |= {"out_bias": zeros(hidden), "down_bias": zeros(hidden)}
        found |= {f"{part}_bias": zeros(shard.shape(config, part)[0]) for part in ("qkv", "up")}
    if config.model_type == "qwen2":
        found["qkv_bias"] = zeros(shard.shape(config, "qkv")[0])
    if config.qk_norm:
        found |= {"q_norm": ones(config.head_dim), "k_norm": ones(config.head_dim)}
    return found


def _table(rows: int, config: ModelConfig, xp: Any, dtype: DType, *, seed: int) -> Any:
    made = random_matrix(rows, config.hidden, std=_EMBEDDING_STD, dtype=dtype, device=xp is not np, seed=seed)
    return made if xp is not np else aligned(made.view(numpy_type(dtype)))


def _constant(size: int, value: float, xp: Any, dtype: DType) -> Any:
    bits = np.full(size, value, np.float32)
    narrow = bits.astype(np.float16) if dtype == "fp16" else (bits.view(np.uint32) >> 16).astype(np.uint16)
    return aligned(narrow) if xp is np else xp.asarray(narrow)
