# SPDX-License-Identifier: Apache-2.0
"""Queries, and keys and values for the cache, from one product: host side of cuda/decoder/append.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.decoder.arrays import MAX_HEAD_DIM, check, check_epsilon, check_optional
from flashllm.decoder.launcher import Launch
from flashllm.decoder.rows import THREADS, VECTOR, row_spec
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES
from flashllm.jit.spec import KernelSpec


def append(
    launch: Launch,
    *,
    dtype: str,
    qkv: Any,
    slots: Any,
    positions: Any,
    q: Any,
    keys: Any,
    values: Any,
    bias: Any = None,
    rotation: Any = None,
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
) -> None:
    """Make the queries of R rows, and put their keys and values into the cache of a layer at [slot, head, position].

    ``qkv`` [R, (heads + 2 kv_heads) * head_dim] is q, k and v, heads one after the other; ``q`` [R, heads, head_dim];
    ``keys`` and ``values`` [slots, kv_heads, capacity, head_dim]: all of ``dtype``. ``slots`` and ``positions`` are
    int32 [R]. In this order, in fp32, with one rounding: ``bias`` [as a row of qkv] is added; each head of q and of k
    is normalised (RMSNorm with ``eps``) and multiplied by ``q_norm`` or ``k_norm`` [head_dim]; elements i and
    i + head_dim / 2 of these heads are rotated by ``rotation`` [capacity or more, head_dim / 2, 2], fp32 cos and sin
    for each position.

    A row whose slot or position the cache does not have is left alone, its ``q`` included. head_dim is a multiple of 8
    up to 256. Two rows may not have the same slot and position. Raises ``ArgumentError``.
    """
    rows, heads, head_dim = check("q", q, ("rows", "heads", "head_dim"), dtype)
    if head_dim % VECTOR or head_dim > MAX_HEAD_DIM:
        raise ArgumentError("q", expected=f"head_dim a multiple of 8 up to {MAX_HEAD_DIM}", got=str(head_dim))
    slot_count, kv_heads, capacity, _ = check("keys", keys, ("slots", "kv_heads", "capacity", head_dim), dtype)
    check("values", values, (slot_count, kv_heads, capacity, head_dim), dtype)
    width = (heads + 2 * kv_heads) * head_dim
    check("qkv", qkv, (rows, width), dtype)
    check("slots", slots, (rows,), "int32")
    check("positions", positions, (rows,), "int32")
    if (q_norm is None) != (k_norm is None):
        raise ArgumentError("k_norm", expected="both of q_norm and k_norm, or neither", got="one of them")
    if rotation is not None and check("rotation", rotation, ("positions", head_dim // 2, 2), "fp32")[0] < capacity:
        expected = f"at least the {capacity} positions of the cache"
        raise ArgumentError("rotation", expected=expected, got=str(rotation.shape[0]))
    optional = (
        check_optional("q_norm", q_norm, (head_dim,), dtype),
        check_optional("k_norm", k_norm, (head_dim,), dtype),
        np.uint64(0) if rotation is None else rotation,
    )
    lane_width = _lane_width(head_dim)
    lane_bits = (head_dim // 2 // lane_width - 1).bit_length()
    sizes = (heads, kv_heads, head_dim, slot_count, capacity, lane_bits)
    args = (
        qkv,
        check_optional("bias", bias, (width,), dtype),
        slots,
        positions,
        *optional,
        check_epsilon(eps),
        *(np.int32(size) for size in sizes),
        q,
        keys,
        values,
    )
    heads_per_block = THREADS >> lane_bits
    grid = (rows, -(-(heads + 2 * kv_heads) // heads_per_block))
    launch(row_spec("append", "append", dtype, lane_width), grid, args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [row_spec("append", "append", dtype, width) for dtype in DTYPES for width in (VECTOR, VECTOR // 2)]


def _lane_width(head_dim: int) -> int:
    """Elements of each half of a head that a lane takes: a whole vector where the second half starts at one."""
    return VECTOR if head_dim % (2 * VECTOR) == 0 else VECTOR // 2
