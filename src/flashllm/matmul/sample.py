# SPDX-License-Identifier: Apache-2.0
"""How many bytes a matrix would take in each format, estimated by packing some of its rows.

For zeros at random places, the density alone decides. For real masks it does not: one dense row halves the windows of
slot24, and dense columns leave the streams of a bitmap uneven. So slabs of rows spread over M, and the slab of the
densest row, are packed, and the formats' estimates for random zeros are corrected by the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.formats.bits import MAGNITUDE, check_dtype
from flashllm.formats.sources import canonical_csr, check_dense, check_shape, default_dtype, is_cupy
from flashllm.formats.tiles import TILE_M
from flashllm.registry import weight_class

SLABS = 8
"""Slabs of 128 rows that are packed, besides that of the densest row."""
_COUNTED_ROWS = 4096  # at a time


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is known about a matrix W [M, K] before it is packed."""

    shape: tuple[int, int]
    dtype: DType
    density: float
    """Fraction of elements that are not zero."""
    weight_bytes: dict[str, int]
    """Bytes of the packed weight, by format."""
    packed_rows: int = 0
    """Rows that were packed to learn these bytes; 0: estimated for zeros at random places."""


def estimated(shape: tuple[int, int], density: float, formats: Sequence[str], *, dtype: DType = "fp16") -> Contents:
    """Contents of a matrix of which only shape and density are known, for zeros at random places.

    Raises :class:`ArgumentError` for an impossible shape or density.
    """
    shape = check_shape(shape, argument="shape")
    if not 0.0 <= density <= 1.0:
        raise ArgumentError("density", expected="a fraction of stored elements from 0 to 1", got=repr(density))
    found = {name: weight_class(name).estimated_bytes(shape, density) for name in formats}
    return Contents(shape=shape, dtype=dtype, density=density, weight_bytes=found)


def sampled(a: Any, formats: Sequence[str], *, dtype: str | None = None) -> Contents:
    """Contents of a dense NumPy or CuPy matrix or a ``scipy.sparse`` one, as ``from_dense`` or ``from_scipy`` takes it.

    Counts its elements and packs at most 9 slabs of 128 rows in each of ``formats``; if the matrix has no other rows,
    bytes are exact. Raises :class:`ArgumentError`, and :class:`FormatError` for a source that cannot be packed.
    """
    if type(a).__module__.partition(".")[0] == "scipy":
        kind = check_dtype(dtype or "fp16")
        csr = canonical_csr(a)
        counts = _stored_by_row(csr)
        return _contents((int(csr.shape[0]), int(csr.shape[1])), kind, counts, formats, csr, sparse=True)
    if is_cupy(a):
        from flashllm.encode.source import layout_of, source_of

        _, kind = source_of(a, dtype)
        shape, _ = layout_of(a)
        if a.dtype.itemsize == 2:
            a = a.view(np.uint16)  # bits, as CuPy does not index or compare bfloat16
    else:
        shape = check_dense(a)
        kind = check_dtype(dtype) if dtype is not None else default_dtype(a)
    return _contents(shape, kind, _nonzero_by_row(a), formats, a, sparse=False)


def representative(shape: tuple[int, int], part: Any, formats: Sequence[str], *, dtype: DType) -> Contents:
    """Contents of W [M, K] that is everywhere like ``part``, a dense matrix on the host."""
    density = np.count_nonzero(part) / part.size
    found = {name: _scaled(name, shape, density, part, density, dtype, sparse=False) for name in formats}
    return Contents(shape=shape, dtype=dtype, density=density, weight_bytes=found, packed_rows=int(part.shape[0]))


def slabs_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows to pack: those of evenly spread slabs, including the first and last, and of the densest row's slab."""
    slabs = -(-counts.size // TILE_M)
    spread = np.linspace(0, slabs - 1, min(SLABS, slabs)).round().astype(np.int64)
    chosen = np.union1d(spread, [int(counts.argmax()) // TILE_M])
    rows = (chosen[:, None] * TILE_M + np.arange(TILE_M)).reshape(-1)
    return rows[rows < counts.size]


def _contents(
    shape: tuple[int, int], dtype: DType, counts: NDArray[np.int64], formats: Sequence[str], a: Any, *, sparse: bool
) -> Contents:
    rows = slabs_of(counts)
    part = a if rows.size == counts.size else _take(a, rows)
    density = int(counts.sum()) / (shape[0] * shape[1])
    part_density = int(counts[rows].sum()) / (rows.size * shape[1])
    found = {name: _scaled(name, shape, density, part, part_density, dtype, sparse=sparse) for name in formats}
    return Contents(shape=shape, dtype=dtype, density=density, weight_bytes=found, packed_rows=int(rows.size))


def _scaled(
    name: str, shape: tuple[int, int], density: float, part: Any, part_density: float, dtype: DType, *, sparse: bool
) -> int:
    """Bytes of a matrix of ``shape`` and ``density``: the estimate, times the factor by which ``part``'s is off."""
    made = weight_class(name)
    packed = made.from_scipy(part, dtype=dtype) if sparse else made.from_dense(part, dtype=dtype)
    uneven = packed.nbytes / made.estimated_bytes(packed.shape, part_density)
    return round(made.estimated_bytes(shape, density) * uneven)


def _take(a: Any, rows: NDArray[np.int64]) -> Any:
    """Some rows of a matrix of any kind."""
    if is_cupy(a):
        import cupy

        return a[cupy.asarray(rows)]
    return a[rows]


def _nonzero_by_row(a: Any) -> NDArray[np.int64]:
    """Number of nonzero elements in each row of a NumPy or CuPy matrix."""
    counts = []
    for start in range(0, a.shape[0], _COUNTED_ROWS):
        part = a[start : start + _COUNTED_ROWS]
        stored = (part.view(np.uint16) & MAGNITUDE) != 0 if part.dtype.itemsize == 2 else part != 0
        count = stored.sum(axis=1)
        counts.append(np.asarray(count.get() if is_cupy(count) else count, np.int64))
    return np.concatenate(counts)


def _stored_by_row(csr: Any) -> NDArray[np.int64]:
    """Number of nonzero elements in each row of a CSR matrix; explicit zeros are pruned."""
    ends = np.concatenate([[0], np.cumsum(csr.data[: int(csr.indptr[-1])] != 0)])
    counts: NDArray[np.int64] = np.diff(ends[csr.indptr]).astype(np.int64)
    return counts
