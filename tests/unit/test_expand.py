# SPDX-License-Identifier: Apache-2.0
"""Wide x: when a weight is expanded for cuBLAS, and how, on a fake GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np
import pytest
from test_matmul import A100, H100

import coordinates
from coordinates import Coordinates
from flashllm import ArgumentError, SparseWeight, TiledCSL, pack, plan, registry, spmm
from flashllm.gpus import find_gpu, gpu_of
from flashllm.matmul import expand, model, product, tune, tune_cache
from flashllm.matmul.auto import rank_formats
from products import exact, integers, weight

GPU = find_gpu("H100 80GB")
SHAPE = (4096, 2048)
"""The smallest shape that is expanded."""


class Device(fake_gpu.Array):
    """Passes for a CuPy array on GPU 0."""

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=0)


class Operand:
    """x as CuPy has it: not a NumPy array, which the product on a GPU refuses."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


for _pretended in (Device, Operand):
    _pretended.__module__ = "cupy"


@pytest.fixture(scope="module")
def large() -> dict[str, SparseWeight]:
    dense = weight("uniform", SHAPE, 0.1, "fp16")
    return {name: pack(dense, format=name) for name in registry.FORMATS}


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_gpu.Blas]:
    """Replaces cuBLAS and the decoders by NumPy."""
    found = fake_gpu.install(monkeypatch)
    cupy: Any = sys.modules["cupy"]
    cupy.empty = lambda shape, dtype: np.full(shape, 77, dtype=dtype).view(Device)
    cupy.zeros = lambda shape, dtype: np.zeros(shape, dtype=dtype).view(Device)
    monkeypatch.setattr("flashllm.device.device_facts", lambda index=None: H100)
    monkeypatch.setattr("flashllm.device.current_device", lambda: 0)
    for name in registry.FORMATS:
        monkeypatch.setattr(registry.encoder(name), "decode", _decode)
    yield found
    expand.release()


def _decode(w: SparseWeight, *, out: Any) -> Any:
    """What a device decoder does."""
    host = w.with_arrays({name: np.asarray(array) for name, array in w.arrays().items()})
    out[...] = host.to_dense()
    return out


def _on_device(w: SparseWeight) -> SparseWeight:
    return w.with_arrays({name: array.view(Device) for name, array in w.arrays().items()})


def _aligned(a: np.ndarray[Any, Any], offset: int = 0) -> Any:
    """A copy of ``a`` at an address that is ``offset`` past a multiple of 256."""
    room = np.zeros(a.nbytes + 512, np.uint8)
    start = -room.ctypes.data % 256 + offset
    copy = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy.view(Device)


@pytest.mark.parametrize("name", list(registry.FORMATS))
def test_wide_x_is_expanded_and_narrow_x_is_not(name: str, large: dict[str, SparseWeight]) -> None:
    w = large[name]
    for n in (1, 8, 64):
        assert plan(w, n, device=H100).expansion is None
    wide = plan(w, 2048, device=H100)
    assert wide.expansion is not None
    assert wide.source == "auto"
    assert wide.label == expand.LABEL
    assert f"auto: expanded to {wide.workspace_bytes:,} bytes for cuBLAS, instead of " in wide.reason
    assert wide.workspace_bytes == wide.expansion.scratch_bytes == 2 * 4096 * 2048
    assert plan(w, 2048, device=H100, expand=False).expansion is None
    assert plan(w, 2048, device=H100, choice=wide.choice).expansion is None, "a forced kernel is that kernel"
    forced = plan(w, 8, device=H100, expand=True)
    assert (forced.expansion, forced.workspace_bytes) == (wide.expansion, wide.workspace_bytes)


def test_the_crossover_is_where_the_model_says(large: dict[str, SparseWeight]) -> None:
    """It is where the expansion becomes a tenth faster than the column blocks; beyond that, weights always expand."""
    for name, w in large.items():
        taken = []
        for n in range(64, 2049, 64):
            options: dict[str, Any] = {"m": 4096, "k": 2048, "n": n, "weight_bytes": w.nbytes, "gpu": gpu_of(H100)}
            kernel = model.predict(name, density=w.density, **options)
            us = model.expand_us(**options)
            taken.append(plan(w, n, device=H100).expansion is not None)
            assert taken[-1] == (n > 64 and us < 0.9 * kernel.us)
        assert taken == sorted(taken)
        assert taken[0] is False
        assert taken[-1] is True


def test_small_matrices_are_not_expanded() -> None:
    w = TiledCSL.from_dense(weight("uniform", (2048, 2048), 0.1, "fp16"))
    assert plan(w, 65536, device=H100).expansion is None


def test_a_format_without_a_decoder_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)
    w = Coordinates.from_dense(weight("uniform", (64, 64), 0.1, "fp16"))
    assert plan(w, 500, device=H100).expansion is None
    with pytest.raises(ArgumentError, match="expand: expected a format with a decoder on the GPU, got coordinates"):
        plan(w, 500, device=H100, expand=True)


def test_what_an_expansion_is_expected_to_take() -> None:
    dense = model.dense_us(28672, 8192, 512, gpu=GPU)
    start = model.committed().dense.start_us
    us = model.expand_us(m=28672, k=8192, n=512, weight_bytes=120_000_000, gpu=GPU)
    assert us == pytest.approx(start + (120e6 + 2 * 28672 * 8192) / 3060e3 + dense)


def test_ranking_counts_with_expansions() -> None:
    ranking = rank_formats((28672, 8192), 0.2, (8, 2048), gpu=GPU)
    for candidate in ranking.candidates:
        assert "expanding at N = 2048" in candidate.reason
        assert ranking.dense.us[2048] < candidate.us[2048] < 2 * ranking.dense.us[2048] + 300


@pytest.mark.parametrize("name", list(registry.FORMATS))
def test_the_product_of_an_expanded_weight(name: str, blas: fake_gpu.Blas) -> None:
    dense = weight("uniform", (300, 200), 0.2, "fp16")
    w = _on_device(pack(dense, format=name))
    x = integers(np.random.default_rng(1), (70, 200), "fp16")
    chosen = plan(w, 70, expand=True)
    workspace = _aligned(np.zeros(chosen.workspace_bytes + 64, np.uint8))
    workspace[-64:] = 0x55
    out = _aligned(np.full((70, 300), np.nan, np.float16))
    stream: Any = fake_gpu.Stream()
    for _ in range(2):
        out[...] = np.nan
        got = product.spmm(Operand(_aligned(x)), w, out=out, workspace=workspace, plan=chosen, stream=stream)
        assert got is out
        np.testing.assert_array_equal(np.asarray(out), exact(x, dense, "fp16"))
    assert (workspace[-64:] == 0x55).all(), "nothing is written past what was asked for"
    assert blas.calls.count("cublasCreate_v2") == 1
    assert blas.calls.count("cublasLtMatmulAlgoGetHeuristic") == 1, "looked for once"
    assert blas.calls.count("cublasLtMatmul") == 2


def test_a_workspace_is_made_where_none_is_given_and_checked_where_one_is(blas: fake_gpu.Blas) -> None:
    dense = weight("uniform", (300, 200), 0.2, "fp16")
    w = _on_device(pack(dense, format="bitmap"))
    x = integers(np.random.default_rng(1), (70, 200), "fp16")
    chosen = plan(w, 70, expand=True)
    got = product.spmm(Operand(_aligned(x)), w, plan=chosen, stream=fake_gpu.Stream())
    np.testing.assert_array_equal(np.asarray(got), exact(x, dense, "fp16"))
    small = _aligned(np.zeros(chosen.workspace_bytes - 1, np.uint8))
    with pytest.raises(ArgumentError, match=f"workspace: expected a CuPy array of >= {chosen.workspace_bytes} bytes"):
        product.spmm(Operand(_aligned(x)), w, workspace=small, plan=chosen, stream=fake_gpu.Stream())


def test_operands_that_cublaslt_may_not_take_go_to_gemm_ex(blas: fake_gpu.Blas) -> None:
    dense = weight("uniform", (300, 200), 0.2, "fp16")
    w = _on_device(pack(dense, format="tiled-csl"))
    x = integers(np.random.default_rng(1), (70, 200), "fp16")
    got = product.spmm(Operand(_aligned(x, 16)), w, plan=plan(w, 70, expand=True), stream=fake_gpu.Stream())
    np.testing.assert_array_equal(np.asarray(got), exact(x, dense, "fp16"))
    assert (blas.calls.count("cublasGemmEx"), blas.calls.count("cublasLtMatmul")) == (1, 0)


def test_every_stream_has_a_handle_of_its_own(blas: fake_gpu.Blas) -> None:
    w = _on_device(pack(weight("uniform", (128, 64), 0.2, "fp16"), format="bitmap"))
    x = Operand(_aligned(integers(np.random.default_rng(1), (70, 64), "fp16")))
    streams: list[Any] = [fake_gpu.Stream(), fake_gpu.Stream()]
    streams[1].ptr = 78
    for stream in (*streams, *streams):
        product.spmm(x, w, plan=plan(w, 70, expand=True), stream=stream)
    assert blas.calls.count("cublasCreate_v2") == 2
    expand.release()
    assert blas.calls.count("cublasDestroy_v2") == 2
    product.spmm(x, w, plan=plan(w, 70, expand=True), stream=streams[0])
    assert blas.calls.count("cublasCreate_v2") == 3


def test_on_the_host_a_plan_to_expand_multiplies_all_the_same() -> None:
    dense = weight("uniform", (200, 100), 0.2, "fp16")
    w = TiledCSL.from_dense(dense)
    x = integers(np.random.default_rng(1), (70, 100), "fp16")
    for backend in (None, "reference"):
        got = spmm(x, w, plan=plan(w, 70, device=H100, expand=True), backend=backend)
        np.testing.assert_array_equal(got, exact(x, dense, "fp16"))


@pytest.mark.parametrize("expansion_us", [0.5, 9.0])
def test_tuning_measures_the_expansion_too(
    blas: fake_gpu.Blas, monkeypatch: pytest.MonkeyPatch, expansion_us: float
) -> None:
    w = _on_device(TiledCSL.from_dense(weight("uniform", (256, 192), 0.2, "fp16")))
    times: list[float] = []

    def timed(candidate: Any, *_: Any) -> float:
        times.append(expansion_us if candidate.expansion else 10.0 - len(times) * 0.1)
        return times[-1]

    monkeypatch.setattr(tune, "_time", timed)
    monkeypatch.setattr(tune, "_copies", lambda w: [w])
    narrow, wide = tune.tune(w, [64, 100])
    assert narrow.plan.expansion is None
    wins = expansion_us < 1
    assert (wide.plan.expansion is not None) == wins
    made = plan(w, 100)
    assert (made.source, made.expansion is not None) == ("tuned", wins)
    assert plan(w, 100, expand=False).expansion is None
    found = tune_cache.measured("tiled-csl", (256, 192), 100, dtype="fp16", density=w.density, device=H100)
    assert found is not None
    assert (found.expanded, found.median_us) == (wins, wide.median_us)
    assert plan(w, 64).expansion is None


def test_measured_without_expansion_stays_without(large: dict[str, SparseWeight]) -> None:
    w = large["bitmap"]
    choice = plan(w, 2048, device=H100).choice
    tune_cache.store(w, 2048, choice, median_us=20.0, device=H100)
    assert plan(w, 2048, device=H100).expansion is None
    assert plan(w, 2048, device=A100).expansion is not None, "not measured there"


def test_rows_name_the_expansion_and_take_cublas_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm.bench import check
    from flashllm.bench.cases import Group
    from flashllm.bench.runs import Prepared, Run

    fake_gpu.install(monkeypatch)
    w = TiledCSL.from_dense(weight("uniform", (96, 64), 0.2, "fp16"))
    group = Group(m=96, k=64, sparsities=(0.8,), batches=(70,))
    item = Prepared(sparsity=0.8, sparsity_real=0.8, largest=4.0, references={}, outputs={})
    for made, label, limit in (
        (plan(w, 70, device=H100), plan(w, 70, device=H100).spec.label, 1.0),
        (plan(w, 70, device=H100, expand=True), expand.LABEL, check.BASELINE_LIMIT),
    ):
        system: Any = types.SimpleNamespace(plan=made, weights=[w], choice="auto", x=None, y=None, overlaps=False)
        run = Run.of_ours(system, item, group)
        assert (run.kernel, run.limit) == (label, limit)


def test_one_stream_gives_up_its_handle_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    handles = {(0, stream): SimpleNamespace(close=lambda stream=stream: closed.append(stream)) for stream in (1, 2)}
    monkeypatch.setattr(expand, "_handles", handles)
    monkeypatch.setattr(expand, "_products", {(0, stream, "a product"): object() for stream in (1, 2)})
    expand.release_stream(1)
    expand.release_stream(3)
    assert closed == [1]
    assert set(handles) == {(0, 2)}
    assert set(expand._products) == {(0, 2, "a product")}
