# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields that every weight has."""

from __future__ import annotations

from typing import Any, NoReturn, TypeGuard

import numpy as np

from flashllm.errors import FormatError, brief
from flashllm.formats.base import DTYPES, MAX_DIMENSION


def refuse(field: str, expected: str, got: Any, path: str | None) -> NoReturn:
    """Raise ``FormatError`` for a field that holds ``got``; ``path`` is for the message."""
    raise FormatError(field=field, expected=expected, got=brief(got), path=path)


def is_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer; a bool does not count as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_shape_and_type(*, shape: Any, dtype: Any, path: str | None) -> None:
    """Raise ``FormatError`` unless ``shape`` is a tuple or list (M, K) in range and ``dtype`` is a value type."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(is_int(d) for d in shape):
        refuse("shape", "two integers (M, K)", shape, path)
    if not all(1 <= d <= MAX_DIMENSION for d in shape):
        refuse("shape", "M and K in 1..2^31-1", tuple(shape), path)
    if dtype not in DTYPES:
        refuse("dtype", " or ".join(map(repr, DTYPES)), dtype, path)


def check_nnz(nnz: Any, *, shape: tuple[int, int] | list[int], path: str | None) -> None:
    """Raise ``FormatError`` unless ``nnz`` elements fit a matrix of ``shape``."""
    if not is_int(nnz) or not 0 <= nnz <= shape[0] * shape[1]:
        refuse("nnz", f"an integer in 0..{shape[0] * shape[1]}", nnz, path)


def check_array(
    field: str, array: Any, dtype: Any, dimensions: tuple[int | None, ...], *, reason: str, path: str | None
) -> None:
    """Raise ``FormatError`` unless ``array`` (NumPy or CuPy) is contiguous and has this type and shape.

    A dimension of ``None`` may have any size.
    """
    fits = array.ndim == len(dimensions) and all(
        want in (None, size) for want, size in zip(dimensions, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits or not array.flags.c_contiguous:
        text = ", ".join("any" if size is None else str(size) for size in dimensions)
        expected = f"a contiguous array of {np.dtype(dtype).name} [{text}] for {reason}"
        raise FormatError(field=field, expected=expected, got=f"{array.dtype} {list(array.shape)}", path=path)
