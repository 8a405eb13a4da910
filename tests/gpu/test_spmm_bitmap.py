# SPDX-License-Identifier: Apache-2.0
"""What only the bitmap kernel has to get right: its ring of value rows, places of streams, runs that start anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_spmm import multiply

from flashllm import spmm
from flashllm.formats import runs
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import Places
from flashllm.matmul.bitmap import RING_ROWS
from products import assert_exact, exact, integers, weight
from weight_cases import PATTERNS


def check(cp: Any, w: NDArray[Any], n: int, seed: int = 0, **split: int) -> None:
    """The product is exact; ``split``: blocks and row_cost."""
    dtype = "fp16" if w.dtype == np.float16 else "bf16"
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), dtype)
    assert_exact(multiply(cp, x, Bitmap.from_dense(w).to_device(), **split), exact(x, w, dtype))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_while_the_ring_turns(cp: Any, pattern: str) -> None:
    """Rows of tiles whose values go through the ring many times over, in one run and in several."""
    for n, blocks in ((8, 1), (16, 2), (32, 3), (64, 5), (130, 2)):
        check(cp, weight(pattern, (260, 64 * 150 - 5), 0.5, "fp16", n), n, n, blocks=blocks, row_cost=0)


@pytest.mark.parametrize("n", [8, 24, 64])
def test_exact_for_runs_that_start_at_any_tile(cp: Any, n: int) -> None:
    """At any number of tiles after places were last stored, with streams that lag by anything up to the slack."""
    tiles = 67
    for seed, (pattern, density) in enumerate(
        (("uniform", 0.5), ("skewed", 0.3), ("column", 0.1), ("even-columns", 0.9))
    ):
        w = weight(pattern, (256, 64 * tiles), density, "bf16", seed)
        assert np.unique(Places.unpack(Bitmap.from_dense(w).places[1:]).lags).size > 10
        for blocks in (2 * tiles, tiles, 37, 6):
            check(cp, w, n, seed, blocks=blocks, row_cost=0)


def test_exact_where_one_stream_leads_all_others(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lag by the whole slack, and all their values are zeros that let them catch up."""
    monkeypatch.setattr(runs, "RUNS", 1)  # or no stream would lag where places are stored
    for lane in range(0, 32, 5):
        w = np.zeros((128, 64 * 90), np.float16)
        for row in (0, 8):
            w[row + 16 * (lane % 4) + lane // 4, lane % 4 * 2 + 1 :: 16] = 3
        assert (Places.unpack(Bitmap.from_dense(w).places[1]).lags == 31).sum() == 255
        for n, blocks in ((8, 1), (33, 7), (64, 90)):
            check(cp, w, n, lane, blocks=blocks, row_cost=0)


@pytest.mark.parametrize("columns", [64 * 150, 64 * 150 - 3])
def test_exact_where_all_streams_but_one_lag_with_values(
    cp: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a slow stream needs is all there is between a row and the one that takes its place."""
    monkeypatch.setattr(runs, "RUNS", 1)  # or no stream would lag where places are stored
    for seed, (n, density, blocks) in enumerate(((8, 0.5, 1), (16, 0.9, 3), (33, 0.7, 2), (64, 0.3, 75))):
        w = weight("lagging", (128, columns), density, "fp16", seed)
        assert all((lags == 31).sum() == 255 for lags in Places.unpack(Bitmap.from_dense(w).places[1:]).lags)
        for repeat in range(3):
            check(cp, w, n, repeat, blocks=blocks, row_cost=0)


def test_exact_where_no_element_is_zero(cp: Any) -> None:
    w = weight("full", (1024, 4096), 1.0, "fp16")
    assert Bitmap.from_dense(w).fronts[-1] > 100 * max(RING_ROWS.values())
    for n in (8, 16, 32, 64):
        check(cp, w, n, n)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_value_read_ahead_is_not_used(cp: Any, dtype: str) -> None:
    """Lanes without a value still load the next one of their stream: a NaN or infinity of a later tile."""
    w = weight("uniform", (256, 64 * 12), 0.4, dtype)
    w[128:][w[128:] != 0] = np.nan
    w[200:][w[200:] != 0] = np.inf
    for n, blocks in ((8, 1), (33, 5), (64, 24)):
        x = integers(np.random.default_rng(1), (n, w.shape[1]), dtype)
        got = multiply(cp, x, Bitmap.from_dense(w).to_device(), blocks=blocks, row_cost=0)
        assert_exact(np.ascontiguousarray(got[:, :128]), exact(x, w[:128], dtype))
        assert not np.isfinite(got[:, 128:].astype(np.float32)).any()


def test_repeats_of_forced_splits_give_the_same_bits(cp: Any) -> None:
    """On weights encoded on the device, with values whose sums depend on their order."""
    rng = np.random.default_rng(7)
    w = cp.asarray(rng.standard_normal((1000, 3000)).astype(np.float16))
    w[cp.asarray(rng.random(w.shape) >= 0.3)] = 0
    for n in (8, 64):
        x = cp.asarray(rng.standard_normal((n, w.shape[1])).astype(np.float16))
        results = {spmm(x, Bitmap.from_dense(w)).get().tobytes() for _ in range(10)}
        assert len(results) == 1
