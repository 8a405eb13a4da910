# SPDX-License-Identifier: Apache-2.0
"""The column-major arithmetic of the cuBLAS baseline, against a NumPy emulation of the C calls."""

from __future__ import annotations

import ctypes
from typing import Any

import fake_gpu
import numpy as np
import pytest

from flashllm.baselines import cublas_api
from flashllm.baselines.cublas import Cublas, Layout, gemm_call
from flashllm.bench.data import random_matrix
from flashllm.bench.systems import LAYOUTS_BOTH, CublasSystem, dense_copies
from flashllm.errors import ArgumentError, MissingDependencyError

M, K, N = 24, 40, 8


def _operands() -> tuple[Any, Any, Any]:
    x = random_matrix(N, K, seed=1).view(fake_gpu.Array)
    w = random_matrix(M, K, density=0.5, seed=2).view(fake_gpu.Array)
    return x, w, (x.astype(np.float32) @ w.astype(np.float32).T).astype(np.float16)


def test_default_layout_is_the_textbook_call() -> None:
    call = gemm_call(Layout(), m=M, k=K, n=N)
    assert (call.transa, call.transb) == (cublas_api.OP_T, cublas_api.OP_N)
    assert (call.m, call.n, call.k, call.lda, call.ldb, call.ldc, call.a_is_w) == (M, N, K, K, K, M, True)


@pytest.mark.parametrize("layout", LAYOUTS_BOTH, ids=lambda layout: layout.label)
def test_every_candidate_of_every_layout_computes_the_product(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    fake_gpu.install(monkeypatch)
    x, w, expected = _operands()
    weights = dense_copies(w, 2, [layout])
    with Cublas() as cublas:
        candidates = cublas.candidates([layout], m=M, k=K, n=N, dtype="fp16")
        assert [c.label.split()[0] for c in candidates] == ["GemmEx", "Lt#0", "Lt#2"]
        for candidate in candidates:
            for copy in (0, 1):
                y = np.full((N, M), np.nan, np.float16).view(fake_gpu.Array)
                system = CublasSystem(candidate, weights[layout.w], x, y)
                system.launch(copy, fake_gpu.Stream())
                assert (system.output(N, M) == expected).all()


def test_matmul_and_the_workspace_after_every_change_of_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    blas = fake_gpu.install(monkeypatch)
    import cupy

    x, w, expected = _operands()
    y = cupy.empty((N, M), dtype=np.float16)
    cupy.cuda.Stream()
    with Cublas() as cublas:
        cublas.matmul(x, w, y, dtype="fp16")
        assert (y == expected).all()
        cublas.matmul(x, w, y, dtype="fp16")
        assert blas.calls.count("cublasSetStream_v2") == 1
        fake_gpu.Stream.ptr, before = 78, fake_gpu.Stream.ptr
        try:
            cublas.matmul(x, w, y, dtype="fp16")
        finally:
            fake_gpu.Stream.ptr = before
        assert blas.calls.count("cublasSetWorkspace_v2") == 2
        with pytest.raises(ArgumentError, match="y: expected"):
            cublas.matmul(x, w, y.T, dtype="fp16")
        with pytest.raises(ArgumentError, match="dtype"):
            cublas.matmul(x, w, y, dtype="fp32")
    assert blas.calls[-2:] == ["cublasDestroy_v2", "cublasLtDestroy"]


def test_a_failing_call_is_an_exception_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dll:
        def __getattr__(self, name: str) -> Any:
            def function(*_: Any) -> int:
                return 13

            return function

    monkeypatch.setattr(cublas_api, "status_text", lambda status: "the GPU program failed to execute")
    library = cublas_api.Library(Dll(), {"cublasCreate_v2": (ctypes.c_void_p,)})
    with pytest.raises(cublas_api.CublasError, match=r"cublasCreate_v2 failed with status 13 \(the GPU") as caught:
        library.call("cublasCreate_v2", None)
    assert caught.value.status == 13


def test_struct_sizes_follow_the_header() -> None:
    assert ctypes.sizeof(cublas_api.MatmulAlgo) == 64
    assert ctypes.sizeof(cublas_api.HeuristicResult) == 96
    assert cublas_api.HeuristicResult.state.offset == 72


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cublas_api.open_library.cache_clear()
    monkeypatch.setattr(cublas_api, "_pathfinder", lambda name: [])
    monkeypatch.setattr(cublas_api, "_SONAMES", {"cublas": ("libcublas-not-there.so",)})
    try:
        with pytest.raises(MissingDependencyError, match="install nvidia-cublas"):
            cublas_api.open_library("cublas")
    finally:
        cublas_api.open_library.cache_clear()
