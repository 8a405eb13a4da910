# SPDX-License-Identifier: Apache-2.0
"""x laid out once for a launch: in shares by all blocks, by those that cannot wait, for several column blocks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import plan
from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions, EmulationError
from flashllm.formats.weight import SparseWeight
from flashllm.jit.sources import cuda_root
from flashllm.matmul.stream_k import StreamK
from products import assert_exact, every_pair, exact, integers, packed, weight

pytestmark = pytest.mark.usefixtures("kernels")
PATHS = ("80", "90a")
both_paths = pytest.mark.parametrize("arch", PATHS)
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "bitmap": ("bitmap", {}),
    **{
        f"slot24-{rows}-{values}": ("slot24", {"part_rows": rows, "group_values": values})
        for rows in (32, 64)
        for values in (2, 4)
    },
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@cache
def encoded(layout: str, shape: tuple[int, int], seed: int = 0) -> tuple[NDArray[Any], SparseWeight]:
    name, options = LAYOUTS[layout]
    w = weight("uniform", shape, 0.3 if name == "bitmap" else 0.07, "fp16", seed)
    return w, packed(name, w, **options)


def check(layout: str, shape: tuple[int, int], n: int, arch: str, seed: int = 0, **split: int) -> emulator.Counts:
    """The product is exact; the emulator finds the workspace zero and nothing written after the scratch memory."""
    w, sparse = encoded(layout, shape)
    x = integers(np.random.default_rng(seed), (n, shape[1]), "fp16")
    got, counts = emulator.spmm(x, sparse, arch=arch, seed=seed, **split)
    assert_exact(got, exact(x, w, "fp16"))
    return counts


def split_of(layout: str, shape: tuple[int, int], n: int, arch: str, blocks: int) -> StreamK:
    """The split as ``emulator.spmm`` makes it."""
    split: Any = plan(encoded(layout, shape)[1], n, device=emulator.emulated_device(arch), expand=False).split
    return replace(split, blocks=blocks, row_cost=0)


@every_pair("layout, columns, arch", LAYOUTS, (1000, 1001, 1023, 1024, 1030), PATHS)
def test_exact_for_any_k(columns: int, layout: str, arch: str) -> None:
    """Multiples of 8, odd ones, windows and tiles that end with the matrix and that do not."""
    for seed, (n, blocks) in enumerate(((32, 1), (30, 5), (64, 7))):
        check(layout, (256, columns), n, arch, seed, blocks=blocks)


@every_pair("layout, blocks, arch", LAYOUTS, (1, 2, 5, 7), PATHS)
def test_exact_for_several_column_blocks(blocks: int, layout: str, arch: str) -> None:
    """Each has its own images, and the blocks of all column blocks help to lay them out."""
    for n in (33, 65, 70, 130):
        check(layout, (256, 1001), n, arch, n, blocks=blocks)


@both_paths
@every_layout
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_exact_for_more_pieces_than_warps(blocks: int, layout: str, arch: str) -> None:
    """Few blocks, and rows of so many images that a feeding warp looks twice at its counters."""
    shape = (128, 64 * 270) if layout == "bitmap" else (128, 256 * 34 + 9)
    split = split_of(layout, shape, 40, arch, blocks)
    assert split.counter_bytes > 32 * 32 * split.column_blocks or (layout, arch) == ("bitmap", "80")
    check(layout, shape, 40, arch, blocks, blocks=blocks)


@both_paths
@every_layout
@pytest.mark.parametrize("blocks", [5, 7])
def test_exact_for_runs_that_begin_amid_a_window(blocks: int, layout: str, arch: str) -> None:
    shape = (256, 1801)
    for n in (8, 16, 32, 70):
        split = split_of(layout, shape, n, arch, blocks)
        begins = [split.first_tile(block) for block in range(blocks)]
        assert {begin % 2 for begin in begins} == {0, 1}
        check(layout, shape, n, arch, n, blocks=blocks, row_cost=0)


@both_paths
@every_layout
def test_exact_where_blocks_do_not_begin(layout: str, arch: str) -> None:
    """Far more blocks than run at one time: those that do lay out what the others would."""
    shape = (512, 64 * 27 - 3)
    for seed in range(4):
        check(layout, shape, 70, arch, seed, blocks=(23, 28)[seed % 2])


@both_paths
@every_layout
def test_exact_for_blocks_of_one_tile(layout: str, arch: str) -> None:
    """Some begin and end with the first tile of a window, and need only the image that they lay out themselves."""
    shape = (256, 1000)
    sparse: Any = encoded(layout, shape)[1]
    for n in (8, 16, 32, 40):
        split: Any = plan(sparse, n, device=emulator.emulated_device(arch)).split
        check(layout, shape, n, arch, n, blocks=split.tiles)


@pytest.mark.parametrize("layout", ["bitmap", "slot24-32-4", "slot24-64-2"])
def test_fewer_images_than_a_block_has_room_for(layout: str) -> None:
    """Rows of one tile or window: the next row's x is the same."""
    for columns in (1, 64, 128):
        for blocks in (1, 2, 4):
            check(layout, (128 * 5, columns), 40, "90a", blocks, blocks=blocks)


def kernels_that(change: tuple[str, str], folder: Path, arch: str) -> BuildOptions:
    """Kernels from a copy of the device code with one thing changed."""
    shutil.copytree(cuda_root(), folder)
    header = folder / "flashllm/x_images.cuh"
    text = header.read_text(encoding="utf-8")
    assert text.count(change[0]) == 1
    header.write_text(text.replace(*change), encoding="utf-8")
    return BuildOptions(arch=arch, source_root=folder)


LAY_OUT = "FLASHLLM_DEVICE void lay_out(int number) const {\n"
TELL = ("        if (has_share) tell(warp);\n", "")


@pytest.mark.parametrize(
    ("layout", "arch"),
    # Each builds the kernel twice. In the bitmap kernel wgmma alone has images; slot24's layouts do not matter here.
    [("bitmap", "90a"), ("slot24-32-4", "80"), ("slot24-64-2", "90a")],
)
def test_both_ways_are_taken(layout: str, arch: str, tmp_path: Path) -> None:
    """Blocks that run together copy what they have laid out together; if no share is announced, warps lay out all.

    In the trapped build, a feeding warp that lays out an image reads outside every argument; the emulator reports it.
    """
    w, sparse = encoded(layout, (256, 1801))
    x = integers(np.random.default_rng(1), (32, 1801), "fp16")
    want = exact(x, w, "fp16")
    trap = (LAY_OUT, LAY_OUT + "        ptx::load_relaxed(static_cast<const float4*>(nullptr));\n")
    trapped, alone = (kernels_that(change, tmp_path / name, arch) for name, change in (("trap", trap), ("alone", TELL)))
    lays_out = False
    for seed in range(6):
        got, _ = emulator.spmm(x, sparse, seed=seed, build=trapped, blocks=1)
        assert_exact(got, want)
        try:
            emulator.spmm(x, sparse, seed=seed, build=trapped, blocks=9)
        except EmulationError as error:
            lays_out |= "read of 16 bytes" in str(error)
        got, _ = emulator.spmm(x, sparse, seed=seed, build=alone, blocks=5)
        assert_exact(got, want)
    assert lays_out
