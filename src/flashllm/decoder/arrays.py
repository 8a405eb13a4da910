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
"""The most elements of a head, in all kernels that work on heads."""
MAX_SIZE = 1 << 30
"""The largest size of an array: kernels count twice as many columns, plus those of a block, in 32 bits."""
_NAMES = {"fp16": ("float16",), "bf16": ("bfloat16", "uint16"), "fp32": ("float32",)}


def check(name: str, array: Any, shape: Sequence[int | str], dtype: str) -> tuple[int, ...]:
    """The shape of ``array``, once checked to be a NumPy or CuPy array that a kernel may be given as ``name``.

    ``shape`` has a number for each size that is known and, for each that is up to the array, a word for the message:
    ``("rows", 576)``. ``dtype`` is ``"fp16"``, ``"bf16"`` (or its patterns as uint16), ``"fp32"`` or NumPy's name of an
    integer type. Raises ``ArgumentError`` unless type and shape are these, the array is C-contiguous, every size is at
    least 1 and (except for ``"uint8"``, which no kernel counts) at most :data:`MAX_SIZE`, and an array of
    floating-point numbers starts at a multiple of 16 bytes, as every allocation on a GPU does.
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
