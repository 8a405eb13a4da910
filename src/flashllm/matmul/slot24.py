# SPDX-License-Identifier: Apache-2.0
"""Host side of ``cuda/spmm/slot24.cu``: its instances, which one a product takes, and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.runs import runs_of
from flashllm.formats.slot24_encode import TILES
from flashllm.formats.slot24_pairs import GROUP_VALUES, MAX_WINDOW
from flashllm.formats.slot24_parts import PARTS_OF, STEPS
from flashllm.jit.spec import ALL_ARCHS, KernelSpec
from flashllm.matmul.bitmap import MIRROR_ROWS, ROW_BYTES
from flashllm.matmul.stream_k import StreamK, stream_k_for, stream_k_for_runs
from flashllm.matmul.tensor_cores import CXX_TYPE, MAX_BLOCKS_PER_SM, MAX_CHAIN_STEPS, n_block_for
from flashllm.matmul.x_images import with_images

if TYPE_CHECKING:
    from flashllm.formats.slot24 import Slot24

N_BLOCKS = (8, 16, 32)
"""Columns of x one block computes, on any architecture."""
WIDE = 64
"""Columns of x of a block that has an SM to itself, on an architecture that can reallocate registers among warps."""
_WIDE_ARCHS = ("90a",)
_COLUMN_BYTES = {8: 16, 16: 32, 32: 80, WIDE: 128}  # of each column in a window of x, by the rows of x
_FRAGMENT_BYTES = 512  # sums that are passed to a warp with the same rows
_ROW_COST = 2  # see matmul/bitmap.py
# Blocks that share an SM, by columns of x: as many as its shared memory holds; one on other architectures (100 KB).
_RESIDENT_BLOCKS = {
    "80": {8: 2, 16: 2, 32: 1},
    "90a": {8: 3, 16: 3, 32: 2, WIDE: 1},
    "100a": {8: 3, 16: 2, 32: 1},  # more would spill
}


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What a block keeps in shared memory."""

    ring_rows: int
    """Value rows."""
    stages: int
    """Steps whose masks, picks and columns have room."""
    windows: int
    """Windows of x: one is read, the others are in flight."""


# By columns of x and values of a group. A step covers both tiles of a window where groups have two values or x is wide,
# and one tile otherwise.
_ROOM = {
    (8, 2): _Room(ring_rows=96, stages=2, windows=2),
    (16, 2): _Room(ring_rows=80, stages=2, windows=2),
    (32, 2): _Room(ring_rows=96, stages=3, windows=2),
    (8, 4): _Room(ring_rows=80, stages=5, windows=3),
    (16, 4): _Room(ring_rows=80, stages=3, windows=2),
    (32, 4): _Room(ring_rows=96, stages=4, windows=2),
    (WIDE, 2): _Room(ring_rows=128, stages=4, windows=3),
    (WIDE, 4): _Room(ring_rows=128, stages=4, windows=3),
}
# Blocks on an SM with 100 KB have less.
_SMALL_ROOM = _ROOM | {
    (32, 2): _Room(ring_rows=80, stages=2, windows=2),
    (32, 4): _Room(ring_rows=80, stages=3, windows=2),
}
MAX_RING_ROWS = max(room.ring_rows for room in _ROOM.values())
"""Most value rows that a block keeps in shared memory."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel and how many blocks of it share the device."""

    dtype: str
    n_block: int
    part_rows: int = 32
    """Of the weight; planning sets it."""
    group_values: int = 4
    """Of the weight; planning sets it."""
    ring_rows: int = 80
    """Value rows that a block keeps in shared memory."""
    stages: int = 4
    windows: int = 2
    """Windows of x that have room in shared memory."""
    resident_blocks: int = 3
    """Blocks that share an SM."""
    aligned: bool = True
    """K is a multiple of 8. That does not matter here: one instance serves any K."""
    blocks_per_sm: int = 3
    """Blocks launched per SM."""

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance of this choice."""
        return _spec(replace(self, blocks_per_sm=0, aligned=True))


@cache
def _spec(choice: Choice) -> KernelSpec:
    n = choice.n_block
    parts = PARTS_OF[choice.part_rows]
    teams = _teams(n)
    step_tiles = TILES if choice.group_values == 2 or teams == 2 else 1
    stage_bytes = step_tiles * PARTS * LANES * (8 + 8 + parts.steps)  # masks, picks and columns
    return KernelSpec(
        name="slot24",
        source="spmm/slot24.cu",
        function="flashllm::spmm_slot24",
        template=(
            ("T", CXX_TYPE[choice.dtype]),
            ("kN", str(n)),
            ("kPartRows", str(parts.rows)),
            ("kGroupValues", str(choice.group_values)),
            ("kRing", str(choice.ring_rows)),
            ("kStages", str(choice.stages)),
            ("kWindows", str(choice.windows)),
            ("kMinBlocks", str(choice.resident_blocks)),
        ),
        threads=(PARTS + 1 if teams == 1 else 3 * PARTS) * LANES,  # two teams take registers from four other warps
        shared_bytes=PARTS * (choice.ring_rows + MIRROR_ROWS) * ROW_BYTES
        + choice.windows * MAX_WINDOW * _COLUMN_BYTES[n]
        + choice.stages * stage_bytes
        + _sum_fragments(n, parts.halves) * _FRAGMENT_BYTES
        + choice.stages * 16,  # barriers
        archs=_archs_of(choice),
    )


def _teams(n_block: int) -> int:
    """Teams of four multiplying warps in a block."""
    return 2 if n_block == WIDE else 1


def _sum_fragments(n_block: int, halves: int) -> int:
    """Fragments in flight at a time: one of each pair of halves or, with two teams, all of a row fragment."""
    if _teams(n_block) == 1:
        return PARTS // 2 if halves == 2 else 0
    slices = 2 * halves
    return 2 * PARTS // slices * (slices - 1) * n_block // 8


def _archs_of(choice: Choice) -> tuple[str, ...]:
    room = _Room(ring_rows=choice.ring_rows, stages=choice.stages, windows=choice.windows)
    return tuple(
        arch
        for arch in ALL_ARCHS
        if choice.n_block in widths(arch)
        and resident_blocks(arch, choice.n_block) == choice.resident_blocks
        and _room(arch, choice.n_block, choice.group_values) == room
    )


def _room(arch: str, n_block: int, group_values: int) -> _Room:
    return (_ROOM if arch in _RESIDENT_BLOCKS else _SMALL_ROOM)[n_block, group_values]


def widths(arch: str) -> tuple[int, ...]:
    """Columns of x that a block can compute on ``arch``."""
    return (*N_BLOCKS, WIDE) if arch in _WIDE_ARCHS else N_BLOCKS


def resident_blocks(arch: str, n_block: int) -> int:
    """Blocks that share an SM of ``arch``."""
    return _RESIDENT_BLOCKS.get(arch, {}).get(n_block, 1)


def default_choice(w: Slot24, n: int, *, arch: str) -> Choice:
    """The heuristic's choice for ``n`` columns of x on ``arch``."""
    layout = w.part_rows, w.group_values
    return _choice(w.dtype, n_block_for(n, widths(arch)), layout, arch, aligned=w.shape[1] % 8 == 0)


def _choice(dtype: str, n_block: int, layout: tuple[int, int], arch: str, *, aligned: bool) -> Choice:
    room, resident = _room(arch, n_block, layout[1]), resident_blocks(arch, n_block)
    return Choice(
        dtype=dtype,
        n_block=n_block,
        part_rows=layout[0],
        group_values=layout[1],
        ring_rows=room.ring_rows,
        stages=room.stages,
        windows=room.windows,
        resident_blocks=resident,
        aligned=aligned,
        blocks_per_sm=resident,
    )


def split_for(w: Slot24, n: int, choice: Choice, *, sm_count: int) -> StreamK:
    """Blocks and workspace of ``choice``: about as many blocks as fit the device at once."""
    how = {
        "n_block": choice.n_block,
        "column_blocks": -(-n // choice.n_block),
        "blocks": sm_count * choice.blocks_per_sm,
        "row_cost": _ROW_COST,
        "max_chain": MAX_CHAIN_STEPS // STEPS,
    }
    if _teams(choice.n_block) == 2:
        # Windows are dealt, not tiles, so that both teams have the same amount of work.
        split = stream_k_for((w.tiles[0], w.tiles[1] // TILES), **how)
    else:
        split = stream_k_for_runs(runs_of(w.tiles), **how)
    window_bytes = MAX_WINDOW * _COLUMN_BYTES[choice.n_block]
    return with_images(split, images=-(-w.shape[1] // w.window), image_bytes=window_bytes, group=1)


def reason(w: Slot24, choice: Choice, split: StreamK, *, sm_count: int) -> str:
    """One line on how the tiles are dealt and what they hold."""
    n_blocks = f"N blocks of {choice.n_block}" + (", two teams of warps" if _teams(choice.n_block) == 2 else "")
    window = f"windows of {w.window} columns for {w.part_rows} rows, up to {w.group_values} values in a group"
    return f"{split.describe(sm_count)}, mma.sp, {n_blocks}, {window}, {w.bytes_per_element:.3f} bytes per element"


def arguments(w: Slot24, split: StreamK, x: Any, out: Any, workspace: Any, scratch: Any) -> tuple[Any, ...]:
    """The kernel's arguments in the order of its parameters; x is [N, K]."""
    rows, columns = w.shape
    runs = runs_of(w.tiles)
    arrays = (x, w.masks, w.values, w.fronts, w.places, w.picks, w.columns, out, workspace, scratch)
    return (*arrays, *map(np.int32, (rows, x.shape[0], columns, w.window, split.row_cost, runs.count, runs.row_cost)))


def candidates(w: Slot24, n: int, *, arch: str) -> Iterator[Choice]:
    """Choices worth measuring for ``n`` columns of x, the heuristic's first; every one is a compiled spec."""
    base = default_choice(w, n, arch=arch)
    yield base
    for blocks_per_sm in (1, 2, 3, 4, 6):
        choice = replace(base, blocks_per_sm=blocks_per_sm)
        if choice != base:
            yield choice
    if base.n_block == WIDE:
        yield _choice(w.dtype, N_BLOCKS[-1], (w.part_rows, w.group_values), arch, aligned=base.aligned)


def tune_key(w: Slot24, n: int) -> str:
    """Density class, in tenths, layout and column blocks."""
    columns = n_block_for(n, N_BLOCKS)
    return f"d{round(10 * w.density)} r{w.part_rows} g{w.group_values} n{columns}x{-(-n // columns)}"


def usable(choice: Choice) -> bool:
    """Whether a choice that comes from a file may be launched."""
    known = choice.n_block in _COLUMN_BYTES and choice.part_rows in PARTS_OF and choice.group_values in GROUP_VALUES
    return known and choice.spec in specs() and 1 <= choice.blocks_per_sm <= MAX_BLOCKS_PER_SM


def ablation(choice: Choice) -> dict[str, Choice]:
    """None: no variants are compiled."""
    return {}


@cache
def instances() -> tuple[Choice, ...]:
    """Choices for every instance that a plan or the tuner can request, one for each kind of K."""
    choices = [
        _choice(dtype, n_block, (part_rows, values), arch, aligned=aligned)
        for arch in ALL_ARCHS
        for n_block in widths(arch)
        for part_rows in PARTS_OF
        for values in GROUP_VALUES
        for dtype in CXX_TYPE
        for aligned in (True, False)
    ]
    return tuple({(choice.spec, choice.aligned): choice for choice in choices}.values())


def typical(arch: str) -> tuple[Choice, ...]:
    """The instances that the heuristic takes on ``arch``: two for every width, layout and type."""
    return tuple(choice for choice in instances() if choice.spec.supports(arch))


@cache
def specs() -> tuple[KernelSpec, ...]:
    """The compiled kernels of :func:`instances`."""
    return tuple(dict.fromkeys(choice.spec for choice in instances()))
