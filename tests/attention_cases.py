# SPDX-License-Identifier: Apache-2.0
"""Cases of attention with a cache of keys and values, for kernels on a GPU and on the CPU, and their exact results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashllm.decoder.attention import AttentionPlan, attention, plan_attention
from flashllm.decoder.launcher import Launch
from flashllm.decoder.prefill import prefill_attention
from flashllm.jit.spec import KernelSpec

DTYPES = ("fp16", "bf16")
NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of one rounding."""
_GUARD = 1 << 12  # elements around an output
_NAN = 0x7FDA  # in either type


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences in slots of a cache that holds NaN wherever there is no token of theirs."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    ends: tuple[int, ...]
    """Number of positions of each sequence that the cache has."""
    counts: tuple[int, ...] = ()
    """How many of these, at the end, are rows of this pass: one when decoding."""
    seed: int = 0

    @property
    def slots(self) -> list[int]:
        """The slot of each sequence: neither in order nor without gaps."""
        return [int(slot) for slot in np.random.default_rng(self.seed).permutation(len(self.ends) + 2)][2:]

    @property
    def is_grouped(self) -> bool:
        """Whether the kernel for heads that share keys, which rounds weights, does the decoding."""
        return self.heads // self.kv_heads >= 3

    @property
    def label(self) -> str:
        return f"{self.dtype}-{self.heads}x{self.kv_heads}x{self.head_dim}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Arrays of a case, on the host; queries, keys and values of its dtype."""

    q: NDArray[Any]
    keys: NDArray[Any]
    values: NDArray[Any]
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    starts: NDArray[np.int32]


def operands(case: Case, *, equal_scores: bool = False) -> Operands:
    """Normally distributed queries and keys, values in -8..8; with ``equal_scores`` zero queries and integer values."""
    rng = np.random.default_rng(case.seed)
    counts = case.counts or (1,) * len(case.ends)
    kind = NUMPY[case.dtype]
    shape = (len(case.ends) + 2, case.kv_heads, case.capacity, case.head_dim)
    keys, values = (np.full(shape, np.nan, kind) for _ in range(2))
    for slot, end in zip(case.slots, case.ends, strict=True):
        part = (case.kv_heads, end, case.head_dim)
        keys[slot, :, :end] = rng.standard_normal(part).astype(kind)
        drawn = rng.integers(-8, 9, part) if equal_scores else rng.uniform(-8, 8, part)
        values[slot, :, :end] = drawn.astype(kind)
    spread = 0.0 if equal_scores else 2.0  # of queries, and so of scores
    queries = spread * rng.standard_normal((sum(counts), case.heads, case.head_dim))
    return Operands(
        q=queries.astype(kind),
        keys=keys,
        values=values,
        slots=np.repeat(case.slots, counts).astype(np.int32),
        positions=np.concatenate(
            [np.arange(end - count, end) for end, count in zip(case.ends, counts, strict=True)]
        ).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    )


def expected(case: Case, given: Operands, *, weights_rounded: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """Results in float64 [rows, heads * head_dim], and how far from each the kernel's may be.

    A score is a sum of head_dim products in fp32. Its error is a relative error of its weight, which adds one of its
    own. The output is a mean with such weights, so it has twice that error, plus the error of the sum over positions;
    then it is rounded. ``weights_rounded``: to the dtype, and below 2^-14 in fp16 to a multiple of 2^-24.
    """
    shared = case.heads // case.kv_heads
    scale = 1 / math.sqrt(case.head_dim)
    unit = UNIT[case.dtype]
    queries, keys, values = (a.astype(np.float64) for a in (given.q, given.keys, given.values))
    out, bound = np.zeros_like(queries), np.zeros_like(queries)
    for row, (slot, position) in enumerate(zip(given.slots, given.positions, strict=True)):
        for head in range(case.heads):
            q = queries[row, head]
            k, v = (a[slot, head // shared, : position + 1] for a in (keys, values))
            scores = k @ q * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
            error = (case.head_dim + 4) * 2.0**-23 * (np.abs(k) @ np.abs(q) * scale).max() + 2.0**-21
            error = 2 * error + (position + 16) * 2.0**-23
            if weights_rounded:
                error += unit + (position + 1) * 2.0**-25
            error *= np.abs(v).max()
            bound[row, head] = error + unit * (np.abs(out[row, head]) + error)
    return out.reshape(len(out), -1), bound.reshape(len(out), -1)


class Fenced:
    """An output of NaNs between NaNs."""

    def __init__(self, xp: Any, shape: tuple[int, int], dtype: str) -> None:
        size = math.prod(shape)
        self._room = xp.full(size + 2 * _GUARD, _NAN, np.uint16)
        inner = self._room[_GUARD : _GUARD + size].reshape(shape)
        self.inner = inner.view(np.float16) if dtype == "fp16" else inner
        self._shape, self._dtype = shape, dtype

    def read(self) -> NDArray[Any]:
        """What was written; fails if anything outside the output was written."""
        room = np.asarray(self._room if isinstance(self._room, np.ndarray) else self._room.get())
        inside = room[_GUARD:-_GUARD].reshape(self._shape)
        assert (room[:_GUARD] == _NAN).all(), "written before the output"
        assert (room[-_GUARD:] == _NAN).all(), "written behind the output"
        return inside.copy().view(NUMPY[self._dtype])


def placed(xp: Any, array: NDArray[Any]) -> Any:
    """The array where the kernel runs; bf16 as bit patterns."""
    plain = array.dtype in (np.float16, np.int32)
    return xp.asarray(array if plain else array.view(np.uint16))


def plan_of(case: Case, rows: int, splits: int | None = None, common: int | None = None) -> AttentionPlan:
    """A plan for a GPU of four multiprocessors, or with ``splits``, of which any row uses all, or only ``common``."""
    plan = plan_attention(
        rows=rows,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        capacity=case.capacity,
        sm_count=4,
    )
    return plan if splits is None else replace(plan, splits=splits, common_splits=common or splits)


def decode(
    launch: Launch, xp: Any, case: Case, given: Operands, *, splits: int | None = None, common: int | None = None
) -> NDArray[Any]:
    """Attention of every row, computed twice with one workspace; both must give the same bits."""
    plan = plan_of(case, len(given.q), splits, common)
    workspace = xp.full(plan.workspace_bytes, 0xFF, np.uint8) if plan.workspace_bytes else None
    if workspace is not None:
        workspace[: 4 * plan.rows * plan.grid[0]] = 0  # counters; what the rest holds, NaN here, must not matter
    arrays = [placed(xp, a) for a in (given.q, given.keys, given.values, given.slots, given.positions)]
    q, keys, values, slots, positions = arrays
    outputs = [Fenced(xp, (len(given.q), case.heads * case.head_dim), case.dtype) for _ in range(2)]
    for out in outputs:
        attention(
            launch,
            plan,
            dtype=case.dtype,
            q=q,
            keys=keys,
            values=values,
            slots=slots,
            positions=positions,
            out=out.inner,
            workspace=workspace,
        )
    first, second = (out.read() for out in outputs)
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))
    return first


def dependent(spec: KernelSpec, args: Sequence[Any]) -> list[NDArray[Any]]:
    """Those of a kernel's arrays that the previous launch may have written: all except slots and positions of the rows
    of a decoding step, and the cache at earlier positions than theirs.
    """
    if "prefill" in spec.name:
        return [arg for arg in args if isinstance(arg, np.ndarray)]
    q, keys, values, slots, positions, *others = args
    ends = np.minimum(positions, keys.shape[2] - 1)
    places = [place for place in zip(slots, ends, strict=True) if min(place) >= 0 and place[0] < len(keys)]
    last = [array[slot, head, position] for array in (keys, values) for slot, position in places
            for head in range(keys.shape[1])]  # fmt: skip
    return [q, *(arg for arg in others if isinstance(arg, np.ndarray)), *last]


def prefill(launch: Launch, xp: Any, case: Case, given: Operands) -> NDArray[Any]:
    """Attention of every row of the prompts."""
    out = Fenced(xp, (len(given.q), case.heads * case.head_dim), case.dtype)
    prefill_attention(
        launch,
        dtype=case.dtype,
        q=placed(xp, given.q),
        keys=placed(xp, given.keys),
        values=placed(xp, given.values),
        slots=placed(xp, given.slots),
        positions=placed(xp, given.positions),
        starts=placed(xp, given.starts),
        longest=max(case.counts),
        out=out.inner,
    )
    return out.read()


def assert_decoded(case: Case, given: Operands, got: NDArray[Any]) -> None:
    """Every result is within the bound of the kernel that computed it."""
    assert_close(got, expected(case, given, weights_rounded=case.is_grouped))


def assert_close(got: NDArray[Any], want: tuple[NDArray[Any], NDArray[Any]]) -> None:
    """Every result is within its bound."""
    exact, bound = want
    error = np.abs(got.astype(np.float64) - exact)
    wrong = np.argwhere(~(error <= bound))
    assert wrong.size == 0, (
        f"{len(wrong)} of {error.size} wrong, first {wrong[0].tolist()}: got {got[tuple(wrong[0])]}, "
        f"expected {exact[tuple(wrong[0])]}, bound {bound[tuple(wrong[0])]}"
    )


def assert_means(case: Case, given: Operands, got: NDArray[Any]) -> None:
    """Equal scores: out is the mean of the values, whose sums fp32 holds exactly, divided once and rounded once."""
    shared = case.heads // case.kv_heads
    want = np.empty((len(given.q), case.heads, case.head_dim), NUMPY[case.dtype])
    for row, (slot, position) in enumerate(zip(given.slots, given.positions, strict=True)):
        sums = given.values[slot, :, : position + 1].astype(np.float32).sum(axis=1)
        want[row] = (sums / np.float32(position + 1)).repeat(shared, axis=0).astype(NUMPY[case.dtype])
    np.testing.assert_array_equal(got.astype(np.float32), want.reshape(got.shape).astype(np.float32))


# ---- cases -----------------------------------------------------------------------------------------------------------

HEADS = (
    (2, 2, 8),
    (3, 3, 16),
    (2, 2, 128),
    (6, 2, 80),
    (4, 2, 128),
    (8, 1, 40),
    (8, 1, 128),
    (19, 1, 64),
    (16, 1, 120),
    (2, 2, 256),
    (4, 2, 136),
    (3, 1, 256),
    (16, 1, 200),
    (12, 3, 64),
    (10, 2, 96),
    (12, 1, 72),
    (12, 1, 96),
)
"""Query heads, heads of keys, elements of a head: whole blocks, parts of a block, and two unequal blocks."""

DECODE = tuple(
    Case(dtype=DTYPES[i % 2], heads=h, kv_heads=kv, head_dim=dim, capacity=300, ends=(1, 63, 300, 131), seed=i)
    for i, (h, kv, dim) in enumerate(HEADS)
)

PAIRED, GROUPED = (replace(DECODE[at], ends=(300, 129, 64, 1)) for at in (4, 6))
"""Two and eight query heads that share the same keys."""

PREFILL = tuple(
    Case(
        dtype=DTYPES[i % 2],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=150,
        ends=(5, 1, 80, 150),
        counts=(5, 1, 66, 17),
        seed=i,
    )
    for i, (heads, kv_heads, head_dim) in enumerate(
        ((1, 1, 8), (2, 1, 16), (1, 1, 24), (2, 2, 64), (1, 1, 72), (2, 1, 80), (1, 1, 96), (1, 1, 128), (2, 1, 248))
    )
)
"""Prompts of one row and of many: whole ones, and some whose beginning is already in the cache."""
