# SPDX-License-Identifier: Apache-2.0
"""ctypes bindings of the few cuBLAS and cublasLt calls that a captured dense product needs.

CuPy refuses its own cuBLAS calls while a stream is being captured, so these go straight to the library.
Constants and struct sizes follow the public headers cublas_api.h and cublasLt.h, versions 12 and 13.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from typing import Any

from flashllm.errors import FlashLLMError, MissingDependencyError

OP_N, OP_T = 0, 1
COMPUTE_32F = 68
COMPUTE_32F_PEDANTIC = 69  # no tensor cores for 16-bit operands
R_32F = 0
DATA_TYPES = {"fp16": 2, "bf16": 14}  # CUDA_R_16F, CUDA_R_16BF
GEMM_DEFAULT = -1
DESC_TRANSA, DESC_TRANSB = 3, 4
PREF_MAX_WORKSPACE_BYTES = 1
PREF_REDUCTION_SCHEME_MASK = 3
REDUCE_IN_FP32 = 1 | 2  # in place or in the compute type; not in the 16-bit output type (4)
NOT_SUPPORTED = 15
LT_ALIGNMENT = 256
"""Bytes: cublasLt's heuristics assume that addresses are multiples of this."""

# Names under which the library is looked for when no installed package says where it is.
_SONAMES = {
    "cublas": ("libcublas.so.13", "libcublas.so.12"),
    "cublasLt": ("libcublasLt.so.13", "libcublasLt.so.12"),
    "cusparse": ("libcusparse.so.12",),
}
_CUBLAS_PACKAGES = "nvidia-cublas (CUDA 13), nvidia-cublas-cu12"
_PACKAGES = {
    "cublas": _CUBLAS_PACKAGES,
    "cublasLt": _CUBLAS_PACKAGES,
    "cusparse": "nvidia-cusparse (CUDA 13), nvidia-cusparse-cu12",
}


class CublasError(FlashLLMError, RuntimeError):
    """A cuBLAS call failed; ``status`` is its code."""

    def __init__(self, call: str, status: int) -> None:
        self.status = status
        super().__init__(f"{call} failed with status {status} ({status_text(status)})")


class MatmulAlgo(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", MatmulAlgo),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


_VOID = c_void_p
_BLAS: dict[str, Sequence[Any]] = {
    "cublasCreate_v2": (POINTER(_VOID),),
    "cublasDestroy_v2": (_VOID,),
    "cublasGetProperty": (c_int, POINTER(c_int)),
    "cublasSetStream_v2": (_VOID, _VOID),
    "cublasSetWorkspace_v2": (_VOID, _VOID, c_size_t),
    # handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo
    "cublasGemmEx": (
        _VOID,
        c_int,
        c_int,
        c_int,
        c_int,
        c_int,
        _VOID,
        _VOID,
        c_int,
        c_int,
        _VOID,
        c_int,
        c_int,
        _VOID,
        _VOID,
        c_int,
        c_int,
        c_int,
        c_int,
    ),
}
_LT: dict[str, Sequence[Any]] = {
    "cublasLtCreate": (POINTER(_VOID),),
    "cublasLtDestroy": (_VOID,),
    "cublasLtMatmulDescCreate": (POINTER(_VOID), c_int, c_int),
    "cublasLtMatmulDescDestroy": (_VOID,),
    "cublasLtMatmulDescSetAttribute": (_VOID, c_int, _VOID, c_size_t),
    "cublasLtMatrixLayoutCreate": (POINTER(_VOID), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (_VOID,),
    "cublasLtMatmulPreferenceCreate": (POINTER(_VOID),),
    "cublasLtMatmulPreferenceDestroy": (_VOID,),
    "cublasLtMatmulPreferenceSetAttribute": (_VOID, c_int, _VOID, c_size_t),
    # handle, operation, A, B, C, D layouts, preference, requested, results, returned
    "cublasLtMatmulAlgoGetHeuristic": (
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        c_int,
        POINTER(HeuristicResult),
        POINTER(c_int),
    ),
    # handle, operation, alpha, A, Adesc, B, Bdesc, beta, C, Cdesc, D, Ddesc, algo, workspace, bytes, stream
    "cublasLtMatmul": (
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        _VOID,
        POINTER(MatmulAlgo),
        _VOID,
        c_size_t,
        _VOID,
    ),
}


class Library:
    """The functions of one shared library, with argument types set; :meth:`call` raises ``error`` on a bad status."""

    def __init__(
        self,
        dll: Any,
        prototypes: dict[str, Sequence[Any]],
        error: Callable[[str, int], Exception] = CublasError,
    ) -> None:
        self._functions: dict[str, Any] = {}
        self._error = error
        for name, arguments in prototypes.items():
            function = getattr(dll, name)
            function.argtypes, function.restype = tuple(arguments), c_int
            self._functions[name] = function

    def status(self, name: str, *arguments: Any) -> int:
        """Call ``name`` and return its status code."""
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``name``. Raises the library's error unless it returns success."""
        status = self._functions[name](*arguments)
        if status:
            raise self._error(name, status)


class Descriptor:
    """An object of a library, destroyed with the last reference to it; what it describes is kept alive as long."""

    def __init__(
        self, library: Library, create: str, destroy: str, arguments: Sequence[Any], described: Any = None
    ) -> None:
        self.at, self._described = c_void_p(), described
        library.call(create, ctypes.byref(self.at), *arguments)
        weakref.finalize(self, library.status, destroy, self.at)


@lru_cache(maxsize=1)
def libraries() -> tuple[Library, Library]:
    """(cuBLAS, cublasLt). Raises :class:`MissingDependencyError` when they are not installed."""
    lt = open_library("cublasLt")  # first: libcublas needs it
    blas = open_library("cublas")
    return Library(blas, _BLAS), Library(lt, _LT)


@lru_cache(maxsize=1)
def _status_function() -> Any:
    function = open_library("cublas").cublasGetStatusString
    function.argtypes, function.restype = (c_int,), c_char_p
    return function


def status_text(status: int) -> str:
    """cuBLAS's own name of a status code."""
    text = _status_function()(status)
    return text.decode() if text else "unknown"


@lru_cache(maxsize=1)
def version() -> str:
    """Version of the cuBLAS in use, e.g. ``"13.1.0"``."""
    blas, _ = libraries()
    numbers = []
    for part in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        value = c_int()
        blas.call("cublasGetProperty", part, ctypes.byref(value))
        numbers.append(str(value.value))
    return ".".join(numbers)


@lru_cache(maxsize=3)
def open_library(name: str) -> Any:
    """cublas, cublasLt or cusparse, wherever it is installed. Raises :class:`MissingDependencyError`."""
    tried = []
    for candidate in (*_pathfinder(name), *_SONAMES[name]):
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(f"{candidate}: {error}")
    raise MissingDependencyError(
        f"lib{name} was not found; install {_PACKAGES[name]} or the CUDA toolkit ({'; '.join(tried)})"
    )


def _pathfinder(name: str) -> list[str]:
    """Where CuPy looks for the library too: wheels, conda, the system, CUDA_HOME; empty when it is nowhere."""
    try:
        from cuda import pathfinder
    except ImportError:
        return []
    try:
        path = pathfinder.load_nvidia_dynamic_lib(name).abs_path
    except (RuntimeError, ValueError):  # not found; a name this pathfinder does not know
        return []
    return [path] if path else []
