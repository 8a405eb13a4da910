# SPDX-License-Identifier: Apache-2.0
"""Row strips of 16-bit patterns from dense arrays and scipy.sparse matrices: what the host encoders read.

A strip is at most ``rows`` consecutive rows of the matrix, so an encoder never holds a dense copy of a
large matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import MAX_DIMENSION, DType
from flashllm.formats.bits import RoundingTally, bfloat16, kind_of, to_bits

Strips = Iterator[NDArray[np.uint16]]


def is_cupy(a: Any) -> bool:
    """True for a CuPy array; imports nothing."""
    return type(a).__module__.partition(".")[0] == "cupy"


def array_module(array: Any) -> Any:
    """``cupy`` for a CuPy array, else ``numpy``."""
    if is_cupy(array):
        import cupy

        return cupy
    return np


def to_host(array: Any) -> NDArray[Any]:
    """``array`` in NumPy: itself, or copied from its device."""
    return array.get() if is_cupy(array) else array  # type: ignore[no-any-return]


def check_shape(shape: tuple[int, ...], *, argument: str) -> tuple[int, int]:
    """(M, K); raises ``ArgumentError`` unless there are two dimensions and both are in 1..2^31-1."""
    if len(shape) != 2:
        raise ArgumentError(argument, expected="a 2-D matrix [M, K]", got=f"shape {tuple(shape)}")
    rows, columns = int(shape[0]), int(shape[1])
    if not (1 <= rows <= MAX_DIMENSION and 1 <= columns <= MAX_DIMENSION):
        raise ArgumentError(argument, expected="M and K in 1..2^31-1", got=f"shape {(rows, columns)}")
    return rows, columns


def check_dense(a: Any) -> tuple[int, int]:
    """Shape (M, K) of a dense NumPy source; raises ``ArgumentError`` for anything else."""
    if not isinstance(a, np.ndarray):
        raise ArgumentError(
            "a", expected="a NumPy or CuPy array (from_scipy takes sparse matrices)", got=type(a).__name__
        )
    shape = check_shape(a.shape, argument="a")
    if not kind_of(a.dtype):
        raise ArgumentError(
            "a", expected="float16, bfloat16, float32 or float64 in native byte order", got=str(a.dtype)
        )
    return shape


def dense_strips(a: NDArray[Any], dtype: DType, rows: int, tally: RoundingTally | None) -> Strips:
    """Strips of a dense matrix, each C-contiguous along the columns."""
    for start in range(0, a.shape[0], rows):
        yield np.ascontiguousarray(to_bits(a[start : start + rows], dtype, tally=tally))


def scipy_strips(csr: Any, dtype: DType, rows: int, tally: RoundingTally | None) -> Strips:
    """Strips of the matrix that ``canonical_csr`` returned; all share one buffer, which each strip overwrites."""
    bits = to_bits(csr.data[: int(csr.indptr[-1])], dtype, tally=tally)
    height, width = csr.shape
    block = np.empty((min(rows, height), width), np.uint16)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        first, last = int(csr.indptr[start]), int(csr.indptr[stop])
        strip = block[: stop - start]
        strip.fill(0)
        strip[np.repeat(np.arange(stop - start), np.diff(csr.indptr[start : stop + 1])), csr.indices[first:last]] = (
            bits[first:last]
        )
        yield strip


def canonical_csr(s: Any) -> Any:
    """``s`` as CSR of float32 or float64 with every position at most once (duplicates are summed).

    ``s`` is a CSR, CSC or COO matrix or array of a real type; integers and booleans become float64. ``s``
    itself is not changed. Indices are checked first, because SciPy accepts any indices and its conversions
    would then read outside the buffers.
    """
    check_sparse(s)
    kind = kind_of(s.dtype)
    if kind in ("fp32", "fp64"):
        typed = s
    elif s.dtype.kind in "iub":
        typed = s.astype(np.float64)
    else:
        raise ArgumentError("s", expected="values of float32, float64, an integer type or bool", got=str(s.dtype))
    csr = typed.tocsr()
    if not csr.has_canonical_format:
        if csr is s or np.may_share_memory(csr.data, s.data):
            csr = csr.copy()
        csr.sum_duplicates()
    return csr


def check_sparse(s: Any, *, path: str | None = None) -> tuple[int, int]:
    """Shape (M, K) of a CSR, CSC or COO matrix whose index arrays are valid.

    Raises ``ArgumentError`` for any other type, and ``FormatError`` for invalid index arrays, naming the
    array and the first bad position.
    """
    layout = getattr(s, "format", None)
    if type(s).__module__.partition(".")[0] != "scipy" or layout not in ("csr", "csc", "coo"):
        what = f"{type(s).__name__}{f' in {layout} layout' if layout else ''}"
        raise ArgumentError("s", expected="a scipy.sparse matrix or array in CSR, CSC or COO layout", got=what)
    rows, columns = check_shape(s.shape, argument="s")
    if layout == "coo":
        check_indices(s.row, bound=rows, field="row", path=path)
        check_indices(s.col, bound=columns, field="col", path=path)
        count = len(s.data)
        for field, array in (("row", s.row), ("col", s.col)):
            if len(array) != count:
                raise FormatError(field=field, expected=f"{count} entries, as in data", got=str(len(array)), path=path)
        return rows, columns
    major, minor = (rows, columns) if layout == "csr" else (columns, rows)
    check_indptr(s.indptr, major=major, count=min(len(s.indices), len(s.data)), path=path)
    # Entries past indptr[-1] belong to no row; SciPy never reads them.
    check_indices(s.indices[: int(s.indptr[-1])], bound=minor, field="indices", path=path)
    return rows, columns


def check_indices(indices: NDArray[Any], *, bound: int, field: str, path: str | None = None) -> None:
    """Raise ``FormatError`` unless every entry is in 0..bound-1."""
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < bound):
        at = int(np.argmax((indices < 0) | (indices >= bound)))
        raise FormatError(field=field, index=at, expected=f"0..{bound - 1}", got=str(indices[at]), path=path)


def check_indptr(indptr: NDArray[Any], *, major: int, count: int, path: str | None = None) -> None:
    """Raise ``FormatError`` unless ``indptr`` delimits ``major`` rows, in order, within ``count`` stored elements."""
    if indptr.shape != (major + 1,):
        raise FormatError(field="indptr", expected=f"shape ({major + 1},)", got=f"shape {indptr.shape}", path=path)
    if int(indptr[0]) != 0:
        raise FormatError(field="indptr", index=0, expected="0", got=str(indptr[0]), path=path)
    falls = indptr[1:] < indptr[:-1]
    if falls.any():
        at = int(np.argmax(falls)) + 1
        raise FormatError(
            field="indptr", index=at, expected=f"at least {indptr[at - 1]}", got=str(indptr[at]), path=path
        )
    if int(indptr[-1]) > count:
        raise FormatError(
            field="indptr",
            index=major,
            expected=f"at most {count} stored elements",
            got=str(indptr[-1]),
            path=path,
        )


def default_dtype(a: Any) -> DType:
    """bf16 for bf16 input, fp16 for any other."""
    return "bf16" if a.dtype == bfloat16() else "fp16"
