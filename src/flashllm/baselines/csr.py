# SPDX-License-Identifier: Apache-2.0
"""Compressed sparse rows of a 16-bit matrix, made with array operations on the host or the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.errors import ArgumentError
from flashllm.formats.sources import array_module, is_cupy

_STRIP_ELEMENTS = 1 << 26  # of temporaries, 8 bytes each
_MOST = 2**31 - 1


def check_dense(dense: Any) -> Any:
    """NumPy or CuPy, whichever made ``dense``; :class:`ArgumentError` unless it is C-contiguous float16 [M, K]."""
    if not isinstance(dense, np.ndarray) and not is_cupy(dense):
        raise ArgumentError("dense", expected="a NumPy or CuPy array", got=type(dense).__name__)
    if dense.ndim != 2 or dense.dtype != np.float16 or min(dense.shape) < 1:
        got = f"shape {list(dense.shape)}, {dense.dtype}"
        raise ArgumentError("dense", expected="float16 of shape [M >= 1, K >= 1]", got=got)
    if not dense.flags.c_contiguous:
        raise ArgumentError("dense", expected="a C-contiguous array", got=f"strides {dense.strides}")
    return array_module(dense)


def compress(dense: Any) -> tuple[Any, Any, Any]:
    """Row offsets (int32 [M + 1]), columns (int32) and values (float16) of what is not zero, in order.

    Raises :class:`ArgumentError` for any array but a C-contiguous float16 [M, K], and for 2^31 or more values.
    """
    xp = check_dense(dense)
    rows, columns = dense.shape
    counts = xp.count_nonzero(dense, axis=1)
    total = int(counts.sum())
    if total > _MOST:
        raise ArgumentError("dense", expected=f"at most {_MOST} values that are not zero", got=str(total))
    offsets = xp.zeros(rows + 1, dtype=xp.int32)
    offsets[1:] = xp.cumsum(counts)
    kept_columns, values = xp.empty(total, dtype=xp.int32), xp.empty(total, dtype=xp.float16)
    strip, at = max(1, _STRIP_ELEMENTS // columns), 0
    for first in range(0, rows, strip):
        part = dense[first : first + strip].reshape(-1)
        places = xp.flatnonzero(part)
        end = at + places.size
        kept_columns[at:end] = places % columns
        values[at:end] = part[places]
        at = end
    return offsets, kept_columns, values
