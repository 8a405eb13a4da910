# SPDX-License-Identifier: Apache-2.0
"""Slot24 for 64 columns of x: two teams of warps share the windows, where registers can be given from warp to warp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_spmm import multiply

from flashllm import Slot24
from flashllm.device import device_facts
from flashllm.formats import runs
from flashllm.matmul import slot24
from products import assert_exact, exact, integers, weight

layouts = pytest.mark.parametrize("layout", [(32, 4), (64, 4), (32, 2), (64, 2)], ids=str)
"""Rows that pair alike, and values of a group."""


@pytest.fixture(autouse=True)
def _arch(cp: Any) -> None:
    if slot24.WIDE not in slot24.widths(device_facts().arch):
        pytest.skip("no wide blocks on this architecture")


def check(cp: Any, w: NDArray[Any], n: int, layout: tuple[int, int], seed: int = 0, **split: int) -> None:
    dtype = "fp16" if w.dtype == np.float16 else "bf16"
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), dtype)
    sparse = Slot24.from_dense(w, part_rows=layout[0], group_values=layout[1])
    wide = slot24.default_choice(sparse, slot24.WIDE, arch=device_facts().arch)
    assert_exact(multiply(cp, x, sparse.to_device(), wide, **split), exact(x, w, dtype))


def density(layout: tuple[int, int], most: float) -> float:
    """``most``, or what a weight of the layout can have."""
    return most if layout[1] == 4 else min(most, Slot24.densest(group_values=2))


@pytest.mark.sanitize
@layouts
def test_exact_for_every_n(cp: Any, layout: tuple[int, int]) -> None:
    for n in (1, 33, 63, 64, 65, 130):
        w = weight("uniform", (300, 1021 + n % 2 * 3), density(layout, 0.2), "fp16", n)
        check(cp, w, n, layout, n)


@layouts
@pytest.mark.parametrize("pattern", ["uniform", "skewed", "column", "even-columns", "empty-tiles"])
def test_exact_while_ring_and_windows_turn(cp: Any, pattern: str, layout: tuple[int, int]) -> None:
    """In one run, in several, in one run for every window, and as planned."""
    for dtype in ("fp16", "bf16"):
        w = weight(pattern, (260, 9595), density(layout, 0.3), dtype, 3)
        for blocks in (1, 7, 114):
            check(cp, w, 64, layout, blocks, blocks=blocks, row_cost=0)
        check(cp, w, 50, layout)


@layouts
def test_exact_where_runs_of_the_format_begin_in_either_tile(
    cp: Any, layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (5, 9, 40):
        monkeypatch.setattr(runs, "RUNS", count)
        for blocks in (1, 3, 11):
            check(cp, weight("skewed", (256, 4100), density(layout, 0.3), "fp16", count), 64, layout, blocks=blocks)


@layouts
def test_repeats_give_the_same_bits(cp: Any, layout: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((1500, 2600)).astype(np.float16)
    w[rng.random(w.shape) >= density(layout, 0.2)] = 0
    x = rng.standard_normal((64, 2600)).astype(np.float16)
    sparse = Slot24.from_dense(w, part_rows=layout[0], group_values=layout[1])
    wide = slot24.default_choice(sparse, slot24.WIDE, arch=device_facts().arch)
    device = sparse.to_device()
    assert len({multiply(cp, x, device, wide).tobytes() for _ in range(30)}) == 1
