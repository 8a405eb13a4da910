# SPDX-License-Identifier: Apache-2.0
"""Matrices from decoded strips of 16-bit patterns: what the formats' ``to_dense`` and ``to_scipy`` return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.formats.base import DType
from flashllm.formats.bits import MAGNITUDE, numpy_dtype, widen


def dense_of(strips: Iterable[NDArray[np.uint16]], shape: tuple[int, int], dtype: DType) -> NDArray[Any]:
    """Dense [M, K], float16 or ml_dtypes.bfloat16, from strips [rows, K] in row order."""
    out = np.empty(shape, np.uint16)
    first = 0
    for strip in strips:
        out[first : first + len(strip)] = strip
        first += len(strip)
    return out.view(numpy_dtype(dtype))


def csr_of(strips: Iterable[NDArray[np.uint16]], shape: tuple[int, int], dtype: DType) -> Any:
    """``scipy.sparse.csr_array`` [M, K] of float32 with sorted indices, from strips [rows, K] in row order."""
    import scipy.sparse

    counts, indices, data = [], [], []
    for strip in strips:
        stored = (strip & MAGNITUDE) != 0
        counts.append(np.count_nonzero(stored, axis=1))
        indices.append(np.nonzero(stored)[1].astype(np.int32))
        data.append(widen(strip[stored], dtype))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    return scipy.sparse.csr_array((np.concatenate(data), np.concatenate(indices), indptr), shape=shape)
