# SPDX-License-Identifier: Apache-2.0
"""The GPU runner's own logic, on a fake GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fake_gpu
import numpy as np
import pytest

from flashllm.bench import check, environment, systems, timing
from flashllm.bench.cases import Group
from flashllm.bench.results import Row, latest
from flashllm.bench.runner import CudaRunner, Settings, check_memory, required_bytes
from flashllm.bench.sources import RandomSource
from flashllm.errors import DeviceMemoryError
from flashllm.formats.weight import SparseWeight

GROUP = Group(m=96, k=72, sparsities=(0.7, 0.9), batches=(4, 8))
FACTS = environment.Environment(
    run_id="r", sweep_id="s", commit=None, dirty=None, command="flashllm bench", backend="cuda", gpu="NVIDIA Pretend"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BATCH_MS", 0.01)
    monkeypatch.setattr(timing, "COLD_BYTES", 20_000)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 3)
    monkeypatch.setattr(systems, "_SEARCH_ROUNDS", 1)


def _run(
    launch: str = "graph", skip: Any = lambda *case: False, ablation: bool = False, pdl: bool = False, **group: Any
) -> list[Row]:
    rows: list[Row] = []
    method = timing.Method(launch=launch, warmup_ms=0.01, cap_s=0.001)
    settings = Settings(method=method, check_rows=16, ablation=ablation, pdl=pdl)
    runner = CudaRunner(FACTS, settings, RandomSource(), rows.append)
    done: list[int] = []
    groups = [Group(**{**GROUP.__dict__, **group})]
    runner.run(groups, wanted=lambda *case: not skip(*case), advance=lambda title, cases: done.append(cases))
    assert sum(done) == sum(row.system == "flashllm" for row in rows)
    return rows


def test_rows_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    rows = _run()
    assert [(r.N, r.system, r.sparsity) for r in rows] == [
        (4, "cublas", 0.9), (4, "flashllm", 0.7), (4, "flashllm", 0.9),
        (8, "cublas", 0.9), (8, "flashllm", 0.7), (8, "flashllm", 0.9),
    ]  # fmt: skip
    for r in rows:
        assert (r.check, r.launch, r.l2, r.gpu, r.sm_mhz) == ("pass", "graph", "cold", "NVIDIA Pretend", 1980)
        assert r.median_us
        assert r.cublas_us == next(c.median_us for c in rows if c.system == "cublas" and c.N == r.N)
        assert r.speedup == pytest.approx(r.cublas_us / r.median_us, abs=1e-4)
        assert r.rotated_mb >= 0.02
    ours, library = rows[1], rows[0]
    assert (ours.format, ours.kernel, ours.choice, ours.deterministic) == ("tiled-csl", "fake", "auto", True)
    assert (library.format, library.choice, library.speedup) == ("dense", "tuned", 1.0)
    assert library.kernel.startswith(("GemmEx", "Lt#"))
    assert library.bytes == 2 * (96 * 72 + 4 * 72 + 4 * 96)


def test_ablation_leaves_out_one_idea_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    rows = _run(ablation=True, batches=(8, 16), sparsities=(0.8,))
    variants = [r for r in rows if r.system == "flashllm-ablation"]
    assert {r.N for r in variants} == {16}, "instances exist for 9 to 16 columns"
    assert [r.kernel.partition(":")[0] for r in variants] == ["row-order", "no-overlap", "clear-all"]
    assert all(r.check == "pass" and r.choice == "forced" and r.speedup for r in variants)
    assert "kOverlap=false" in variants[1].kernel
    assert "kUndo=false" in variants[2].kernel
    assert len(latest(rows)) == len(rows), "variants of one case are cases of their own"


def test_overlapping_launches_are_a_system_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    rows = _run(pdl=True, batches=(8,))
    assert [(r.system, r.launch, r.sparsity) for r in rows] == [
        ("cublas", "graph", 0.9),
        ("flashllm", "graph", 0.7), ("flashllm-pdl", "graph-pdl", 0.7),
        ("flashllm", "graph", 0.9), ("flashllm-pdl", "graph-pdl", 0.9),
    ]  # fmt: skip
    plain, overlapping = rows[1:3]
    assert (overlapping.kernel, overlapping.choice, overlapping.check) == (plain.kernel, plain.choice, "pass")
    assert overlapping.median_us
    assert overlapping.speedup is overlapping.cublas_us is None, "cuBLAS was not launched so"
    assert len(latest(rows)) == len(rows)


def test_what_overlapping_launches_leave_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch, wrong_column=40, only_overlapping=True)
    rows = _run(pdl=True, batches=(8,), sparsities=(0.8,))
    assert {r.system: r.check for r in rows} == {"cublas": "pass", "flashllm": "pass", "flashllm-pdl": "fail"}


def test_stream_launches_add_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    rows = _run("stream", batches=(8,), sparsities=(0.8,))
    assert [r.system for r in rows] == ["cublas", "flashllm", "cupy-matmul"]
    assert {r.launch for r in rows} == {"stream"}
    assert rows[2].check == "pass"


@pytest.mark.parametrize("fast", ["x @ W.T", "W @ x.T"])
def test_the_faster_order_of_cupy_is_taken(monkeypatch: pytest.MonkeyPatch, fast: str) -> None:
    fake_gpu.install(monkeypatch)

    def look(orders: Sequence[systems.CupyMatmul], *_: Any, **__: Any) -> list[timing.Timing]:
        times = [1.0 if order.label.endswith(fast) else 2.0 for order in orders]
        return [timing.summarize([time] * 3, 3) for time in times]

    monkeypatch.setattr(timing, "measure", look)
    w, x = np.arange(12, dtype=np.float16).reshape(4, 3), np.arange(6, dtype=np.float16).reshape(2, 3)
    best = systems.best_cupy([w * 0, w], x, "fp16", stream=None)
    assert best.label == f"cupy.matmul {fast}"
    best.launch(1, None)
    np.testing.assert_array_equal(best.output(), x @ w.T)


@pytest.mark.parametrize("column", [0, 40, 95])
def test_a_wrong_column_fails_even_outside_the_sampled_rows(monkeypatch: pytest.MonkeyPatch, column: int) -> None:
    fake_gpu.install(monkeypatch, wrong_column=column)
    assert 40 not in check.sample_rows(96, 16, 0)
    rows = _run(batches=(8,))
    assert {r.system: r.check for r in rows} == {"cublas": "pass", "flashllm": "fail"}


def test_cases_done_before_are_left_out_and_cublas_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    rows = _run(skip=lambda group, sparsity, n, _: (sparsity, n) != (0.7, 8))
    assert [(r.system, r.sparsity, r.N) for r in rows] == [("cublas", 0.7, 8), ("flashllm", 0.7, 8)]


def test_too_little_memory_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    settings = Settings()
    check_memory([GROUP], RandomSource(), settings)
    monkeypatch.setattr("flashllm.device.free_memory", lambda: 2**30)
    with pytest.raises(DeviceMemoryError, match=r"benchmark of 96x72: needs [\d,]+ bytes.* 1,073,741,824 are free"):
        check_memory([GROUP], RandomSource(), settings)


def test_required_bytes_of_the_largest_paper_shape_fit_an_80_gb_gpu() -> None:
    group = Group(m=49152, k=12288, sparsities=(0.7, 0.8, 0.9), batches=(8,))
    assert 7e9 < required_bytes(group, RandomSource(), Settings(), 50 * 2**20) < 12e9


def test_room_for_an_expanded_weight_is_counted_for_wide_x() -> None:
    def needed(n: int) -> int:
        group = Group(**{**GROUP.__dict__, "m": 32768, "k": 8192, "batches": (8, n)})
        return required_bytes(group, RandomSource(), Settings(), 0)

    assert needed(65) - needed(64) == 2 * (2 * 32768 * 8192)


def test_running_out_of_memory_half_way_says_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)

    def full(self: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(SparseWeight, "copy", full)
    with pytest.raises(DeviceMemoryError, match="benchmark of 96x72: needs"):
        _run()
