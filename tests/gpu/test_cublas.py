# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from flashllm import graphs
from flashllm.baselines import cublas_api
from flashllm.baselines.cublas import Cublas
from flashllm.baselines.cublas_api import CublasError
from flashllm.bench import check, systems
from flashllm.bench.data import random_matrix, to_float64

pytestmark = pytest.mark.gpu


def _case(cp: Any, dtype: str, m: int, k: int, n: int) -> tuple[Any, Any, Any, check.Reference]:
    w = random_matrix(m, k, density=0.5, seed=1, std=k**-0.5, dtype=dtype, device=True)  # type: ignore[arg-type]
    x = random_matrix(n, k, seed=2, dtype=dtype, device=True)  # type: ignore[arg-type]
    y = systems.empty_output(n, m, dtype)
    return w, x, y, check.make_reference(to_float64(x, dtype), to_float64(w, dtype), cp.arange(m), dtype)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("m", "k", "n"), [(256, 512, 8), (1000, 264, 17), (64, 2048, 1)])
def test_every_candidate_is_right_in_a_graph(cp: Any, dtype: str, m: int, k: int, n: int) -> None:
    w, x, y, reference = _case(cp, dtype, m, k, n)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream, Cublas() as cublas:
        weights = systems.dense_copies(w, 2, systems.LAYOUTS_BOTH)
        candidates = cublas.candidates(systems.LAYOUTS_BOTH, m=m, k=k, n=n, dtype=dtype)
        assert sum(c.label.startswith("GemmEx") for c in candidates) == 4
        assert any(c.label.startswith("Lt#") for c in candidates)
        for candidate in candidates:
            system = systems.CublasSystem(candidate, weights[candidate.layout.w], x, y)
            system.launch(0, stream)
            graph = graphs.capture(lambda system=system: system.launch(1, stream), stream)
            check.poison(y, dtype)
            graph.launch(stream)
            ratio = check.error_over_bound(to_float64(system.output(n, m), dtype), reference)
            assert ratio <= check.BASELINE_LIMIT, candidate.label


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_matmul(cp: Any, dtype: str) -> None:
    w, x, y, reference = _case(cp, dtype, 384, 640, 16)
    check.poison(y, dtype)
    with Cublas() as cublas:
        cublas.matmul(x, w, y, dtype=dtype)
        assert check.error_over_bound(to_float64(y, dtype), reference) <= check.BASELINE_LIMIT


def test_errors_carry_cublas_own_words(cp: Any) -> None:
    with Cublas() as cublas, pytest.raises(CublasError, match=r"cublasSetStream_v2 failed with status 1 "):
        cublas._blas.call("cublasSetStream_v2", None, None)


def test_version(cp: Any) -> None:
    major, *_ = cublas_api.version().split(".")
    assert int(major) >= 12
