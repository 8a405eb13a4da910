# SPDX-License-Identifier: Apache-2.0
"""Stream-K split of a grid of weight tiles over blocks; mirrors ``cuda/flashllm/stream_k.cuh``.

Stream-K (Osama et al., PPoPP'23) deals the tiles to the blocks in contiguous runs of equal cost. A row of tiles that
several blocks share leaves one fp32 piece per block in a workspace; the row's last block adds them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashllm.errors import ArgumentError
from flashllm.formats.runs import RUNS, Runs

PIECE_ROWS = 128
INDEX_LIMIT = 2**32 - 1  # the device multiplies costs by blocks in 32 bits
SLOTS_PER_BLOCK = 2  # a block has at most two unfinished rows of tiles: its first and its last
_MIN_TILES_PER_PIECE = 3  # a shorter piece of a row costs more to write and add than it saves
_MIN_TILES_PER_BLOCK = 8  # from here on it pays to weigh the ends of rows
_ALIGNED_ENOUGH = 0.965  # of the blocks that fit: as few as this are used if then none spans two rows of tiles
_RUNS_ENOUGH = 0.9  # of the blocks that fit: the format's runs are used if there are at least so many


@dataclass(frozen=True, kw_only=True)
class StreamK:
    """``tiles_m`` x ``tiles_k`` tiles over ``blocks`` blocks, once for each block of ``n_block`` columns of x.

    A run may not cost less than ``row_cost`` + 1, or a block could be left without a tile.
    """

    tiles_m: int
    tiles_k: int
    blocks: int
    n_block: int
    column_blocks: int = 1
    row_cost: int = 0
    """Tiles that the end of a row counts for: what a block loses there while it writes its accumulators."""
    max_chain: int = 1 << 30
    """Tiles a block accumulates before it writes its piece: longer rows pass through the workspace."""
    counter_bytes: int = 0
    """Bytes of the workspace for whatever else the blocks of a launch count."""
    scratch_bytes: int = 0
    """Bytes of scratch memory, which may hold anything before and after a launch."""

    def __post_init__(self) -> None:
        most = min(self.tiles, self.cost // (self.row_cost + 1))
        if not 1 <= self.blocks <= most:
            raise ArgumentError("blocks", expected=f"1 to {most} blocks, a tile for each", got=str(self.blocks))

    @property
    def tiles(self) -> int:
        """Total number of tiles."""
        return self.tiles_m * self.tiles_k

    @property
    def runs(self) -> Runs:
        """The tiles of each block."""
        return Runs(self.tiles_m, self.tiles_k, self.blocks, self.row_cost)

    @property
    def cost(self) -> int:
        """Total cost in tiles, ends of rows included."""
        return self.runs.cost

    def describe(self, sm_count: int) -> str:
        """How the tiles are dealt on ``sm_count`` multiprocessors, in words."""
        return (
            f"{self.tiles_m}x{self.tiles_k} tiles over {self.blocks}x{self.column_blocks} blocks "
            f"on {sm_count} SMs ({self.tiles / self.blocks:.1f} tiles each)"
        )

    def first_tile(self, block: int) -> int:
        """First tile of ``block``; that of ``block + 1`` is one past the last tile of ``block``."""
        return self.runs.first_tile(block)

    def block_of(self, tile: int) -> int:
        """The block that holds ``tile``."""
        return self.runs.run_of(tile)

    def pieces(self, tile_m: int) -> int:
        """Blocks that share row ``tile_m`` of tiles; 1 when one block computes it alone."""
        first = tile_m * self.tiles_k
        return self.block_of(first + self.tiles_k - 1) - self.block_of(first) + 1

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the tiles of W and along N."""
        return self.blocks, self.column_blocks

    @property
    def workspace_bytes(self) -> int:
        """Bytes of counters, of all slots, and of one more piece for each block where rows are longer than a chain.

        Only counters are needed when one block computes each row of tiles in one chain.
        """
        one_chain = self.tiles_k <= self.max_chain
        if one_chain and self.tiles_m % self.blocks == 0:
            return self.counter_bytes
        pieces = self.column_blocks * self.blocks * (SLOTS_PER_BLOCK + (0 if one_chain else 1))
        return self.counter_bytes + pieces * self.n_block * PIECE_ROWS * 4


def stream_k_for(
    grid: tuple[int, int], *, n_block: int, column_blocks: int, blocks: int, row_cost: int, max_chain: int
) -> StreamK:
    """A split of ``grid``, tiles along M and along K, over about ``blocks`` blocks, all column blocks together.

    A few blocks fewer are used if then none spans two rows of tiles; otherwise the ends of rows are weighted with
    ``row_cost``, so that the blocks that do span two are not the last to finish.
    """
    tiles_m, tiles_k = grid
    tiles = tiles_m * tiles_k
    worthwhile = tiles_m * max(1, tiles_k // _MIN_TILES_PER_PIECE)
    blocks = max(1, min(worthwhile, blocks // column_blocks, INDEX_LIMIT // tiles))
    weight = 0
    aligned = blocks - blocks % tiles_m
    if aligned >= _ALIGNED_ENOUGH * blocks:
        blocks = aligned
    elif tiles >= _MIN_TILES_PER_BLOCK * blocks:
        weight = row_cost
        blocks = min(blocks, INDEX_LIMIT // (tiles_m * (tiles_k + row_cost)))
    return StreamK(
        tiles_m=tiles_m,
        tiles_k=tiles_k,
        blocks=blocks,
        n_block=n_block,
        column_blocks=column_blocks,
        row_cost=weight,
        max_chain=max_chain,
    )


def stream_k_for_runs(
    runs: Runs, *, n_block: int, column_blocks: int, blocks: int, row_cost: int, max_chain: int
) -> StreamK:
    """A split over about ``blocks`` blocks: one for each of the format's runs where that is about as many."""
    grid = (runs.tiles_m, runs.tiles_k)
    fit = blocks // column_blocks
    small = runs.count < _ALIGNED_ENOUGH * RUNS  # a matrix for which more runs would not pay
    if runs.count <= fit and (small or runs.count >= _RUNS_ENOUGH * fit):
        return StreamK(
            tiles_m=runs.tiles_m,
            tiles_k=runs.tiles_k,
            blocks=runs.count,
            n_block=n_block,
            column_blocks=column_blocks,
            row_cost=runs.row_cost,
            max_chain=max_chain,
        )
    return stream_k_for(
        grid, n_block=n_block, column_blocks=column_blocks, blocks=blocks, row_cost=row_cost, max_chain=max_chain
    )
