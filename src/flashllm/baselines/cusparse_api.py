# SPDX-License-Identifier: Apache-2.0
"""ctypes bindings of the few cuSPARSE calls that a captured product needs.

CuPy refuses its own cuSPARSE calls while a stream is being captured, so these go straight to the library. Constants
follow the public header cusparse.h, version 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from typing import Any

from flashllm.baselines import cublas_api
from flashllm.errors import FlashLLMError

NO_TRANSPOSE = 0
INDEX_32 = 2
BASE_ZERO = 0
ORDER_COLUMN, ORDER_ROW = 1, 2
R_32F, R_16F = 0, 2
CSR_ALGORITHMS = {1: 4, 2: 6, 3: 12}
"""CUSPARSE_SPMM_CSR_ALG1 to 3."""

_MATRIX = c_void_p
_SPMM: Sequence[Any] = (
    *(c_void_p, c_int, c_int),  # handle, operations
    *(c_void_p, _MATRIX, _MATRIX, c_void_p, _MATRIX),  # alpha, A, B, beta, C
    *(c_int, c_int),  # compute type, algorithm
)
_PROTOTYPES: dict[str, Sequence[Any]] = {
    "cusparseCreate": (POINTER(c_void_p),),
    "cusparseDestroy": (c_void_p,),
    "cusparseSetStream": (c_void_p, c_void_p),
    # descriptor, rows, columns, values, offsets, columns, values, types of both indices, base, type of values
    "cusparseCreateCsr": (
        POINTER(c_void_p),
        *(c_int64, c_int64, c_int64),
        *(c_void_p, c_void_p, c_void_p),
        *(c_int, c_int, c_int, c_int),
    ),
    "cusparseDestroySpMat": (_MATRIX,),
    # descriptor, rows, columns, leading dimension, values, their type, order
    "cusparseCreateDnMat": (POINTER(c_void_p), c_int64, c_int64, c_int64, c_void_p, c_int, c_int),
    "cusparseDestroyDnMat": (_MATRIX,),
    "cusparseSpMM_bufferSize": (*_SPMM, POINTER(c_size_t)),
    "cusparseSpMM": (*_SPMM, c_void_p),
}


class CusparseError(FlashLLMError, RuntimeError):
    """A cuSPARSE call failed; ``status`` is its code."""

    def __init__(self, call: str, status: int) -> None:
        self.status = status
        super().__init__(f"{call} failed with status {status} ({_text(status)})")


@lru_cache(maxsize=1)
def library() -> cublas_api.Library:
    """cuSPARSE. Raises :class:`flashllm.errors.MissingDependencyError` where it is not installed."""
    return cublas_api.Library(cublas_api.open_library("cusparse"), _PROTOTYPES, CusparseError)


@lru_cache(maxsize=1)
def _text_function() -> Any:
    function = cublas_api.open_library("cusparse").cusparseGetErrorString
    function.argtypes, function.restype = (c_int,), c_char_p
    return function


def _text(status: int) -> str:
    text = _text_function()(status)
    return text.decode() if text else "unknown"
