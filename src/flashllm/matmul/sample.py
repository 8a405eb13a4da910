# SPDX-License-Identifier: Apache-2.0
"""What a matrix would take in each format, from packing some of its rows.

Random zeros follow from density alone; real masks do not: one dense row halves the windows of slot24, dense columns
leave the streams of a bitmap uneven. So slabs of rows spread over M, and the one of the densest row, are packed, and
the formats' estimates for random zeros corrected by what comes out.
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
"""Slabs of 128 rows that are packed, beside that of the densest row."""
_COUNTED_ROWS = 4096  # at a time


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is known of a matrix W [M, K] before it is packed."""

    shape: tuple[int, int]
    dtype: DType
    density: float
    """Fraction of elements that are not zero."""
    weight_bytes: dict[str, int]
    """Bytes of the packed weight, by format."""
    packed_rows: int = 0
    """Rows that were packed to learn that; 0: reckoned for zeros at random places."""


def estimated(shape: tuple[int, int], density: float, formats: Sequence[str], *, dtype: DType = "fp16") -> Contents:
    """A matrix of which only shape and density are known: zeros at random places.

    Raises :class:`ArgumentError` for an impossible shape or density.
    """
    shape = check_shape(shape, argument="shape")
    if not 0.0 <= density <= 1.0:
        raise ArgumentError("density", expected="a fraction of stored elements from 0 to 1", got=repr(density))
    found = {name: weight_class(name).estimated_bytes(shape, density) for name in formats}
    return Contents(shape=shape, dtype=dtype, density=density, weight_bytes=found)


def sampled(a: Any, formats: Sequence[str], *, dtype: str | None = None) -> Contents:
    """A dense NumPy or CuPy matrix, or a ``scipy.sparse`` one, as its ``from_dense`` or ``from_scipy`` takes it.

    Counts its elements and packs at most 9 slabs of 128 rows in each of ``formats``; when those are all rows there
    are, bytes are exact. Raises :class:`ArgumentError`, :class:`FormatError` for a source that cannot be packed.
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
            a = a.view(np.uint16)  # bits: indexing and comparing bfloat16 is not CuPy's
    else:
        shape = check_dense(a)
        kind = check_dtype(dtype) if dtype is not None else default_dtype(a)
    return _contents(shape, kind, _nonzero_by_row(a), formats, a, sparse=False)


def representative(shape: tuple[int, int], part: Any, formats: Sequence[str], *, dtype: DType) -> Contents:
    """W [M, K] that is everywhere like ``part``, a dense matrix on the host."""
    density = np.count_nonzero(part) / part.size
    found = {name: _scaled(name, shape, density, part, density, dtype, sparse=False) for name in formats}
    return Contents(shape=shape, dtype=dtype, density=density, weight_bytes=found, packed_rows=int(part.shape[0]))


def slabs_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows to pack: of slabs spread evenly, the first and the last among them, and of that of the densest row."""
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
    """Bytes of a matrix of ``shape`` and ``density``: the estimate, times what the estimate for ``part`` is off by."""
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
    """Elements of each row of a NumPy or CuPy matrix that are not zero."""
    counts = []
    for start in range(0, a.shape[0], _COUNTED_ROWS):
        part = a[start : start + _COUNTED_ROWS]
        stored = (part.view(np.uint16) & MAGNITUDE) != 0 if part.dtype.itemsize == 2 else part != 0
        count = stored.sum(axis=1)
        counts.append(np.asarray(count.get() if is_cupy(count) else count, np.int64))
    return np.concatenate(counts)


def _stored_by_row(csr: Any) -> NDArray[np.int64]:
    """Elements of each row of a CSR matrix that are not zero; explicit zeros are pruned."""
    ends = np.concatenate([[0], np.cumsum(csr.data[: int(csr.indptr[-1])] != 0)])
    counts: NDArray[np.int64] = np.diff(ends[csr.indptr]).astype(np.int64)
    return counts
