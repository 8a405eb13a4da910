# SPDX-License-Identifier: Apache-2.0
"""Runs: contiguous parts of a matrix's tiles, from whose begins the value streams of a bitmap do not look back.

A block of a kernel that starts at a run needs no value row from before it. So a matrix has as many runs as blocks work
on it at one time on the GPUs that the format was made for: three on each of 132 multiprocessors. Other GPUs start
anywhere, at the price of reading some rows twice. Mirrors ``cuda/flashllm/runs.cuh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUNS = 396
"""Runs of a matrix that is large enough."""
_LEAST_TILES = 8  # of a run: shorter ones cost more than they save
_ALIGNED_ENOUGH = 0.965  # of the runs, to have none that spans two rows of tiles
_ROW_COST = 2


@dataclass(frozen=True)
class Runs:
    """``count`` runs of ``tiles_m`` x ``tiles_k`` tiles, numbered row by row, of equal cost.

    The end of a row of tiles costs like ``row_cost`` tiles.
    """

    tiles_m: int
    tiles_k: int
    count: int
    row_cost: int

    @property
    def cost(self) -> int:
        """Tiles in all, ends of rows included."""
        return self.tiles_m * (self.tiles_k + self.row_cost)

    def first_tile(self, run: int) -> int:
        """First tile of ``run``; of ``run + 1``, one past its last."""
        row, column = divmod(self.cost * run // self.count, self.tiles_k + self.row_cost)
        return row * self.tiles_k + min(column, self.tiles_k)

    def run_of(self, tile: int) -> int:
        """The run that holds ``tile``."""
        return ((tile + tile // self.tiles_k * self.row_cost + 1) * self.count - 1) // self.cost

    def first_tiles(self) -> NDArray[np.int64]:
        """The first tiles of all runs, ascending."""
        return np.array([self.first_tile(run) for run in range(self.count)], np.int64)


def runs_of(grid: tuple[int, int]) -> Runs:
    """The runs of a matrix of ``grid`` tiles along M and along K: part of the format."""
    tiles_m, tiles_k = grid
    count = max(1, min(RUNS, tiles_m * tiles_k // _LEAST_TILES))
    aligned = count - count % tiles_m
    if aligned >= _ALIGNED_ENOUGH * count:
        return Runs(tiles_m, tiles_k, aligned, 0)
    return Runs(tiles_m, tiles_k, count, _ROW_COST)
