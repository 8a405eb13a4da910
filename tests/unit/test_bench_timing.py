# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import fake_gpu
import numpy as np
import pytest

from flashllm import graphs
from flashllm.bench import timing


def test_rotation_is_at_least_two_copies_500_mb_and_five_times_l2() -> None:
    assert timing.rotation_copies(10**9, 50 * 2**20, "cold") == 2
    assert timing.rotation_copies(50_000_000, 50 * 2**20, "cold") == 10
    assert timing.rotation_copies(50_000_000, 200_000_000, "cold") == 20
    assert timing.rotation_copies(499_999_999, 0, "cold") == 2
    assert timing.rotation_copies(10, 50 * 2**20, "warm") == 1


def test_a_tiny_weight_is_not_copied_without_end() -> None:
    assert timing.rotation_copies(512, 50 * 2**20, "cold") == timing.MAX_COPIES
    assert timing.rotation_copies(125_000, 50 * 2**20, "cold") == 4000


@pytest.mark.parametrize("us", [0.001, 1.0, 9.7, 60.0, 400.0, 50_000.0])
@pytest.mark.parametrize("copies", [1, 2, 5, 24, 3000])
def test_batches_are_whole_rotations(us: float, copies: int) -> None:
    launches = timing.batch_launches(us, copies)
    assert launches >= copies
    assert launches % copies == 0
    assert launches <= max(copies, 1.5 * timing.MAX_BATCH)


def test_percentiles_match_numpy() -> None:
    values = np.random.default_rng(0).normal(size=17).tolist()
    for fraction in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert timing.percentile(values, fraction) == pytest.approx(np.percentile(values, 100 * fraction))


def test_median_error_is_about_the_spread_of_medians() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(100.0, 2.0, size=(400, 25))
    estimated = np.mean([timing.median_error(s.tolist()) for s in samples]) * 100.0
    assert estimated == pytest.approx(np.median(samples, axis=1).std(), rel=0.25)
    assert timing.median_error([1.0, 1.0]) == math.inf


def test_summary() -> None:
    summary = timing.summarize([3.0, 1.0, 2.0], 30)
    assert (summary.median_us, summary.min_us, summary.launches) == (2.0, 1.0, 30)
    assert 1.0 < summary.p20_us < 2.0 < summary.p80_us < 3.0


class _Counted:
    def __init__(self, copies: int) -> None:
        self.copies, self.seen = copies, []

    def launch(self, copy: int, stream: Any) -> None:
        stream.do(lambda: self.seen.append(copy))


@pytest.mark.parametrize("launch", ["graph", "stream"])
def test_systems_take_turns_over_all_their_copies(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(timing, "BATCH_MS", 0.01)
    systems, loads = [_Counted(3), _Counted(7)], []
    method = timing.Method(launch=launch, warmup_ms=0.01, cap_s=0.002)
    stream = fake_gpu.Stream()
    results = timing.measure(systems, method, stream=stream, under_load=lambda: loads.append(1))
    assert loads == [1]
    for system, result in zip(systems, results, strict=True):
        tail = system.seen[-2 * system.copies :]
        assert sorted(set(tail)) == list(range(system.copies))
        assert result.launches % system.copies == 0
        assert result.min_us <= result.p20_us <= result.median_us <= result.p80_us


def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    stream = fake_gpu.Stream()

    def launches() -> None:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        graphs.capture(launches, stream)
    assert stream.captured is None
