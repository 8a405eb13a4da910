# SPDX-License-Identifier: Apache-2.0
"""The product in NumPy, from the packed buffers: slow, exact, runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.base import SparseWeight
from flashllm.formats.bits import kind_of, numpy_dtype, to_bits, widen


def spmm(x: NDArray[Any], w: SparseWeight) -> NDArray[Any]:
    """``y[N, M] = x[N, K] @ W[M, K]^T``, accumulated in float64 and rounded once, to nearest even.

    ``x`` is row-major and of the weight's type, any N >= 0; bf16 is ``ml_dtypes.bfloat16`` or its bits as
    uint16, and y comes in the dtype of x.
    W is decoded a strip of rows at a time, so memory stays near that of ``y``. Like the tensor-core
    kernels this multiplies pruned zeros too: a pruned zero times infinity is NaN.
    """
    m, k = w.shape
    if not isinstance(x, np.ndarray):
        raise ArgumentError("x", expected="a NumPy array for the reference backend", got=type(x).__name__)
    if x.ndim != 2 or x.shape[1] != k:
        raise ArgumentError("x", expected=f"shape [N, {k}]", got=str(list(x.shape)))
    if kind_of(x.dtype) != w.dtype and not (w.dtype == "bf16" and x.dtype == np.uint16):
        raise ArgumentError("x", expected=f"dtype {numpy_dtype(w.dtype)} like the weight's", got=str(x.dtype))
    wide = widen(np.ascontiguousarray(x).view(np.uint16), w.dtype).astype(np.float64)
    y = np.empty((x.shape[0], m), dtype=np.uint16)
    with np.errstate(invalid="ignore", over="ignore"):
        for start, strip in _strips(w.to_host()):
            values = widen(np.ascontiguousarray(strip).view(np.uint16), w.dtype).astype(np.float64)
            y[:, start : start + len(strip)] = to_bits(wide @ values.T, w.dtype)
    return y.view(x.dtype)


def _strips(w: SparseWeight) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, dense rows) over the whole of W; formats that can, decode only one strip at a time."""
    blocks = getattr(w, "iter_row_blocks", None)
    if blocks is None:
        yield 0, w.to_dense()
    else:
        yield from blocks()
