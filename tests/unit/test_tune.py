# SPDX-License-Identifier: Apache-2.0
"""The tuner's own logic, on a fake GPU."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from test_matmul import H100

from flashllm import ArgumentError, TiledCSL, plan
from flashllm.errors import DeviceMemoryError
from flashllm.matmul import tiled_csl, tune, tune_cache


class _Array(fake_gpu.Array):
    """Passes for a CuPy array."""


_Array.__module__ = "cupy"


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TiledCSL:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    fake_gpu.install(monkeypatch)
    cupy: Any = sys.modules["cupy"]
    cupy.cuda.Device = lambda: fake_gpu.Stream()
    monkeypatch.setattr("flashllm.device.device_facts", lambda index=None: H100)
    dense = (np.random.default_rng(0).random((256, 192)) < 0.2).astype(np.float16)
    host = TiledCSL.from_dense(dense)
    return replace(host, words=host.words.view(_Array), tile_offsets=host.tile_offsets.view(_Array))


def test_every_candidate_runs_on_every_copy_and_the_best_is_kept(
    weight: TiledCSL, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: Counter[int] = Counter()
    choices = list(tiled_csl.candidates(weight, 16, arch="90a"))
    fastest = choices[-1]

    def product(x: Any, w: TiledCSL, *, stream: Any, plan: Any, **_: Any) -> None:
        assert x.shape == (16, 192)
        assert x.dtype == np.float16
        launched[id(w)] += 1

    monkeypatch.setattr(tune, "spmm", product)
    replays = 1 + tune._REPEATS  # the first one warms up
    elapsed: list[float] = [3.0] * (len(choices) - 1) * replays + [1.0] * replays
    monkeypatch.setattr(sys.modules["cupy"].cuda, "get_elapsed_time", lambda start, stop: elapsed.pop(0))
    (result,) = tune.tune(weight, [16])
    assert elapsed == []
    assert len(launched) == tune._MAX_COPIES
    assert min(launched.values()) == len(choices)
    assert (result.measured, result.plan.choice) == (len(choices), fastest)
    assert result.median_us == pytest.approx(1000 / tune._MAX_COPIES)
    assert result.heuristic_us == pytest.approx(3000 / tune._MAX_COPIES)
    assert tune_cache.lookup(weight, 16, device=H100) == fastest
    assert plan(weight, 16, device=H100).source == "tuned"


def test_a_weight_on_the_host_is_refused(weight: TiledCSL) -> None:
    host = replace(weight, words=np.asarray(weight.words), tile_offsets=np.asarray(weight.tile_offsets))
    with pytest.raises(ArgumentError, match="w: expected a weight on the GPU"):
        tune.tune(host, [16])


def test_copies_that_do_not_fit_say_what_they_need(weight: TiledCSL, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(_Array, "copy", full, raising=False)
    needed = f"{(tune._MAX_COPIES - 1) * weight.nbytes:,}"
    with pytest.raises(DeviceMemoryError, match=f"copies of the weight to tune on: needs {needed} bytes"):
        tune.tune(weight, [16])
