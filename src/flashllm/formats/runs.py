# SPDX-License-Identifier: Apache-2.0
"""Runs: contiguous ranges of a matrix's tiles at whose start the value streams of a bitmap start afresh.

A block of a kernel that starts at a run needs no value row from before it. So a matrix has as many runs as blocks work
on it at a time on the GPUs that the format was made for: three on each of 132 multiprocessors. On other GPUs, blocks
start anywhere, at the price of reading some rows twice. Mirrors ``cuda/flashllm/runs.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUNS = 396
"""Runs of a matrix that is large enough."""
_LEAST_TILES = 8  # in a run: shorter runs cost more than they save
_ALIGNED_ENOUGH = 0.965  # of the runs: as few as this are used if then none spans two rows of tiles
_ROW_COST = 2


@dataclass(frozen=True)
class Runs:
    """``count`` runs of equal cost over ``tiles_m`` x ``tiles_k`` tiles, which are numbered row by row.

    The end of a row of tiles costs as much as ``row_cost`` tiles.
    """

    tiles_m: int
    tiles_k: int
    count: int
    row_cost: int

    @property
    def cost(self) -> int:
        """Total cost in tiles, ends of rows included."""
        return self.tiles_m * (self.tiles_k + self.row_cost)

    def first_tile(self, run: int) -> int:
        """First tile of ``run``; that of ``run + 1`` is one past the last tile of ``run``."""
        row, column = divmod(self.cost * run // self.count, self.tiles_k + self.row_cost)
        return row * self.tiles_k + min(column, self.tiles_k)

    def run_of(self, tile: int) -> int:
        """The run that holds ``tile``."""
        return ((tile + tile // self.tiles_k * self.row_cost + 1) * self.count - 1) // self.cost

    def first_tiles(self) -> NDArray[np.int64]:
        """The first tiles of all runs, ascending."""
        return np.array([self.first_tile(run) for run in range(self.count)], np.int64)


def runs_of(grid: tuple[int, int]) -> Runs:
    """The runs of a matrix of ``grid`` tiles along M and along K; this rule is part of the format."""
    tiles_m, tiles_k = grid
    count = max(1, min(RUNS, tiles_m * tiles_k // _LEAST_TILES))
    aligned = count - count % tiles_m
    if aligned >= _ALIGNED_ENOUGH * count:
        return Runs(tiles_m, tiles_k, aligned, 0)
    return Runs(tiles_m, tiles_k, count, _ROW_COST)
