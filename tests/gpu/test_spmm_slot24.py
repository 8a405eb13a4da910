# SPDX-License-Identifier: Apache-2.0
"""What only the slot24 kernel has to get right: windows of x, the gather of its columns, picks, runs from any tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_spmm import multiply

from flashllm import Slot24, spmm
from flashllm.device import device_facts
from flashllm.matmul.slot24 import MAX_RING_ROWS
from products import assert_exact, exact, integers, narrow, weight
from weight_cases import PATTERNS

both_parts = pytest.mark.parametrize("part_rows", [32, 64])
both_groups = pytest.mark.parametrize("group_values", [2, 4])


def check(
    cp: Any,
    w: NDArray[Any],
    n: int,
    part_rows: int,
    seed: int = 0,
    window: int | None = None,
    group_values: int | None = None,
    **split: int,
) -> None:
    """The product is exact; ``split``: blocks and row_cost."""
    dtype = "fp16" if w.dtype == np.float16 else "bf16"
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), dtype)
    sparse = Slot24.from_dense(w, window=window, part_rows=part_rows, group_values=group_values).to_device()
    choice = narrow(sparse, n, device_facts().arch)
    assert_exact(multiply(cp, x, sparse, choice, **split), exact(x, w, dtype))


@pytest.mark.parametrize("pattern", PATTERNS)
@both_parts
def test_exact_while_ring_and_windows_turn(cp: Any, pattern: str, part_rows: int) -> None:
    """Rows of tiles whose values and x go through shared memory many times over, in one run and in several."""
    for n, blocks in ((8, 1), (16, 2), (32, 3), (64, 5), (130, 2)):
        for density in (0.5, 0.15, 0.08):
            check(cp, weight(pattern, (260, 9595), density, "fp16", n), n, part_rows, n, blocks=blocks, row_cost=0)


@pytest.mark.parametrize("n", [8, 13, 30])
@pytest.mark.parametrize("window", [128, 136, 192, 248, 256])
@both_parts
@both_groups
def test_exact_for_every_window(cp: Any, window: int, n: int, part_rows: int, group_values: int) -> None:
    """Windows that end with the matrix, and last ones of one column, of eight, of one less than the others."""
    for extra in (0, 1, 8, window - 1):
        w = weight("uniform", (300, 5 * window + extra), 0.08, "bf16", n)
        check(cp, w, n, part_rows, n, window, group_values, blocks=3, row_cost=0)


@pytest.mark.parametrize("n", [8, 16, 24, 64])
@both_parts
def test_exact_for_runs_that_start_at_any_tile(cp: Any, n: int, part_rows: int) -> None:
    """At both tiles of a window; blocks of one tile, of a few, of several rows of tiles."""
    for seed, (pattern, density) in enumerate(
        (("uniform", 0.5), ("uniform", 0.1), ("uniform", 0.05), ("skewed", 0.2), ("column", 0.1), ("even-columns", 0.9))
    ):
        w = weight(pattern, (384, 4100), density, "bf16", seed)
        tiles_m, tiles_k = Slot24.from_dense(w, part_rows=part_rows).tiles
        for blocks in (tiles_m * tiles_k, tiles_m * tiles_k // 2 - 1, 37, 5, 2, 1):
            check(cp, w, n, part_rows, seed, blocks=blocks, row_cost=0)


@both_parts
def test_exact_for_every_n(cp: Any, part_rows: int) -> None:
    for columns in (1000, 1003):
        w = weight("uniform", (300, columns), 0.2, "fp16")
        for n in range(1, 71):
            check(cp, w, n, part_rows, n)


@both_parts
def test_exact_where_no_element_is_zero(cp: Any, part_rows: int) -> None:
    w = weight("full", (1024, 4096), 1.0, "fp16")
    assert Slot24.from_dense(w, part_rows=part_rows).fronts[-1] > 100 * MAX_RING_ROWS
    for n in (8, 16, 32, 64):
        check(cp, w, n, part_rows, n)


@both_parts
def test_exact_where_every_element_is_zero(cp: Any, part_rows: int) -> None:
    for n in (8, 16, 32, 64):
        check(cp, np.zeros((300, 1000), np.float16), n, part_rows, n)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@both_parts
def test_a_value_read_ahead_is_not_used(cp: Any, dtype: str, part_rows: int) -> None:
    """Lanes without a value still load the next one of their stream: a NaN or infinity of a later tile."""
    w = weight("uniform", (256, 1536), 0.2, dtype)
    w[128:][w[128:] != 0] = np.nan
    w[200:][w[200:] != 0] = np.inf
    for n, blocks in ((8, 1), (33, 5), (64, 9)):
        x = integers(np.random.default_rng(1), (n, w.shape[1]), dtype)
        got = multiply(cp, x, Slot24.from_dense(w, part_rows=part_rows).to_device(), blocks=blocks, row_cost=0)
        assert_exact(np.ascontiguousarray(got[:, :128]), exact(x, w[:128], dtype))
        assert not np.isfinite(got[:, 128:].astype(np.float32)).any()


@both_parts
def test_infinities_of_x_reach_only_the_rows_that_may_meet_them(cp: Any, part_rows: int) -> None:
    """Every element of W times an infinity of x is an infinity; a zero may give NaN, and nothing else."""
    w = weight("uniform", (256, 1000), 0.15, "fp16")
    sparse = Slot24.from_dense(w, part_rows=part_rows).to_device()
    for n in (8, 16, 40):
        x = integers(np.random.default_rng(2), (n, 1000), "fp16")
        for column in (0, 5, 255, 256, 999):
            special = x.copy()
            special[0, column] = np.inf
            got = multiply(cp, special, sparse)
            assert_exact(np.ascontiguousarray(got[1:]), exact(x[1:], w, "fp16"))
            met = w[:, column] != 0
            np.testing.assert_array_equal(got[0, met], np.copysign(np.inf, w[met, column]))
            others = got[0, ~met]
            assert ((others == exact(x[:1], w[~met], "fp16")[0]) | np.isnan(others)).all()


@both_parts
def test_repeats_of_forced_splits_give_the_same_bits(cp: Any, part_rows: int) -> None:
    """With values whose sums depend on their order."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((1000, 3000)).astype(np.float16)
    w[rng.random(w.shape) >= 0.2] = 0
    sparse = Slot24.from_dense(w, part_rows=part_rows).to_device()
    for n in (8, 16, 64):
        x_host = rng.standard_normal((n, w.shape[1])).astype(np.float16)
        x = cp.asarray(x_host)
        assert len({spmm(x, sparse).get().tobytes() for _ in range(10)}) == 1
        assert len({multiply(cp, x_host, sparse, blocks=29, row_cost=0).tobytes() for _ in range(10)}) == 1
