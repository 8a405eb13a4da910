# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoding step, a query for each row: host side of cuda/decoder/attention.cu.

Where more than two query heads share a head of keys, the kernel is that of ``grouped_attention``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashllm.decoder import grouped_attention
from flashllm.decoder.arrays import MAX_HEAD_DIM, VECTOR_BYTES, address_of, check
from flashllm.decoder.launcher import Launch
from flashllm.errors import ArgumentError
from flashllm.formats.bits import check_dtype
from flashllm.jit.spec import MAX_GRID_YZ, KernelSpec
from flashllm.matmul.tensor_cores import CXX_TYPE

MAX_ROWS = MAX_GRID_YZ
"""The most queries of a step: the limit of a grid's second dimension."""
MAX_HEADS = 1 << 15
"""The most query heads: even with the most rows, the blocks of a split can be counted in 32 bits."""
_THREADS = 128
_WARPS = 4
_CHUNK_ELEMENTS = 64  # that the eight lanes of a position load at once, 16 bytes each
_CHUNKS = (1, 2, 4)  # such loads per lane for one position
_LEAST, _LONG = 64, 2048  # positions, as in cuda/flashllm/shares.cuh
# Blocks wanted per multiprocessor. On an H200 one split was the fastest wherever there were that many. For the kernel
# of groups half a block is enough: its blocks have tens of kilobytes in flight, and what a split leaves is up to a
# quarter of what it reads.
_BLOCKS_PER_SM = 2
_SMS_PER_GROUPED_BLOCK = 2


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How one launch is divided among blocks; the same for every step, however many positions rows have."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    """Positions that a slot of the cache has room for."""
    splits: int
    """Blocks that share the positions of a row and head of keys; short rows leave some of them without work."""
    common_splits: int
    """How many of them any row uses unless it is short; the others are for rows of thousands of positions, which would
    otherwise keep the rest waiting."""

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    @property
    def is_grouped(self) -> bool:
        """Whether tensor cores do the work; weights are then rounded before they multiply values."""
        return self.group >= grouped_attention.MIN_GROUP

    @property
    def block_heads(self) -> int:
        """The most query heads of a group in a block: all if possible, else even parts, each reading keys again."""
        return -(-self.group // -(-self.group // grouped_attention.MAX_BLOCK_HEADS))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of the launch."""
        return (self.kv_heads * -(-self.group // self.block_heads), self.rows, self.splits)

    @property
    def workspace_bytes(self) -> int:
        """Memory beside the operands, which must be zero before the first launch; 0 for a plan with one split."""
        return 0 if self.splits == 1 else self._partials_at + 4 * self._softmaxes * self.head_dim

    @property
    def _softmaxes(self) -> int:
        return math.prod(self.grid) * self.block_heads

    @property
    def _softmaxes_at(self) -> int:
        return -(-4 * self.rows * self.grid[0] // VECTOR_BYTES) * VECTOR_BYTES

    @property
    def _partials_at(self) -> int:
        return self._softmaxes_at + -(-8 * self._softmaxes // VECTOR_BYTES) * VECTOR_BYTES


def plan_attention(
    *, rows: int, heads: int, kv_heads: int, head_dim: int, capacity: int, sm_count: int
) -> AttentionPlan:
    """The plan for ``rows`` queries of ``heads`` heads, on a GPU of ``sm_count`` multiprocessors.

    Positions are split until every multiprocessor has some blocks to run or the splits of a full cache get short, and
    also where one split would have thousands. Raises ``ArgumentError`` for sizes that no kernel is made for.
    """
    sizes = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "capacity": capacity, "sm_count": sm_count}
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(name, expected="a number >= 1", got=str(size))
    if rows > MAX_ROWS:
        raise ArgumentError("rows", expected=f"at most {MAX_ROWS}", got=str(rows))
    check_heads(heads, kv_heads, head_dim)
    check_capacity(capacity, head_dim)
    geometry = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
    plan = AttentionPlan(**geometry, splits=1, common_splits=1)
    blocks = math.prod(plan.grid)
    wanted = -(-_BLOCKS_PER_SM * sm_count // blocks)
    if plan.is_grouped:
        wanted = sm_count // (_SMS_PER_GROUPED_BLOCK * blocks)
    common = max(1, min(wanted, capacity // _LEAST))
    return replace(plan, splits=max(common, min(capacity // _LONG, MAX_GRID_YZ)), common_splits=common)


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises ``ArgumentError`` unless heads share those of keys evenly, are at most :data:`MAX_HEADS`, and have a
    multiple of 8 elements, up to 256.
    """
    if heads % kv_heads:
        raise ArgumentError("heads", expected=f"a multiple of the {kv_heads} heads of keys", got=str(heads))
    if heads > MAX_HEADS:
        raise ArgumentError("heads", expected=f"at most {MAX_HEADS}", got=str(heads))
    if not 8 <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise ArgumentError("head_dim", expected=f"a multiple of 8 up to {MAX_HEAD_DIM}", got=str(head_dim))


def check_capacity(capacity: int, head_dim: int) -> None:
    """Raises ``ArgumentError`` unless kernels can count the elements of a slot's head of keys, in 32 bits."""
    most = (2**31 - 1) // head_dim
    if capacity > most:
        raise ArgumentError("capacity", expected=f"at most {most} positions", got=str(capacity))


def score_scale(head_dim: int) -> np.float32:
    """The factor by which kernels multiply products of queries and keys; their softmax is one of powers of two."""
    return np.float32(math.log2(math.e) / math.sqrt(head_dim))


def attention(
    launch: Launch,
    plan: AttentionPlan,
    *,
    dtype: str,
    q: Any,
    keys: Any,
    values: Any,
    slots: Any,
    positions: Any,
    out: Any,
    workspace: Any = None,
) -> None:
    """out [rows, heads * head_dim] = softmax(q k^T / sqrt(head_dim)) v over each row's positions up to its own.

    ``q`` [rows, heads, head_dim], ``keys`` and ``values`` [slots, kv_heads, capacity, head_dim] and ``out`` are of
    ``dtype``; ``slots`` and ``positions`` are int32 [rows]: row r reads positions 0 to ``positions[r]`` of slot
    ``slots[r]``, whatever the cache holds after them, and at most all that a slot has. A row whose slot the cache does
    not have, or whose position is negative, is skipped: its part of ``out`` is not written.

    A launch that overlaps the preceding one reads ``slots``, ``positions`` and the earlier positions in the cache
    without waiting for it. These must have been written before that launch, which is so where it has appended a
    position to each slot and no two rows have the same slot.

    ``workspace`` is uint8 of at least ``plan.workspace_bytes``, zero before the first launch; launches that follow one
    another may share it. Scores and sums are fp32 and out is rounded once; ``plan.is_grouped`` says whether weights,
    which are at most 1, are rounded to ``dtype`` before they multiply values. The same operands give the same bits on
    every run. Raises ``ArgumentError``.
    """
    kind = check_dtype(dtype)
    rows = plan.rows
    check("q", q, (rows, plan.heads, plan.head_dim), kind)
    slot_count, *_ = cache = check("keys", keys, ("slots", plan.kv_heads, plan.capacity, plan.head_dim), kind)
    check("values", values, cache, kind)
    check("slots", slots, (rows,), "int32")
    check("positions", positions, (rows,), "int32")
    check("out", out, (rows, plan.heads * plan.head_dim), kind)
    memory = (np.uint64(0),) * 3
    if plan.splits > 1:
        memory = _memory(plan, workspace)
    arrays = (q, keys, values, slots, positions, out, *memory)
    sizes = map(np.int32, (plan.head_dim, slot_count, plan.capacity))
    scalars = (*sizes, score_scale(plan.head_dim), np.int32(plan.common_splits))
    if plan.is_grouped:
        spec = grouped_attention.spec(kind, head_dim=plan.head_dim, block_heads=plan.block_heads)
        groups = map(np.int32, (plan.kv_heads, plan.group, plan.block_heads))
        launch(spec, plan.grid, (*arrays, *scalars, *groups))
    else:
        chunks = next(chunks for chunks in _CHUNKS if chunks * _CHUNK_ELEMENTS >= plan.head_dim)
        launch(_spec(kind, chunks, plan.group), plan.grid, (*arrays, *scalars))


def specs() -> list[KernelSpec]:
    """Every kernel of attention.cu."""
    groups = range(1, grouped_attention.MIN_GROUP)
    return [_spec(dtype, chunks, group) for dtype in CXX_TYPE for chunks in _CHUNKS for group in groups]


def _memory(plan: AttentionPlan, workspace: Any) -> tuple[Any, Any, Any]:
    """Counters, softmaxes and partial sums in the workspace."""
    (size,) = check("workspace", workspace, ("bytes",), "uint8")
    if size < plan.workspace_bytes or address_of(workspace) % VECTOR_BYTES:
        expected = f"{plan.workspace_bytes} bytes from a multiple of {VECTOR_BYTES} on"
        raise ArgumentError("workspace", expected=expected, got=f"{size} bytes from {address_of(workspace):#x} on")
    starts = (0, plan._softmaxes_at, plan._partials_at)
    return (workspace, workspace[starts[1] :], workspace[starts[2] :])


def _spec(dtype: str, chunks: int, group: int) -> KernelSpec:
    dims = _CHUNK_ELEMENTS * chunks
    return KernelSpec(
        name="decode_attention",
        source="decoder/attention.cu",
        function="flashllm::decode_attention",
        template=(("T", CXX_TYPE[dtype]), ("kChunks", str(chunks)), ("kGroup", str(group))),
        threads=_THREADS,
        shared_bytes=group * (_WARPS * (4 * dims + 8) + 2 * dims),
    )
