# SPDX-License-Identifier: Apache-2.0
"""Matrices for the tests of the formats: every pattern at any shape and density."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

PATTERNS = ("uniform", "per-row", "skewed", "block", "column", "empty-tiles", "even-columns", "full", "empty")
NUMPY_DTYPE: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def mask(pattern: str, rows: int, columns: int, density: float, seed: int) -> NDArray[np.bool_]:
    """Which elements are kept."""
    rng = np.random.default_rng(seed)
    draw = rng.random((rows, columns))
    if pattern == "per-row":
        keep = round(density * columns)
        return np.argsort(np.argsort(draw, axis=1), axis=1) < keep
    if pattern == "skewed":
        return draw < np.minimum(1, density * 2 * rng.random((rows, 1)) ** 2 * 1.5)
    if pattern == "block":
        blocks = rng.random((-(-rows // 16), -(-columns // 16))) < density
        return np.kron(blocks, np.ones((16, 16), bool))[:rows, :columns]
    if pattern == "lagging":
        return _lagging(rows, columns, density, rng)
    out = draw < density
    if pattern == "column":
        out[:, columns // 2] = True
    elif pattern == "empty-tiles":
        tile_row, tile_column = np.indices((rows, columns)) // np.array([128, 64])[:, None, None]
        out &= (tile_row + tile_column) % 2 == 0
    elif pattern == "even-columns":
        out[:, 1::2] = False
    elif pattern == "full":
        out[:] = True
    elif pattern == "empty":
        out[:] = False
    return out


def _lagging(rows: int, columns: int, density: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """From tile 2 on, every stream of a bitmap except one lags by 31 rows, and has values of its own.

    Tile 1 has the elements of one stream, all 32; each other tile has equally many elements of every stream.
    """
    row, column = np.indices((rows, columns))
    tile = row // 128 * -(-columns // 64) + column // 64
    place = column // 16 % 4 * 8 + row // 64 % 2 * 4 + row // 8 % 2 * 2 + column % 2  # in its stream
    chosen = rng.random((tile[-1, -1] + 1, 32)) < rng.random((tile[-1, -1] + 1, 1)) * 2 * density
    leads = (row % 64 // 16 == 0) & (row % 8 == 0) & (column % 16 < 2)
    return np.where(tile == 1, leads, chosen[tile, place])


def bits(pattern: str, rows: int, columns: int, density: float, seed: int) -> NDArray[np.uint16]:
    """16-bit patterns: any bits at all where an element is kept (zeros of both signs, NaN, infinity included)."""
    rng = np.random.default_rng(seed + 1)
    values = rng.integers(0, 1 << 16, (rows, columns)).astype(np.uint16)
    special = np.array([0x0000, 0x8000, 0x7C00, 0xFC00, 0x7F80, 0x7E01, 0x0001, 0x8001], np.uint16)
    values = np.where(rng.random((rows, columns)) < 0.02, rng.choice(special, (rows, columns)), values)
    kept = np.where(mask(pattern, rows, columns, density, seed), values, np.uint16(0))
    # Some pruned elements are -0.0.
    return np.where((kept == 0) & (rng.random((rows, columns)) < 0.05), np.uint16(0x8000), kept).astype(np.uint16)


def matrix(pattern: str, rows: int, columns: int, density: float, seed: int, dtype: str) -> NDArray[Any]:
    """``bits`` as fp16 or bf16 values."""
    return bits(pattern, rows, columns, density, seed).view(NUMPY_DTYPE[dtype])


def pruned(a: NDArray[Any]) -> NDArray[np.uint16]:
    """Bit patterns of ``a`` with every zero positive: what decoding must return."""
    patterns = a.view(np.uint16).copy()
    patterns[patterns & 0x7FFF == 0] = 0
    return patterns
