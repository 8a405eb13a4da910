# SPDX-License-Identifier: Apache-2.0
"""The grid of 128 x 64 tiles that formats cut a matrix into."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE_M = 128
"""Rows of a tile."""
TILE_K = 64
"""Columns of a tile."""


def tile_grid(shape: tuple[int, int]) -> tuple[int, int]:
    """Tiles along M and along K."""
    return -(-shape[0] // TILE_M), -(-shape[1] // TILE_K)


def whole_tiles(block: NDArray[np.uint16], tiles: int) -> NDArray[np.uint16]:
    """[128, tiles * 64] patterns: ``block`` itself, or a copy with zeros at the bottom and the right."""
    if block.shape == (TILE_M, tiles * TILE_K):
        return block
    padded = np.zeros((TILE_M, tiles * TILE_K), np.uint16)
    padded[: block.shape[0], : block.shape[1]] = block
    return padded
