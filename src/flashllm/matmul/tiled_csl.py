# SPDX-License-Identifier: Apache-2.0
"""Host side of ``cuda/spmm/tiled_csl.cu``: its instances, which one a product takes, and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.formats.tiled_csl import WORDS_PER_VECTOR
from flashllm.formats.tiles import TILE_K, TILE_M
from flashllm.jit.spec import ALL_ARCHS, KernelSpec
from flashllm.matmul.stream_k import StreamK, stream_k_for
from flashllm.matmul.tensor_cores import (
    CXX_TYPE,
    K_STEP,
    MAX_BLOCKS_PER_SM,
    MAX_CHAIN_STEPS,
    N_BLOCKS,
    cxx_bool,
    n_block_for,
)

if TYPE_CHECKING:
    from flashllm.formats.tiled_csl import TiledCSL

THREADS = 128
IMAGES = 3  # tile images, and x stages, in shared memory
VECTORS = (2, 4, 5)
"""Vectors of 4 words that a thread holds of one tile: for tiles of up to 1024, 2048 and 2560 words at full speed."""
WARPGROUP = 0
"""Value of ``slices`` that selects wgmma."""
X_ALIGNMENT = 16
# K slices for mma.sync, by n_block: few accumulator registers versus few re-reads of x. Two at 32 spill on sm_120a.
_SLICES = {8: 2, 16: 2, 32: 1, 64: 1}
# What writing the accumulators costs a block, in tiles, by n_block (measured).
_ROW_COST = {8: 3, 16: 3, 32: 3, 64: 4}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel and how many blocks of it share the device."""

    dtype: str
    n_block: int
    vectors: int
    slices: int
    """Warps along K with mma.sync; :data:`WARPGROUP` for wgmma."""
    aligned: bool = True
    """K is a multiple of 8, so rows of x start 16-byte aligned."""
    resident_blocks: int = 3
    """Blocks that share an SM: three leave a thread 168 registers, two 255."""
    blocks_per_sm: int = 3
    """Blocks launched per SM."""
    overlap: bool = True
    """Load, scatter and multiply at the same time."""
    undo: bool = True
    """Clear an image by storing zeros where values were, not as a whole."""

    @property
    def prefetch_kib(self) -> int:
        """KiB of words prefetched into the L2 ahead of their loads, which pays where a tile has few words in flight."""
        return 8 if self.vectors < VECTORS[-1] else 0

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance of this choice."""
        return _spec(replace(self, blocks_per_sm=0))


@cache
def _spec(choice: Choice) -> KernelSpec:
    return KernelSpec(
        name="tiled_csl",
        source="spmm/tiled_csl.cu",
        function="flashllm::spmm_tiled_csl",
        template=(
            ("T", CXX_TYPE[choice.dtype]),
            ("kN", str(choice.n_block)),
            ("kSlices", str(choice.slices)),
            ("kVectors", str(choice.vectors)),
            ("kPrefetch", str(choice.prefetch_kib)),
            ("kMinBlocks", str(choice.resident_blocks)),
            ("kAligned", cxx_bool(choice.aligned)),
            ("kOverlap", cxx_bool(choice.overlap)),
            ("kUndo", cxx_bool(choice.undo)),
        ),
        threads=THREADS,
        shared_bytes=IMAGES * (TILE_M * TILE_K * 2 + choice.n_block * TILE_K * 2),
        archs=("90a",) if choice.resident_blocks == 3 else tuple(arch for arch in ALL_ARCHS if arch != "90a"),
    )


def paths_for(n_block: int, arch: str) -> tuple[tuple[int, int], ...]:
    """(slices, resident blocks) of the tensor-core paths on ``arch``, the preferred one first.

    On Hopper, wgmma needs fewer accumulators and no ldmatrix, but a proxy fence per tile; it was measured to be faster
    from 32 columns on. Elsewhere mma.sync is used, with as many registers as two blocks leave.
    """
    if arch != "90a":
        return ((_SLICES[n_block], 2),)
    if n_block <= 16:
        return ((_SLICES[n_block], 3), (WARPGROUP, 3))
    return ((WARPGROUP, 3),)


def vectors_for(w: TiledCSL) -> int:
    """Register vectors per thread: enough for all but the fullest tiles.

    A tile over the limit is still multiplied, but its excess words are read twice more from memory. Sizing for
    the fullest tile of an uneven weight would cost every tile, so the mean plus a quarter is enough.
    """
    tiles = w.tiles[0] * w.tiles[1]
    typical = min(w.max_tile_words, int(1.25 * w.words.size / max(tiles, 1)) + 1)
    words_per_vector = THREADS * WORDS_PER_VECTOR
    return next((v for v in VECTORS if v * words_per_vector >= typical), VECTORS[-1])


def default_choice(w: TiledCSL, n: int, *, arch: str) -> Choice:
    """The heuristic's choice for ``n`` columns of x on ``arch``."""
    n_block = n_block_for(n)
    aligned = w.shape[1] % 8 == 0
    vectors = vectors_for(w) if aligned else VECTORS[1]
    return _choice(w.dtype, n_block, vectors, paths_for(n_block, arch)[0], aligned=aligned)


def _choice(dtype: str, n_block: int, vectors: int, path: tuple[int, int], *, aligned: bool = True) -> Choice:
    slices, resident_blocks = path
    return Choice(
        dtype=dtype,
        n_block=n_block,
        # Accumulators for 64 columns and three sets of 5 vectors exceed 168 registers; loads of elements take some too.
        vectors=min(vectors, VECTORS[1 if aligned else 0]) if n_block == N_BLOCKS[-1] else vectors,
        slices=slices,
        aligned=aligned,
        resident_blocks=resident_blocks,
        blocks_per_sm=resident_blocks,
    )


def split_for(w: TiledCSL, n: int, choice: Choice, *, sm_count: int) -> StreamK:
    """Blocks and workspace of ``choice``: about as many blocks as fit the device at once."""
    return stream_k_for(
        w.tiles,
        n_block=choice.n_block,
        column_blocks=-(-n // choice.n_block),
        blocks=sm_count * choice.blocks_per_sm,
        row_cost=_ROW_COST[choice.n_block],
        max_chain=MAX_CHAIN_STEPS * max(choice.slices, 1) * K_STEP // TILE_K,
    )


def reason(w: TiledCSL, choice: Choice, split: StreamK, *, sm_count: int) -> str:
    """One line on how the tiles are dealt and which path multiplies them."""
    path = "wgmma" if choice.slices == WARPGROUP else f"mma.sync, {choice.slices} K slices"
    return (
        f"{split.describe(sm_count)}, {path}, N blocks of {choice.n_block}, "
        f"{choice.vectors} vectors per thread for at most {w.max_tile_words} words per tile"
    )


def arguments(w: TiledCSL, split: StreamK, x: Any, out: Any, workspace: Any, scratch: Any) -> tuple[Any, ...]:
    """The kernel's arguments in the order of its parameters; x is [N, K]."""
    rows, columns = w.shape
    numbers = (rows, x.shape[0], columns, split.row_cost)
    return (x, w.words, w.tile_offsets, out, workspace, *map(np.int32, numbers))


def candidates(w: TiledCSL, n: int, *, arch: str) -> Iterator[Choice]:
    """Choices worth measuring for ``n`` columns of x, the heuristic's first; every one is a compiled spec."""
    base = default_choice(w, n, arch=arch)
    choices = [base]
    if base.aligned:
        choices += [
            replace(_choice(base.dtype, base.n_block, vectors, path), blocks_per_sm=blocks_per_sm)
            for path in paths_for(base.n_block, arch)
            for vectors in VECTORS
            for blocks_per_sm in (1, 2, 3, 4, 6)
        ]
    yield from dict.fromkeys(choices)


def tune_key(w: TiledCSL, n: int) -> str:
    """Density class and column blocks."""
    columns = n_block_for(n)
    return f"v{vectors_for(w)} n{columns}x{-(-n // columns)}"


def usable(choice: Choice) -> bool:
    """Whether a choice that comes from a file may be launched."""
    return choice.spec in specs() and 1 <= choice.blocks_per_sm <= MAX_BLOCKS_PER_SM


def ablation(choice: Choice) -> dict[str, Choice]:
    """The paper's ablation steps where they are compiled: no overlap, and clearing whole images."""
    known = set(specs())
    variants = _without_one_idea(choice)
    return variants if choice.aligned and all(variant.spec in known for variant in variants.values()) else {}


def _without_one_idea(choice: Choice) -> dict[str, Choice]:
    return {"no-overlap": replace(choice, overlap=False), "clear-all": replace(choice, undo=False)}


@cache
def instances() -> tuple[Choice, ...]:
    """One choice for every instance that a plan, the tuner or the ablation can request."""
    choices: list[Choice] = []
    for arch in ("80", "90a"):
        for n_block in N_BLOCKS:
            for path in paths_for(n_block, arch):
                for dtype in CXX_TYPE:
                    choices += [_choice(dtype, n_block, vectors, path) for vectors in VECTORS]
                    choices.append(_choice(dtype, n_block, VECTORS[1], path, aligned=False))
        for vectors in VECTORS:
            choices += _without_one_idea(_choice("fp16", 16, vectors, paths_for(16, arch)[0])).values()
    return tuple({choice.spec: choice for choice in choices}.values())


def typical(arch: str) -> tuple[Choice, ...]:
    """The instances that the heuristic takes most often on ``arch``: one for every width, type and alignment."""
    return tuple(
        choice
        for choice in instances()
        if choice
        == _choice(choice.dtype, choice.n_block, VECTORS[1], paths_for(choice.n_block, arch)[0], aligned=choice.aligned)
    )


@cache
def specs() -> tuple[KernelSpec, ...]:
    """The compiled kernels of :func:`instances`."""
    return tuple(choice.spec for choice in instances())
