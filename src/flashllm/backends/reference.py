# SPDX-License-Identifier: Apache-2.0
"""The product in NumPy, from the packed buffers: slow, exact, runs anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.bits import kind_of, numpy_dtype, to_bits, widen
from flashllm.formats.weight import SparseWeight

_STRIP_ROWS = 512


def spmm(x: NDArray[Any], w: SparseWeight) -> NDArray[Any]:
    """``y[N, M] = x[N, K] @ W[M, K]^T``, accumulated in float64 and rounded once, to nearest even.

    ``x`` is row-major and of the weight's type, any N >= 0; bf16 is ``ml_dtypes.bfloat16`` or its bits as
    uint16, and y comes in the dtype of x. Holds W dense in 16 bits and one strip of it in float64. Multiplies the
    pruned zeros of every format: one of them times infinity is NaN.
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
    dense = w.to_host().to_dense().view(np.uint16)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, m, _STRIP_ROWS):
            strip = widen(dense[start : start + _STRIP_ROWS], w.dtype).astype(np.float64)
            y[:, start : start + _STRIP_ROWS] = to_bits(wide @ strip.T, w.dtype)
    return y.view(x.dtype)
