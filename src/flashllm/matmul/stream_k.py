# SPDX-License-Identifier: Apache-2.0
"""Stream-K split of a grid of weight tiles over blocks; mirrors ``cuda/flashllm/stream_k.cuh``.

Stream-K (Osama et al., PPoPP'23) deals the tiles to the blocks in contiguous runs of equal cost. A row of tiles that
several blocks share leaves one fp32 piece per block in a workspace; they are added in block order.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashllm.errors import ArgumentError

COUNTER_BYTES = 4
COUNTER_ALIGNMENT = 128
PIECE_ROWS = 128
INDEX_LIMIT = 2**32 - 1  # the device multiplies costs by blocks in 32 bits
PIECES_PER_BLOCK = 2  # a block has at most two unfinished rows of tiles: its first and its last


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

    def __post_init__(self) -> None:
        most = min(self.tiles, self.cost // (self.row_cost + 1))
        if not 1 <= self.blocks <= most:
            raise ArgumentError("blocks", expected=f"1 to {most} blocks, a tile for each", got=str(self.blocks))

    @property
    def tiles(self) -> int:
        """Tiles in all."""
        return self.tiles_m * self.tiles_k

    @property
    def cost(self) -> int:
        """Tiles in all, ends of rows included."""
        return self.tiles_m * (self.tiles_k + self.row_cost)

    def first_tile(self, block: int) -> int:
        """First tile of ``block``; of ``block + 1``, one past its last."""
        row, column = divmod(self.cost * block // self.blocks, self.tiles_k + self.row_cost)
        return row * self.tiles_k + min(column, self.tiles_k)

    def block_of(self, tile: int) -> int:
        """The block that holds ``tile``."""
        return ((tile + tile // self.tiles_k * self.row_cost + 1) * self.blocks - 1) // self.cost

    def pieces(self, tile_m: int) -> int:
        """Blocks that share row ``tile_m`` of tiles; 1 when one block computes it alone."""
        first = tile_m * self.tiles_k
        return self.block_of(first + self.tiles_k - 1) - self.block_of(first) + 1

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the tiles of W and along N."""
        return self.blocks, self.column_blocks

    @property
    def counter_bytes(self) -> int:
        """Bytes of arrival counters at the start of the workspace; 0 where there is none."""
        return self.column_blocks * self.tiles_m * COUNTER_BYTES if self.workspace_bytes else 0

    @property
    def workspace_bytes(self) -> int:
        """Bytes of arrival counters and pieces; 0 when one block computes each row of tiles in one chain."""
        if self.tiles_m % self.blocks == 0 and self.tiles_k <= self.max_chain:
            return 0
        counters = self.column_blocks * self.tiles_m * COUNTER_BYTES
        counters = -(-counters // COUNTER_ALIGNMENT) * COUNTER_ALIGNMENT
        piece = self.n_block * PIECE_ROWS * 4
        return counters + self.column_blocks * self.blocks * PIECES_PER_BLOCK * piece
