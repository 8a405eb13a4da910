# SPDX-License-Identifier: Apache-2.0
"""What a model computes, block by block, with NumPy or CuPy: the reference for tests, pruning and evaluation.

Everything is fp32 (or fp64 if the given tensors are). Sequences are processed whole: there is no KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flashllm.formats.sources import array_module
from flashllm.models.config import ModelConfig
from flashllm.models.layout import OPT_POSITION_OFFSET, OPT_POSITIONS
from flashllm.models.text import split_batches
from flashllm.models.threads import for_each

Linear = Callable[[str, Any], Any]
"""``linear(name, x)``: y [T, M] = x [T, K] @ W^T of the linear layer ``name`` (without ``.weight``), without bias."""

TOKENS_AT_ONCE = 4096
"""Tokens of one step; more would only take memory."""
_HEADS_AT_ONCE = 64  # heads whose scores [queries, T] are in memory together
_QUERIES = 128  # queries of one step, which reads no keys after its last query


def embed(config: ModelConfig, tensors: Mapping[str, Any], tokens: Any) -> Any:
    """Hidden states [B, T, hidden] of ``tokens`` [B, T]; ``tensors`` has the embeddings."""
    hidden = tensors[config.layout.embedding][tokens]
    if config.is_opt:
        positions = tensors[OPT_POSITIONS]
        hidden = hidden + positions[OPT_POSITION_OFFSET : OPT_POSITION_OFFSET + tokens.shape[1]]
    return hidden


def block(config: ModelConfig, tensors: Mapping[str, Any], hidden: Any, linear: Linear) -> Any:
    """Hidden states [B, T, hidden] after one block.

    ``tensors``: norms and biases of the block, without its prefix (``input_layernorm.weight``); ``linear`` multiplies
    by its matrices, which are named likewise (``self_attn.q_proj``).
    """
    return (
        _opt_block(config, tensors, hidden, linear) if config.is_opt else _llama_block(config, tensors, hidden, linear)
    )


def block_in_place(
    config: ModelConfig, tensors: Mapping[str, Any], hidden: Any, linear: Linear, *, threads: int = 1
) -> None:
    """Replace ``hidden`` by the result of :func:`block`, up to ``TOKENS_AT_ONCE`` tokens at a time in each thread."""

    def replace(part: slice) -> None:
        hidden[part] = block(config, tensors, hidden[part], linear)

    for_each(replace, parts_of(hidden, threads), threads=threads)


def parts_of(hidden: Any, threads: int) -> list[slice]:
    """The sequences of ``hidden`` [S, T, hidden] that each step takes: enough parts for ``threads`` threads."""
    each = -(-len(hidden) // threads) * hidden.shape[1]
    return split_batches(hidden, at_once=min(TOKENS_AT_ONCE, each))


def final_norm(config: ModelConfig, tensors: Mapping[str, Any], hidden: Any) -> Any:
    """The normalised rows that the head multiplies: [..., hidden]."""
    if config.is_opt:
        return _layer_norm(hidden, tensors, "model.decoder.final_layer_norm", config.norm_eps)
    return _rms_norm(hidden, tensors["model.norm.weight"], config.norm_eps)


def multiply_by(weights: Mapping[str, Any]) -> Linear:
    """Products with dense ``weights``, which are named without ``.weight``."""
    return lambda name, x: x @ weights[name].T


def rope_frequencies(config: ModelConfig, xp: Any) -> Any:
    """Radians per position of each pair of a head's elements: float64 [head_dim / 2]."""
    import numpy as np

    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim) / config.rope_linear
    scaling = config.rope_llama3
    if scaling is not None:
        # Long waves are stretched by the factor, short ones are kept, and those between are stretched in part.
        turns = scaling.original_positions * frequencies / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return xp.asarray(frequencies)


def _llama_block(config: ModelConfig, tensors: Mapping[str, Any], hidden: Any, linear: Linear) -> Any:
    def project(name: str, x: Any) -> Any:
        y = linear(name, x)
        bias = tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    x = _rows(_rms_norm(hidden, tensors["input_layernorm.weight"], config.norm_eps))
    q, k, v = (project(f"self_attn.{one}_proj", x) for one in "qkv")
    q, k = _heads(q, hidden, config.head_dim), _heads(k, hidden, config.head_dim)
    if config.qk_norm:
        q = _rms_norm(q, tensors["self_attn.q_norm.weight"], config.norm_eps)
        k = _rms_norm(k, tensors["self_attn.k_norm.weight"], config.norm_eps)
    q, k = _rotate(config, q), _rotate(config, k)
    mixed = _attention(config, q, k, _heads(v, hidden, config.head_dim))
    hidden = hidden + project("self_attn.o_proj", mixed).reshape(hidden.shape)
    x = _rows(_rms_norm(hidden, tensors["post_attention_layernorm.weight"], config.norm_eps))
    gate, up = project("mlp.gate_proj", x), project("mlp.up_proj", x)
    return hidden + project("mlp.down_proj", _silu(gate) * up).reshape(hidden.shape)


def _opt_block(config: ModelConfig, tensors: Mapping[str, Any], hidden: Any, linear: Linear) -> Any:
    def project(name: str, x: Any) -> Any:
        return linear(name, x) + tensors[f"{name}.bias"]

    x = _rows(_layer_norm(hidden, tensors, "self_attn_layer_norm", config.norm_eps))
    q, k, v = (_heads(project(f"self_attn.{one}_proj", x), hidden, config.head_dim) for one in "qkv")
    hidden = hidden + project("self_attn.out_proj", _attention(config, q, k, v)).reshape(hidden.shape)
    x = _rows(_layer_norm(hidden, tensors, "final_layer_norm", config.norm_eps))
    return hidden + project("fc2", project("fc1", x).clip(min=0)).reshape(hidden.shape)


def _attention(config: ModelConfig, q: Any, k: Any, v: Any) -> Any:
    """Causal attention. q [B, heads, T, head_dim], k and v [B, kv_heads, T, head_dim] -> [B * T, heads * head_dim]."""
    xp = array_module(q)
    batch, heads, length, size = q.shape
    shared = heads // config.kv_heads
    later = xp.triu(xp.full((_QUERIES, _QUERIES), -xp.inf, dtype=q.dtype), k=1)
    out = xp.empty((batch, length, heads, size), dtype=q.dtype)
    q = q * q.dtype.type(size**-0.5)
    for one in range(batch):
        for first in range(0, heads, _HEADS_AT_ONCE):
            last = min(heads, first + _HEADS_AT_ONCE)
            of_heads = xp.arange(first, last) // shared
            keys, values = k[one][of_heads].transpose(0, 2, 1), v[one][of_heads]
            for begin in range(0, length, _QUERIES):
                end = min(length, begin + _QUERIES)
                scores = q[one, first:last, begin:end] @ keys[..., :end]
                scores[..., begin:] += later[: end - begin, : end - begin]
                scores -= scores.max(axis=-1, keepdims=True)
                xp.exp(scores, out=scores)
                scores /= scores.sum(axis=-1, keepdims=True)
                out[one, begin:end, first:last] = (scores @ values[:, :end]).transpose(1, 0, 2)
    return out.reshape(batch * length, heads * size)


def _rotate(config: ModelConfig, heads: Any) -> Any:
    """Apply rotary positions to [B, heads, T, head_dim]; the two elements of a pair are in the two halves of a head."""
    xp = array_module(heads)
    angles = xp.arange(heads.shape[2])[:, None] * rope_frequencies(config, xp)
    cos, sin = xp.cos(angles).astype(heads.dtype), xp.sin(angles).astype(heads.dtype)
    half = config.head_dim // 2
    left, right = heads[..., :half], heads[..., half:]
    return xp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _heads(flat: Any, hidden: Any, size: int) -> Any:
    """[B * T, heads * size] -> [B, heads, T, size]."""
    batch, length, _ = hidden.shape
    split = flat.reshape(batch, length, -1, size).transpose(0, 2, 1, 3)
    return array_module(flat).ascontiguousarray(split)  # products of strided stacks are slow in NumPy


def _rows(hidden: Any) -> Any:
    return hidden.reshape(-1, hidden.shape[-1])


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    xp = array_module(x)
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def _layer_norm(x: Any, tensors: Mapping[str, Any], name: str, eps: float) -> Any:
    xp = array_module(x)
    x = x - x.mean(axis=-1, keepdims=True)
    spread = xp.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    return x / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _silu(x: Any) -> Any:
    """x / (1 + exp(-x)), without overflow."""
    xp = array_module(x)
    return x * (0.5 * (1 + xp.tanh(x / 2))).astype(x.dtype)
