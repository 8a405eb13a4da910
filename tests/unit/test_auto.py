# SPDX-License-Identifier: Apache-2.0
"""The choice of a format: from density, from a real mask, from measurements; and packing in it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from test_matmul import A100, H100
from test_tune import _Array

import coordinates
import flashllm
from flashllm import ArgumentError, registry
from flashllm.bench.data import random_matrix
from flashllm.gpus import find_gpu, gpu_of
from flashllm.matmul import auto, model, sample, tune_cache
from flashllm.matmul.auto import rank_formats, rank_formats_of
from scripts import load_script

fit_model = load_script("fit_model")
GPU = find_gpu("H100 80GB")
BIG = (28672, 7168)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))


def masked(shape: tuple[int, int], density: float, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 5, shape) * (rng.random(shape) < density)).astype(np.float16)


def test_choosing_by_density_alone_loses_next_to_nothing() -> None:
    """As `rank_formats` does, this estimates bytes instead of taking those of the rows."""
    regrets = []
    cases: dict[Any, dict[str, float]] = {}
    for row in fit_model.read_rows(fit_model.default_files()):
        if row.system == "flashllm" and row.sparsity is not None:
            cases.setdefault((row.M, row.K, row.N, row.sparsity), {})[row.format] = row.median_us
    for (m, k, n, zeros), us in cases.items():
        if len(us) > 1:
            ranking = rank_formats((m, k), 1 - zeros, n, gpu=fit_model.GPU, formats=list(us))
            regrets.append(us[ranking.best.format] / min(us.values()) - 1)
    assert len(regrets) >= 132
    assert fmean(regrets) < 0.02
    assert max(regrets) < 0.10


@pytest.mark.parametrize(
    ("zeros", "n", "best"),
    [(0.5, 16, "bitmap"), (0.7, 16, "bitmap"), (0.8, 16, "slot24"), (0.9, 8, "slot24"), (0.9, 64, "slot24")],
)
def test_the_best_format_of_typical_cases(zeros: float, n: int, best: str) -> None:
    ranking = rank_formats(BIG, 1 - zeros, n, gpu=GPU)
    assert ranking.best.format == best
    assert [c.mean_us for c in ranking.candidates] == sorted(c.mean_us for c in ranking.candidates)
    assert {c.format for c in ranking.candidates} == set(registry.FORMATS)
    assert ranking.best.us[n] < ranking.dense.us[n]
    assert all(c.source == "model" and c.reason.endswith(" decides") for c in ranking.candidates)


def test_several_n_count_by_their_geometric_mean() -> None:
    both = rank_formats(BIG, 0.1, (8, 64), gpu=GPU)
    for candidate in both.candidates:
        alone = [rank_formats(BIG, 0.1, n, gpu=GPU, formats=[candidate.format]).best.us[n] for n in (8, 64)]
        assert list(candidate.us.values()) == alone
        assert candidate.mean_us == pytest.approx(math.sqrt(alone[0] * alone[1]))
    assert both.best.mean_us == min(c.mean_us for c in both.candidates)


def test_dense_is_faster_where_the_matrix_is_small_or_full() -> None:
    assert (
        rank_formats((576, 1536), 0.2, 8, gpu=GPU).dense.us[8] < rank_formats((576, 1536), 0.2, 8, gpu=GPU).best.us[8]
    )
    full = rank_formats(BIG, 1.0, 8, gpu=GPU)
    assert full.dense.us[8] < full.best.us[8]


def test_a_dense_row_makes_slots_bad_and_that_shows() -> None:
    even = masked((8192, 4096), 0.1)
    uneven = even.copy()
    uneven[5000] = 1  # in none of the evenly spread slabs
    assert not np.isin(5000, sample.slabs_of(np.ones(8192, np.int64)))
    before, after = (rank_formats_of(a, 16, gpu=GPU) for a in (even, uneven))
    assert before.best.format == "slot24"
    assert after.best.format != "slot24"
    slots = next(c for c in after.candidates if c.format == "slot24")
    assert slots.weight_bytes > 1.3 * before.best.weight_bytes


@cache
def patterned(pattern: str) -> NDArray[Any]:
    """A matrix with a pattern of zeros, for every format."""
    return random_matrix(4096, 1024, density=0.2, pattern=pattern, seed=3, std=0.1)


@pytest.mark.parametrize("pattern", ["uniform", "skewed", "columns", "block"])
@pytest.mark.parametrize("name", list(registry.FORMATS))
def test_sampled_bytes_are_close_to_the_packed_weights(name: str, pattern: str) -> None:
    a = patterned(pattern)
    contents = sample.sampled(a, [name])
    assert contents.packed_rows < 4096
    assert contents.density == np.count_nonzero(a) / a.size
    real = registry.weight_class(name).from_dense(a).nbytes
    # A slot24 weight has one window, that of its fullest part; a few rows may allow the next larger one.
    assert contents.weight_bytes[name] == pytest.approx(real, rel=0.12 if name == "slot24" else 0.05)


def test_a_matrix_of_few_rows_is_packed_whole() -> None:
    a = masked((300, 520), 0.3)
    contents = sample.sampled(a, list(registry.FORMATS))
    assert contents.packed_rows == 300
    for name, found in contents.weight_bytes.items():
        assert found == pytest.approx(registry.weight_class(name).from_dense(a).nbytes, abs=1)


def test_sparse_sources_give_what_dense_ones_give() -> None:
    a = masked((2000, 600), 0.15).astype(np.float32)
    explicit = scipy.sparse.csr_array(a)
    explicit.data[:100] = 0  # stored zeros, which are pruned
    dense = sample.sampled(explicit.toarray(), list(registry.FORMATS))
    for layout in ("csr", "csc", "coo"):
        assert sample.sampled(explicit.asformat(layout), list(registry.FORMATS)) == dense


def test_device_matrices_are_counted_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake device; the encoder takes 16-bit patterns there."""
    import fake_gpu

    fake_gpu.install(monkeypatch)
    a = masked((3000, 256), 0.2)
    want = sample.sampled(a, ["bitmap"])
    cupy: Any = sys.modules["cupy"]
    monkeypatch.setattr(cupy, "asarray", lambda array: np.asarray(array).view(_Array))
    real = flashllm.Bitmap.from_dense

    def on_device(part: Any, *, dtype: str) -> Any:
        assert (type(part), part.dtype, dtype) == (_Array, np.uint16, "fp16")
        return real(np.asarray(part).view(np.float16), dtype=dtype)

    monkeypatch.setattr(flashllm.Bitmap, "from_dense", on_device)
    monkeypatch.setattr(_Array, "get", lambda self: np.asarray(self))
    assert sample.sampled(a.view(_Array), ["bitmap"]) == want


def test_formats_without_a_kernel_or_constants_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)
    assert "coordinates" not in {c.format for c in rank_formats(BIG, 0.2, 8, gpu=GPU).candidates}
    with pytest.raises(ArgumentError, match=r"formats: expected a format with a kernel for sm_90a.*got coordinates"):
        rank_formats(BIG, 0.2, 8, gpu=GPU, formats=["coordinates"])
    hopper_only = [c for c in registry.kernel("slot24").instances() if c.spec.archs == ("90a", "100a")]
    assert hopper_only
    monkeypatch.setattr(registry.kernel("slot24"), "instances", lambda: hopper_only)
    assert {c.format for c in rank_formats(BIG, 0.2, 8, gpu=gpu_of(A100)).candidates} == {"tiled-csl", "bitmap"}


def test_measured_times_of_this_gpu_count_more_than_the_model() -> None:
    here = gpu_of(H100)
    a = masked((512, 1024), 0.2)
    w = flashllm.TiledCSL.from_dense(a)
    assert rank_formats(a.shape, w.density, 16, gpu=here).best.format != "tiled-csl"
    choice = registry.kernel("tiled-csl").default_choice(w, 16, arch="90a")
    tune_cache.store(w, 16, choice, median_us=1.5, device=H100)
    ranking = rank_formats_of(a, 16, gpu=here)
    assert (ranking.best.format, ranking.best.source) == ("tiled-csl", "measured")
    assert ranking.best.us[16] == pytest.approx(1.5, rel=0.01)
    assert ranking.best.reason == "measured"
    assert ranking.candidates[1].source == "model"
    several = rank_formats_of(a, (8, 16), gpu=here)
    mixed = next(c for c in several.candidates if c.format == "tiled-csl")
    assert (mixed.source, mixed.reason) == ("model and measured", "reading decides at N = 8; measured at N = 16")


def test_measurements_of_other_cases_do_not_count() -> None:
    a = masked((512, 1024), 0.2)
    w = flashllm.TiledCSL.from_dense(a)
    choice = registry.kernel("tiled-csl").default_choice(w, 16, arch="90a")
    tune_cache.store(w, 16, choice, median_us=1.5, device=H100)

    def source(shape: tuple[int, int] = (512, 1024), density: float = 0.2, n: int = 16, **options: Any) -> str:
        gpu = options.pop("gpu", gpu_of(H100))
        return rank_formats(shape, density, n, gpu=gpu, formats=["tiled-csl"], **options).best.source

    assert source() == "measured"
    assert source(density=0.23) == "measured"
    assert source(density=0.26) == source(n=8) == source((512, 1152)) == source(dtype="bf16") == "model"
    assert source(gpu=gpu_of(A100)) == source(gpu=GPU) == "model"
    denser = rank_formats((512, 1024), 0.23, 16, gpu=gpu_of(H100), formats=["tiled-csl"]).best.us[16]
    assert 1.5 < denser < 1.6, "scaled by the model"


def test_pack_takes_the_best_format_or_the_one_asked_for() -> None:
    a = masked((1024, 512), 0.4)
    best = rank_formats_of(a, gpu=auto.current_gpu()).best.format
    w = flashllm.pack(a)
    assert (w.format, w.dtype, w.shape) == (best, "fp16", (1024, 512))
    np.testing.assert_array_equal(w.to_dense(), a)
    for name in registry.FORMATS:
        assert flashllm.pack(a, format=name, dtype="bf16").format == name
    one = flashllm.pack(scipy.sparse.csr_array(a.astype(np.float32)), n=8, device=H100)
    np.testing.assert_array_equal(one.to_dense(), a)
    assert one.format == rank_formats_of(a, 8, gpu=gpu_of(H100)).best.format


def test_pack_follows_n() -> None:
    a = masked((4096, 4096), 0.1)
    taken = {n: flashllm.pack(a, n=n, device=H100).format for n in (16, 64)}
    assert taken == {16: "slot24", 64: "tiled-csl"}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("format", {"format": "csr"}),
        ("n", {"n": 0}),
        ("n", {"n": ()}),
        ("n", {"n": (8, True)}),
        ("n", {"n": (8, 1.5)}),
        ("n", {"n": 1.5}),
        ("n", {"n": None}),
        ("device", {"device": "H200"}),
        ("dtype", {"dtype": "fp8"}),
        ("a", {"a": [[1.0]]}),
        ("a", {"a": np.zeros((2, 2, 2), np.float16)}),
        ("a", {"a": np.zeros((2, 2), np.int32)}),
    ],
)
def test_bad_arguments_are_named(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"a": masked((16, 16), 0.5), **change}
    with pytest.raises(ArgumentError, match="expected") as caught:
        flashllm.pack(arguments.pop("a"), **arguments)
    assert caught.value.argument == argument


@pytest.mark.parametrize(("shape", "density"), [((0, 8), 0.2), ((8, 8), 1.2), ((8, 8), -0.1), ((8, 8), math.nan)])
def test_impossible_matrices_are_refused(shape: tuple[int, int], density: float) -> None:
    with pytest.raises(ArgumentError, match=r"^(shape|density): expected"):
        rank_formats(shape, density, gpu=GPU)


def test_without_a_gpu_the_choice_is_for_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")
    assert rank_formats(BIG, 0.2).gpu == GPU
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: None)
    monkeypatch.setattr("flashllm.device.device_facts", lambda: replace(H100, sm_count=66))
    assert rank_formats(BIG, 0.2).gpu.sm_count == 66


def test_empty_and_full_matrices_have_a_format() -> None:
    for density in (0.0, 1.0):
        a = np.full((256, 256), density, np.float16)
        assert flashllm.pack(a).nnz == density * a.size
        assert all(us > 0 for c in rank_formats_of(a, gpu=GPU).candidates for us in c.us.values())
    assert model.is_modelled(rank_formats(BIG, 0.0, gpu=GPU).best.format)
