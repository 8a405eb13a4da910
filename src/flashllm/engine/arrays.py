# SPDX-License-Identifier: Apache-2.0
"""Arrays that kernels accept on any device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.formats.bits import bfloat16, widen

ALIGNMENT = 256
"""Alignment in bytes of every GPU allocation. Kernels load 16 bytes at once; libraries rely on more."""


def empty(xp: Any, shape: tuple[int, ...], dtype: Any, what: str) -> Any:
    """An uninitialised array of ``xp``. Raises ``DeviceMemoryError``, which says that ``what`` does not fit."""
    kind = np.dtype(dtype)
    if xp is np:
        return aligned(np.empty(shape, kind))
    from flashllm.device import memory_errors

    with memory_errors(what, math.prod(shape) * kind.itemsize):
        return xp.empty(shape, kind)


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """``array`` itself if it is aligned like a GPU allocation, otherwise a copy that is."""
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy: NDArray[Any] = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def widened(array: NDArray[Any]) -> NDArray[np.float32]:
    """An engine's NumPy array, fp16 or the bits of bf16, converted to fp32."""
    return widen(array.view(np.uint16), "bf16" if array.dtype == np.uint16 else "fp16")


def rounded(values: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """``values`` converted to an engine's type: float16, float32, or uint16 for the bits of bf16."""
    return values.astype(bfloat16()).view(np.uint16) if dtype == np.uint16 else values.astype(dtype)
