# SPDX-License-Identifier: Apache-2.0
"""Host side of ``cuda/spmm/bitmap.cu``: its instances, which one a product takes, and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.runs import runs_of
from flashllm.formats.tiles import TILE_K, TILE_M
from flashllm.jit.spec import ALL_ARCHS, KernelSpec
from flashllm.matmul.stream_k import StreamK, stream_k_for_runs
from flashllm.matmul.tensor_cores import (
    CXX_TYPE,
    K_STEP,
    MAX_BLOCKS_PER_SM,
    MAX_CHAIN_STEPS,
    N_BLOCKS,
    cxx_bool,
    n_block_for,
)
from flashllm.matmul.x_images import with_images

if TYPE_CHECKING:
    from flashllm.formats.bitmap import Bitmap

THREADS = (PARTS + 1) * LANES
ROW_BYTES = 4 * LANES  # a value row of one part
MIRROR_ROWS = 16  # rows that a ring holds twice
RING_ROWS = {8: 96, 16: 96, 32: 96, 64: 112}
"""Value rows that a block keeps in shared memory, by its columns of x."""
_STAGES = {8: 4, 16: 4, 32: 3, 64: 3}
# By architecture and columns of x: as many blocks as fit an SM's shared memory and, at 64 columns, its registers (two
# on sm_100a would spill). Other architectures, whose SMs have 100 KB, get one.
_RESIDENT_BLOCKS = {
    "80": {8: 2, 16: 2, 32: 2, 64: 1},
    "90a": {8: 3, 16: 3, 32: 3, 64: 2},
    "100a": {8: 3, 16: 3, 32: 3, 64: 1},
}
# What writing the accumulators costs a block, in tiles: between 0 and 4 the time changes by less than 1 % (measured).
_ROW_COST = 2
_IMAGES_FROM = 32  # columns of x: from here on, x is laid out once per launch for wgmma (x_images.cuh)
_IMAGE_GROUP = 8  # tiles whose images of x share a counter


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel and how many blocks of it share the device."""

    dtype: str
    n_block: int
    warpgroup: bool
    """Multiply by wgmma instead of mma.sync."""
    aligned: bool = True
    """K is a multiple of 8, so rows of x start 16-byte aligned."""
    resident_blocks: int = 3
    """Blocks that share an SM."""
    blocks_per_sm: int = 3
    """Blocks launched per SM."""

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance of this choice."""
        return _spec(replace(self, blocks_per_sm=0))


@cache
def _spec(choice: Choice) -> KernelSpec:
    stages = _STAGES[choice.n_block]
    stage_bytes = choice.n_block * TILE_K * 2 + TILE_M * TILE_K // 8
    ring_bytes = PARTS * (RING_ROWS[choice.n_block] + MIRROR_ROWS) * ROW_BYTES
    if choice.warpgroup:
        archs: tuple[str, ...] = ("90a",)
    else:
        blocks = choice.resident_blocks
        archs = tuple(a for a in ALL_ARCHS if resident_blocks(a, choice.n_block) == blocks)
    return KernelSpec(
        name="bitmap",
        source="spmm/bitmap.cu",
        function="flashllm::spmm_bitmap",
        template=(
            ("T", CXX_TYPE[choice.dtype]),
            ("kN", str(choice.n_block)),
            ("kRing", str(RING_ROWS[choice.n_block])),
            ("kStages", str(stages)),
            ("kMinBlocks", str(choice.resident_blocks)),
            ("kWarpgroup", cxx_bool(choice.warpgroup)),
            ("kAligned", cxx_bool(choice.aligned)),
        ),
        threads=THREADS,
        shared_bytes=ring_bytes + stages * stage_bytes + stages * 16,
        archs=archs,
    )


def resident_blocks(arch: str, n_block: int) -> int:
    """Blocks that share an SM of ``arch``."""
    return _RESIDENT_BLOCKS.get(arch, {}).get(n_block, 1)


def paths_for(n_block: int, arch: str) -> tuple[bool, ...]:
    """Whether to multiply by wgmma, preferred answer first: on Hopper, it is faster from 32 columns on (measured)."""
    if arch != "90a":
        return (False,)
    return (True, False) if n_block == 32 else (True,) if n_block > 32 else (False, True)


def default_choice(w: Bitmap, n: int, *, arch: str) -> Choice:
    """The heuristic's choice for ``n`` columns of x on ``arch``."""
    n_block = n_block_for(n)
    return _choice(w.dtype, n_block, paths_for(n_block, arch)[0], arch, aligned=w.shape[1] % 8 == 0)


def _choice(dtype: str, n_block: int, warpgroup: bool, arch: str, *, aligned: bool = True) -> Choice:
    resident = resident_blocks(arch, n_block)
    return Choice(
        dtype=dtype,
        n_block=n_block,
        warpgroup=warpgroup,
        aligned=aligned,
        resident_blocks=resident,
        blocks_per_sm=resident,
    )


def split_for(w: Bitmap, n: int, choice: Choice, *, sm_count: int) -> StreamK:
    """Blocks and workspace of ``choice``: about as many blocks as fit the device at once."""
    split = stream_k_for_runs(
        runs_of(w.tiles),
        n_block=choice.n_block,
        column_blocks=-(-n // choice.n_block),
        blocks=sm_count * choice.blocks_per_sm,
        row_cost=_ROW_COST,
        max_chain=MAX_CHAIN_STEPS * K_STEP // TILE_K,
    )
    if not choice.warpgroup or choice.n_block < _IMAGES_FROM:
        return split
    image_bytes = choice.n_block * TILE_K * 2
    return with_images(split, images=w.tiles[1], image_bytes=image_bytes, group=_IMAGE_GROUP)


def reason(w: Bitmap, choice: Choice, split: StreamK, *, sm_count: int) -> str:
    """One line on how the tiles are dealt and which path multiplies them."""
    path = "wgmma" if choice.warpgroup else "mma.sync"
    n_blocks = f"N blocks of {choice.n_block}"
    return f"{split.describe(sm_count)}, {path}, {n_blocks}, {w.bytes_per_element:.3f} bytes per element"


def arguments(w: Bitmap, split: StreamK, x: Any, out: Any, workspace: Any, scratch: Any) -> tuple[Any, ...]:
    """The kernel's arguments in the order of its parameters; x is [N, K]."""
    rows, columns = w.shape
    runs = runs_of(w.tiles)
    numbers = (rows, x.shape[0], columns, split.row_cost, runs.count, runs.row_cost)
    return (x, w.masks, w.values, w.fronts, w.places, out, workspace, scratch, *map(np.int32, numbers))


def candidates(w: Bitmap, n: int, *, arch: str) -> Iterator[Choice]:
    """Choices worth measuring for ``n`` columns of x, the heuristic's first; every one is a compiled spec."""
    base = default_choice(w, n, arch=arch)
    yield base
    if not base.aligned:
        return
    for warpgroup in paths_for(base.n_block, arch):
        for blocks_per_sm in (1, 2, 3, 4, 6):
            choice = replace(base, warpgroup=warpgroup, blocks_per_sm=blocks_per_sm)
            if choice != base:
                yield choice


def tune_key(w: Bitmap, n: int) -> str:
    """Density class, in tenths, and column blocks."""
    columns = n_block_for(n)
    return f"d{round(10 * w.density)} n{columns}x{-(-n // columns)}"


def usable(choice: Choice) -> bool:
    """Whether a choice that comes from a file may be launched."""
    return choice.n_block in N_BLOCKS and choice.spec in specs() and 1 <= choice.blocks_per_sm <= MAX_BLOCKS_PER_SM


def ablation(choice: Choice) -> dict[str, Choice]:
    """None: no variants are compiled."""
    return {}


@cache
def instances() -> tuple[Choice, ...]:
    """One choice for every instance that a plan or the tuner can request."""
    choices = [
        _choice(dtype, n_block, warpgroup, arch, aligned=aligned)
        for arch in ALL_ARCHS
        for n_block in N_BLOCKS
        for warpgroup in paths_for(n_block, arch)
        for dtype in CXX_TYPE
        for aligned in (True, False)
    ]
    return tuple({choice.spec: choice for choice in choices}.values())


def typical(arch: str) -> tuple[Choice, ...]:
    """The instances that the heuristic takes on ``arch``: one for every width, type and alignment."""
    return tuple(
        choice
        for choice in instances()
        if choice.spec.supports(arch) and choice.warpgroup == paths_for(choice.n_block, arch)[0]
    )


@cache
def specs() -> tuple[KernelSpec, ...]:
    """The compiled kernels of :func:`instances`."""
    return tuple(choice.spec for choice in instances())
