# SPDX-License-Identifier: Apache-2.0
"""Causal attention of whole prompts: host side of cuda/decoder/prefill.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.decoder.arrays import check
from flashllm.decoder.attention import check_heads, score_scale
from flashllm.decoder.launcher import Launch
from flashllm.errors import ArgumentError
from flashllm.formats.bits import check_dtype
from flashllm.jit.spec import MAX_GRID_YZ, KernelSpec
from flashllm.matmul.tensor_cores import CXX_TYPE

_THREADS = 128
_ROWS = 64  # per block
_DIMS = (16, 32, 64, 80, 96, 128, 256)  # elements of a head for which there are kernels; others are padded with zeros


def prefill_attention(
    launch: Launch,
    *,
    dtype: str,
    q: Any,
    keys: Any,
    values: Any,
    slots: Any,
    positions: Any,
    starts: Any,
    longest: int,
    out: Any,
) -> None:
    """out [R, heads * head_dim] = softmax(q k^T / sqrt(head_dim)) v for each row over its sequence up to itself.

    Sequence s is rows ``starts[s]`` to ``starts[s + 1] - 1`` (int32 [sequences + 1]), none with more than ``longest``
    rows. It is in slot ``slots[starts[s]]`` of the cache, at positions from ``positions[starts[s]]`` on (both
    int32 [R]); keys and values of its rows are in the cache already, and so are those of earlier positions, if any. A
    sequence with rows, a slot or positions that do not exist is skipped: its part of ``out`` is not written. ``q`` [R,
    heads, head_dim], ``keys`` and ``values`` [slots, kv_heads, capacity, head_dim] and ``out`` are of ``dtype``.

    Scores and sums are fp32; weights, at most 1, are rounded to ``dtype`` before they multiply values, and out is
    rounded once. The same operands give the same bits on every run. Raises ``ArgumentError``.
    """
    kind = check_dtype(dtype)
    rows, heads, head_dim = check("q", q, ("rows", "heads", "head_dim"), kind)
    slot_count, kv_heads, capacity, _ = cache = check("keys", keys, ("slots", "kv_heads", "capacity", head_dim), kind)
    check("values", values, cache, kind)
    check_heads(heads, kv_heads, head_dim)
    check("slots", slots, (rows,), "int32")
    check("positions", positions, (rows,), "int32")
    sequences = check("starts", starts, ("sequences + 1",), "int32")[0] - 1
    check("out", out, (rows, heads * head_dim), kind)
    if not 1 <= sequences <= MAX_GRID_YZ:
        raise ArgumentError("starts", expected=f"2 to {MAX_GRID_YZ + 1} of them", got=str(sequences + 1))
    if not 1 <= longest <= min(rows, capacity):
        raise ArgumentError("longest", expected=f"1 to {min(rows, capacity)} rows", got=str(longest))
    scalars = (*map(np.int32, (rows, kv_heads, head_dim, slot_count, capacity)), score_scale(head_dim))
    args = (q, keys, values, slots, positions, starts, out, *scalars)
    launch(_spec(kind, _padded(head_dim)), (-(-longest // _ROWS), heads, sequences), args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [_spec(dtype, dim) for dtype in CXX_TYPE for dim in _DIMS]


def _padded(head_dim: int) -> int:
    return next(dim for dim in _DIMS if dim >= head_dim)


def _spec(dtype: str, dim: int) -> KernelSpec:
    tile = 32 if dim > 128 else 64
    return KernelSpec(
        name="prefill_attention",
        source="decoder/prefill.cu",
        function="flashllm::prefill_attention",
        template=(("T", CXX_TYPE[dtype]), ("kDim", str(dim))),
        threads=_THREADS,
        shared_bytes=(_ROWS + 2 * 2 * tile) * (2 * dim + 16),
    )
