# SPDX-License-Identifier: Apache-2.0
"""The host side of the slot24 kernel: instances, shared memory, splits, and constants that the device shares."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
from test_matmul import A100, H100

from flashllm import Slot24, plan
from flashllm.formats.base import DTYPES
from flashllm.formats.bitmap_encode import CHUNK_ROWS, LANES, PARTS, SLACK, STREAM_ELEMENTS
from flashllm.formats.slot24_pairs import GROUP_VALUES, MAX_WINDOW
from flashllm.formats.slot24_parts import PARTS_OF, STEPS
from flashllm.jit.sources import cuda_root
from flashllm.jit.spec import ALL_ARCHS
from flashllm.matmul import bitmap, slot24
from flashllm.matmul.stream_k import StreamK
from flashllm.matmul.tensor_cores import MAX_CHAIN_STEPS
from products import weight

SM_SHARED = {"80": 164 << 10, "90a": 228 << 10, "100a": 228 << 10}
"""Bytes of an SM; 100 KB on the others."""
SYSTEM_SHARED = 1 << 10
"""What the driver takes of that for each block."""


def packed(shape: tuple[int, int] = (256, 512), density: float = 0.2, part_rows: int | None = None) -> Slot24:
    return Slot24.from_dense(weight("uniform", shape, density, "fp16"), part_rows=part_rows)


def of(arch: str) -> list[slot24.Choice]:
    return [choice for choice in slot24.instances() if choice.spec.supports(arch)]


def constants(header: str) -> dict[str, str]:
    text = (cuda_root() / header).read_text(encoding="utf-8")
    return dict(re.findall(r"constexpr (?:int|unsigned) (k\w+) = ([^;]+);", text))


def test_host_and_device_agree_on_the_constants() -> None:
    window, ring = map(constants, ("flashllm/x_window.cuh", "flashllm/value_ring.cuh"))
    assert int(ring["kMaxChainSteps"]) == MAX_CHAIN_STEPS
    assert ring["kThreads"] == "bitmap::kTileThreads + bitmap::kLanes"
    assert int(window["kColumns"]) == MAX_WINDOW
    assert int(ring["kMirrorRows"]) == bitmap.MIRROR_ROWS


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_one_instance_for_each_width_layout_and_type(arch: str) -> None:
    """Whatever K is."""

    def facts(c: slot24.Choice) -> tuple[int, int, int, str, bool]:
        return c.n_block, c.part_rows, c.group_values, c.dtype, c.aligned

    found = of(arch)
    want = set(product(slot24.widths(arch), PARTS_OF, GROUP_VALUES, DTYPES, (True, False)))
    assert len(found) == len(want)
    assert {facts(c) for c in found} == want
    assert {facts(c) for c in slot24.typical(arch)} == want
    specs = {c.spec for c in found}
    assert specs == {spec for spec in slot24.specs() if spec.supports(arch)}
    assert len(specs) == len(want) // 2
    for choice in found:
        template = dict(choice.spec.template)
        assert (int(template["kN"]), int(template["kPartRows"])) == (choice.n_block, choice.part_rows)
        assert int(template["kGroupValues"]) == choice.group_values
        # Two teams of warps, and four warps that give them their registers; otherwise four warps and one.
        assert choice.spec.threads == LANES * (12 if choice.n_block == slot24.WIDE else PARTS + 1)


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_rings_hold_what_the_feeder_may_have_to_bring_at_one_time(arch: str) -> None:
    """As ``value_ring.cuh`` requires: see there."""
    for choice in of(arch):
        tiles = slot24.TILES if choice.group_values == 2 or choice.n_block == slot24.WIDE else 1
        moves = tiles * STREAM_ELEMENTS * choice.group_values // 4
        rows = int(dict(choice.spec.template)["kRing"])
        assert rows >= SLACK + moves + 1 + CHUNK_ROWS
        assert rows % CHUNK_ROWS == 0
        assert rows <= slot24.MAX_RING_ROWS


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_blocks_that_share_an_sm_fit_its_shared_memory(arch: str) -> None:
    for choice in of(arch):
        each = choice.spec.shared_bytes + SYSTEM_SHARED
        assert choice.resident_blocks * each <= SM_SHARED.get(arch, 100 << 10), choice
        assert 65536 // (choice.resident_blocks * choice.spec.threads) >= 128, "registers of a thread"


@pytest.mark.parametrize(
    ("n", "narrow", "wide"),
    [(1, (8, 1), (8, 1)), (8, (8, 1), (8, 1)), (9, (16, 1), (16, 1)), (17, (32, 1), (32, 1)), (33, (32, 2), (64, 1)),
     (64, (32, 2), (64, 1)), (65, (32, 3), (64, 2)), (200, (32, 7), (64, 4))],
)  # fmt: skip
def test_plan_covers_n(n: int, narrow: tuple[int, int], wide: tuple[int, int]) -> None:
    for device, blocks in ((H100, wide), (A100, narrow)):
        chosen = plan(packed(), n, device=device)
        assert (chosen.choice.n_block, chosen.grid[1]) == blocks
        assert chosen.spec in slot24.specs()


def test_wide_blocks_take_windows_of_x_as_tiles() -> None:
    """For 33 or more columns of x, where registers can be redistributed; the tuner also tries two blocks of 32."""
    w = packed((300, 1000), 0.05)
    wide = slot24.default_choice(w, 33, arch="90a")
    assert wide.n_block == slot24.WIDE
    assert slot24.usable(wide)
    assert {c.n_block for c in slot24.candidates(w, 33, arch="90a")} == {32, slot24.WIDE}
    for n, arch in ((32, "90a"), (33, "80"), (33, "100a")):
        assert all(c.n_block in slot24.N_BLOCKS for c in slot24.candidates(w, n, arch=arch))
    for n, columns in ((33, 1), (64, 1), (65, 2)):
        chosen = plan(w, n, device=H100)
        assert isinstance(chosen.split, StreamK)
        assert (chosen.split.tiles_m, chosen.split.tiles_k) == (3, 4)
        assert chosen.grid == (chosen.split.blocks, columns)
        assert chosen.scratch_bytes == columns * 4 * MAX_WINDOW * slot24.WIDE * 2
        assert chosen.split.max_chain * STEPS == MAX_CHAIN_STEPS
        assert "two teams" in chosen.reason


def test_reason_names_the_window() -> None:
    w = packed(density=0.3)
    assert f"windows of {w.window} columns for 32 rows" in plan(w, 8, device=H100).reason


def test_the_instance_is_one_for_the_shape_of_parts_of_the_weight() -> None:
    """Whether it is found or forced; what is measured for one shape is not used for the other."""
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
        {"n_block": 64},  # of the rooms of another
        {"n_block": 24},
        {"stages": 7},
        {"part_rows": 48},
        {"windows": 3},
        {"group_values": 3},
        {"blocks_per_sm": 0},
        {"blocks_per_sm": 65},
    ):
        assert not slot24.usable(replace(choice, **change)), change


@pytest.mark.parametrize("columns", [9, 512])
def test_candidates_differ_in_blocks(columns: int) -> None:
    """For any K, since one instance serves all."""
    w = packed((256, columns))
    found = list(slot24.candidates(w, 8, arch="90a"))
    assert found[0] == slot24.default_choice(w, 8, arch="90a")
    assert {choice.spec for choice in found} == {found[0].spec}
    assert sorted(choice.blocks_per_sm for choice in found) == [1, 2, 3, 4, 6]
    assert {choice.aligned for choice in found} == {columns % 8 == 0}
