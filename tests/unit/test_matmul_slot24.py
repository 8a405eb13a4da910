# SPDX-License-Identifier: Apache-2.0
"""The host side of the slot24 kernel: instances, shared memory, splits, and constants that the device shares."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from test_matmul import A100, H100

from flashllm import Slot24, plan
from flashllm.formats.base import DTYPES
from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.slot24_pairs import MAX_WINDOW
from flashllm.formats.slot24_parts import PARTS_OF, STEPS
from flashllm.jit.sources import cuda_root
from flashllm.jit.spec import ALL_ARCHS
from flashllm.matmul import bitmap, slot24
from flashllm.matmul.tensor_cores import MAX_CHAIN_STEPS
from products import weight

SM_SHARED = {"80": 164 << 10, "90a": 228 << 10, "100a": 228 << 10}
"""Bytes of an SM; 100 KB on the others."""
SYSTEM_SHARED = 1 << 10
"""What the driver takes of it for each block."""


def packed(shape: tuple[int, int] = (256, 512), density: float = 0.2, part_rows: int | None = None) -> Slot24:
    return Slot24.from_dense(weight("uniform", shape, density, "fp16"), part_rows=part_rows)


def constants(header: str) -> dict[str, str]:
    text = (cuda_root() / header).read_text(encoding="utf-8")
    return dict(re.findall(r"constexpr (?:int|unsigned) (k\w+) = ([^;]+);", text))


def test_host_and_device_agree_on_the_constants() -> None:
    windows, ring = map(constants, ("flashllm/x_window.cuh", "flashllm/value_ring.cuh"))
    assert int(ring["kMaxChainSteps"]) == MAX_CHAIN_STEPS
    assert ring["kThreads"] == "bitmap::kTileThreads + bitmap::kLanes"
    assert slot24.THREADS == PARTS * LANES + LANES
    assert int(windows["kWarps"]) == PARTS
    assert int(windows["kWarps"]) * int(windows["kWarpColumns"]) == MAX_WINDOW
    assert int(ring["kMirrorRows"]) == bitmap.MIRROR_ROWS


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_one_instance_for_each_width_shape_of_parts_type_and_alignment(arch: str) -> None:
    def facts(c: slot24.Choice) -> tuple[int, int, str, bool]:
        return c.n_block, c.part_rows, c.dtype, c.aligned

    found = [facts(c) for c in slot24.instances() if c.spec.supports(arch)]
    want = set(product(slot24.N_BLOCKS, PARTS_OF, DTYPES, (True, False)))
    assert len(found) == len(want)
    assert set(found) == want
    assert {facts(c) for c in slot24.typical(arch)} == want


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_blocks_that_share_an_sm_fit_its_shared_memory(arch: str) -> None:
    for choice in slot24.typical(arch):
        each = choice.spec.shared_bytes + SYSTEM_SHARED
        assert choice.resident_blocks * each <= SM_SHARED.get(arch, 100 << 10), choice
        assert 65536 // (choice.resident_blocks * slot24.THREADS) >= 128, "registers of a thread"


@pytest.mark.parametrize(("n", "blocks"), [(1, (8, 1)), (8, (8, 1)), (9, (16, 1)), (17, (32, 1)), (33, (32, 2)),
                                           (64, (32, 2)), (65, (32, 3)), (200, (32, 7))])  # fmt: skip
def test_plan_covers_n(n: int, blocks: tuple[int, int]) -> None:
    for device in (H100, A100):
        chosen = plan(packed(), n, device=device)
        assert (chosen.choice.n_block, chosen.grid[1]) == blocks
        assert chosen.spec in slot24.specs()


def test_reason_names_the_window() -> None:
    w = packed(density=0.3)
    assert f"windows of {w.window} columns for 32 rows" in plan(w, 8, device=H100).reason


def test_the_instance_is_one_for_the_shape_of_parts_of_the_weight() -> None:
    """Whichever is found or forced; what is measured for one shape is not found for the other."""
    low, high = (packed(density=0.05, part_rows=rows) for rows in (32, 64))
    assert packed(density=0.05).part_rows == 64
    forced = plan(low, 16, device=H100).choice
    for w in (low, high):
        for choice in (None, forced):
            chosen: slot24.Choice = plan(w, 16, device=H100, choice=choice).choice  # type: ignore[assignment]
            assert chosen.part_rows == w.part_rows
            assert chosen.spec in slot24.specs()
    assert slot24.tune_key(low, 16) != slot24.tune_key(high, 16)


def test_tiles_are_those_of_the_slots() -> None:
    w = packed((300, 1000), 0.05)
    assert (w.window, w.tiles) == (256, (3, 8))
    split = plan(w, 8, device=H100).split
    assert (split.tiles_m, split.tiles_k) == w.tiles
    assert split.max_chain * STEPS == MAX_CHAIN_STEPS


def test_choices_of_a_file_are_checked() -> None:
    choice = slot24.default_choice(packed(), 16, arch="90a")
    assert slot24.usable(choice)
    for change in (
        {"n_block": 64},
        {"stages": 7},
        {"part_rows": 48},
        {"windows": 3},
        {"blocks_per_sm": 0},
        {"blocks_per_sm": 65},
    ):
        assert not slot24.usable(replace(choice, **change)), change


def test_candidates_of_unaligned_k_are_the_default() -> None:
    w = Slot24.from_dense(np.eye(9, dtype=np.float16))
    (only,) = slot24.candidates(w, 8, arch="90a")
    assert not only.aligned
    found = list(slot24.candidates(packed(), 8, arch="90a"))
    assert len(found) == len(set(found)) == 5
