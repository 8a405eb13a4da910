# SPDX-License-Identifier: Apache-2.0
"""Checks of the arrays that the host functions of this package pass to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashllm.errors import ArgumentError
from flashllm.formats.sources import is_cupy

VECTOR_BYTES = 16
"""Bytes that a thread loads or stores at once."""
MAX_HEAD_DIM = 256
"""Elements of a head, of all kernels that know heads."""
MAX_SIZE = 1 << 30
"""Of an array: kernels count twice as many columns, and those of a block more, in 32 bits."""
_NAMES = {"fp16": ("float16",), "bf16": ("bfloat16", "uint16"), "fp32": ("float32",)}


def check(name: str, array: Any, shape: Sequence[int | str], dtype: str) -> tuple[int, ...]:
    """The shape of ``array``, which is a NumPy or CuPy array that a kernel may be given as ``name``.

    ``shape`` has a number for each size that is known and a word, for the message, for each that is the array's own:
    ``("rows", 576)``. ``dtype`` is ``"fp16"``, ``"bf16"`` (or its patterns as uint16), ``"fp32"`` or NumPy's name of a
    type of integers. Raises ``ArgumentError`` unless type and shape are these, every size is at least 1 and, but of
    ``"uint8"``, which no kernel counts, at most :data:`MAX_SIZE`, and the array is C-contiguous; one of floating-point
    numbers starts at a multiple of 16 bytes, as every allocation on a GPU does.
    """
    expected = f"{dtype} [{', '.join(str(size) for size in shape)}]"
    if not (isinstance(array, np.ndarray) or is_cupy(array)):
        raise ArgumentError(name, expected=f"a NumPy or CuPy array, {expected}", got=type(array).__name__)
    actual = tuple(int(size) for size in array.shape)
    same = len(actual) == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted for size, wanted in zip(actual, shape, strict=True)
    )
    if not same or str(array.dtype) not in _NAMES.get(dtype, (dtype,)):
        raise ArgumentError(name, expected=expected, got=f"{array.dtype} {list(actual)}")
    if max(actual) > MAX_SIZE and dtype != "uint8":
        raise ArgumentError(name, expected=f"sizes of at most {MAX_SIZE}", got=str(list(actual)))
    if not array.flags.c_contiguous:
        raise ArgumentError(name, expected=f"a C-contiguous array, {expected}", got=f"strides {array.strides}")
    if dtype in _NAMES and (address := address_of(array)) % VECTOR_BYTES:
        expected = f"an array aligned to {VECTOR_BYTES} bytes"
        raise ArgumentError(name, expected=expected, got=f"address {address:#x}")
    return actual


def address_of(array: Any) -> int:
    """Address of the first element of a NumPy or CuPy array."""
    return int(array.data.ptr if is_cupy(array) else array.ctypes.data)


def check_optional(name: str, array: Any, shape: Sequence[int | str], dtype: str) -> Any:
    """The argument of a kernel for an array that may be absent: ``array``, checked, or a null pointer for ``None``."""
    if array is None:
        return np.uint64(0)
    check(name, array, shape, dtype)
    return array


def check_epsilon(eps: float) -> np.float32:
    """``eps`` of a norm as the argument of a kernel; ``ArgumentError`` unless it is positive and finite in fp32."""
    if not 0 < np.float32(eps) < np.inf:
        raise ArgumentError("eps", expected="a positive number", got=repr(eps))
    return np.float32(eps)
