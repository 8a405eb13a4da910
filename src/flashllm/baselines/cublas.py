# SPDX-License-Identifier: Apache-2.0
"""Dense products y[N, M] = x[N, K] @ W[M, K]^T by cuBLAS and cublasLt, with a handle of our own.

Inputs and outputs are fp16 or bf16, sums fp32. Every launch may be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashllm.baselines import cublas_api as api
from flashllm.errors import ArgumentError

WORKSPACE_BYTES = 32 * 2**20
_POINTER = ctypes.c_void_p

Launch = Callable[[int, int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How W and y lie in memory, row-major: ``w`` as [M, K] or [K, M], ``y`` as [N, M] or [M, N]. x is [N,
    K]."""

    w: Literal["mk", "km"] = "mk"
    y: Literal["nm", "mn"] = "nm"

    @property
    def label(self) -> str:
        """E.g. ``W[M,K] y[N,M]``."""
        return f"W[{','.join(self.w.upper())}] y[{','.join(self.y.upper())}]"


@dataclass(frozen=True, kw_only=True)
class GemmCall:
    """Arguments of a column-major C[m, n] = op(A)[m, k] @ op(B)[k, n]; A is W or, if not ``a_is_w``, x."""

    transa: int
    transb: int
    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldc: int
    a_is_w: bool


def gemm_call(layout: Layout, *, m: int, k: int, n: int) -> GemmCall:
    """The column-major call that computes y = x @ W^T (W is m x k, n rows of x) with buffers laid out as
    ``layout``.

    A row-major [r, c] buffer is a column-major c x r matrix with leading dimension c, i.e. its own transpose.
    """
    w_leading = k if layout.w == "mk" else m
    if layout.y == "nm":  # column-major y^T: M x N = W (M x K) @ x^T (K x N)
        op_w = api.OP_T if layout.w == "mk" else api.OP_N
        return GemmCall(transa=op_w, transb=api.OP_N, m=m, n=n, k=k, lda=w_leading, ldb=k, ldc=m, a_is_w=True)
    # y stored [M, N] is column-major y: N x M = x (N x K) @ W^T (K x M)
    op_w = api.OP_N if layout.w == "mk" else api.OP_T
    return GemmCall(transa=api.OP_T, transb=op_w, m=n, n=m, k=k, lda=k, ldb=w_leading, ldc=n, a_is_w=False)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute the product. ``launch(w, x, y, stream)`` takes addresses and a handle."""

    label: str
    layout: Layout
    launch: Launch


class Cublas:
    """cuBLAS and cublasLt handles with a 32 MB workspace on the current GPU; use with ``with`` or
    :meth:`close`."""

    def __init__(self) -> None:
        import cupy

        self._blas, self._lt = api.libraries()
        # An allocation first: it makes the GPU's context current, which the handles attach to.
        self._workspace = cupy.empty(WORKSPACE_BYTES, dtype=cupy.uint8)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._one_at, self._zero_at = ctypes.addressof(self._one), ctypes.addressof(self._zero)
        handle, lt_handle = _POINTER(), _POINTER()
        self._blas.call("cublasCreate_v2", ctypes.byref(handle))
        self._lt.call("cublasLtCreate", ctypes.byref(lt_handle))
        self._handle, self._lt_handle = handle, lt_handle
        self._stream: int | None = None
        self._closed = False

    def __enter__(self) -> Cublas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Destroy the handles. No graph captured with them may run afterwards: the workspace is freed."""
        if not self._closed:
            self._closed = True
            self._blas.call("cublasDestroy_v2", self._handle)
            self._lt.call("cublasLtDestroy", self._lt_handle)
            del self._workspace

    def _use_stream(self, stream: int) -> None:
        if stream != self._stream:
            self._blas.call("cublasSetStream_v2", self._handle, stream)
            # Setting the stream resets the workspace to cuBLAS's own, which a capture must not allocate.
            self._blas.call(
                "cublasSetWorkspace_v2",
                self._handle,
                self._workspace.data.ptr,
                ctypes.c_size_t(WORKSPACE_BYTES),
            )
            self._stream = stream

    def gemm_ex(
        self,
        layout: Layout,
        *,
        m: int,
        k: int,
        n: int,
        dtype: str,
        out: str | None = None,
        tensor_cores: bool = True,
    ) -> Candidate:
        """cublasGemmEx with the library's own choice of algorithm; without ``tensor_cores`` in its pedantic mode.

        ``out="fp32"``: y is not rounded to ``dtype``.
        """
        call, kind = gemm_call(layout, m=m, k=k, n=n), _data_type(dtype)
        out_kind = _out_type(dtype, out)
        compute = api.COMPUTE_32F if tensor_cores else api.COMPUTE_32F_PEDANTIC

        def launch(w: int, x: int, y: int, stream: int) -> None:
            self._use_stream(stream)
            a, b = (w, x) if call.a_is_w else (x, w)
            self._blas.call(
                "cublasGemmEx",
                self._handle,
                call.transa,
                call.transb,
                call.m,
                call.n,
                call.k,
                self._one_at,
                a,
                kind,
                call.lda,
                b,
                kind,
                call.ldb,
                self._zero_at,
                y,
                out_kind,
                call.ldc,
                compute,
                api.GEMM_DEFAULT,
            )

        name = "GemmEx" if tensor_cores else "GemmEx pedantic"
        return Candidate(label=f"{name} {layout.label}", layout=layout, launch=launch)

    def lt_candidates(
        self, layout: Layout, *, m: int, k: int, n: int, dtype: str, out: str | None = None, count: int = 8
    ) -> list[Candidate]:
        """Up to ``count`` cublasLt algorithms, in the order in which its heuristic ranks them; ``out`` as above."""
        call, kind = gemm_call(layout, m=m, k=k, n=n), _data_type(dtype)
        operation = self._create("MatmulDesc", api.COMPUTE_32F, api.R_32F)
        self._set("MatmulDesc", operation, api.DESC_TRANSA, ctypes.c_int32(call.transa))
        self._set("MatmulDesc", operation, api.DESC_TRANSB, ctypes.c_int32(call.transb))
        stored_a = (call.m, call.k) if call.transa == api.OP_N else (call.k, call.m)
        stored_b = (call.k, call.n) if call.transb == api.OP_N else (call.n, call.k)
        a_layout = self._create("MatrixLayout", kind, *stored_a, call.lda)
        b_layout = self._create("MatrixLayout", kind, *stored_b, call.ldb)
        c_layout = self._create("MatrixLayout", _out_type(dtype, out), call.m, call.n, call.ldc)
        preference = self._create("MatmulPreference")
        limit = ctypes.c_size_t(WORKSPACE_BYTES)
        self._set("MatmulPreference", preference, api.PREF_MAX_WORKSPACE_BYTES, limit)
        # Split-K pieces added in 16 bits give a different accuracy (108 times the bound at K = 264).
        schemes = ctypes.c_uint32(api.REDUCE_IN_FP32)
        self._set("MatmulPreference", preference, api.PREF_REDUCTION_SCHEME_MASK, schemes)
        results, found = (api.HeuristicResult * count)(), ctypes.c_int(0)
        status = self._lt.status(
            "cublasLtMatmulAlgoGetHeuristic",
            self._lt_handle,
            operation.at,
            a_layout.at,
            b_layout.at,
            c_layout.at,
            c_layout.at,
            preference.at,
            count,
            results,
            ctypes.byref(found),
        )
        if status == api.NOT_SUPPORTED:  # no algorithm for this shape (a misaligned leading dimension, say)
            return []
        if status:
            raise api.CublasError("cublasLtMatmulAlgoGetHeuristic", status)

        def make(index: int) -> Candidate:
            algorithm = results[index].algo

            def launch(w: int, x: int, y: int, stream: int) -> None:
                a, b = (w, x) if call.a_is_w else (x, w)
                self._lt.call(
                    "cublasLtMatmul",
                    self._lt_handle,
                    operation.at,
                    self._one_at,
                    a,
                    a_layout.at,
                    b,
                    b_layout.at,
                    self._zero_at,
                    y,
                    c_layout.at,
                    y,
                    c_layout.at,
                    ctypes.byref(algorithm),
                    self._workspace.data.ptr,
                    WORKSPACE_BYTES,
                    stream,
                )

            return Candidate(label=f"Lt#{index} {layout.label}", layout=layout, launch=launch)

        usable = range(min(found.value, count))
        return [make(i) for i in usable if not results[i].state and results[i].workspace_bytes <= WORKSPACE_BYTES]

    def candidates(
        self, layouts: Sequence[Layout], *, m: int, k: int, n: int, dtype: str, tensor_cores: bool = True
    ) -> list[Candidate]:
        """Everything worth timing for this shape: GemmEx and the best cublasLt heuristics in every layout.

        Without ``tensor_cores``, GemmEx alone in its pedantic mode: the Flash-LLM paper's line without tensor cores.
        """
        found = []
        for layout in layouts:
            found.append(self.gemm_ex(layout, m=m, k=k, n=n, dtype=dtype, tensor_cores=tensor_cores))
            if tensor_cores:
                found += self.lt_candidates(layout, m=m, k=k, n=n, dtype=dtype)
        return found

    def matmul(self, x: Any, w: Any, y: Any, *, dtype: str) -> None:
        """y[N, M] = x[N, K] @ w[M, K]^T on CuPy's current stream; all row-major and contiguous."""
        import cupy

        (n, k), (m, k_w) = x.shape, w.shape
        if k != k_w or y.shape != (n, m):
            raise ArgumentError(
                "y", expected=f"x[N, K], w[M, K], y[N, M]; here y {(n, m)}", got=f"{y.shape}, w {w.shape}"
            )
        for name, array in (("x", x), ("w", w), ("y", y)):
            if not array.flags.c_contiguous:
                raise ArgumentError(name, expected="a C-contiguous array", got=f"strides {array.strides}")
        stream = int(cupy.cuda.get_current_stream().ptr)
        product = self.gemm_ex(Layout(), m=m, k=k, n=n, dtype=dtype)
        product.launch(w.data.ptr, x.data.ptr, y.data.ptr, stream)

    def _create(self, kind: str, *arguments: int) -> api.Descriptor:
        return api.Descriptor(self._lt, f"cublasLt{kind}Create", f"cublasLt{kind}Destroy", arguments)

    def _set(self, kind: str, descriptor: api.Descriptor, attribute: int, value: Any) -> None:
        name = f"cublasLt{kind}SetAttribute"
        self._lt.call(name, descriptor.at, attribute, ctypes.byref(value), ctypes.sizeof(value))


def _out_type(dtype: str, out: str | None) -> int:
    if out not in (None, "fp32"):
        raise ArgumentError("out", expected="None or fp32", got=repr(out))
    return api.R_32F if out == "fp32" else _data_type(dtype)


def _data_type(dtype: str) -> int:
    if dtype not in api.DATA_TYPES:
        raise ArgumentError("dtype", expected="fp16 or bf16", got=repr(dtype))
    return api.DATA_TYPES[dtype]
