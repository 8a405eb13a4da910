# SPDX-License-Identifier: Apache-2.0
"""Slot24: check of every invariant, in time linear in the number of tiles and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.formats import bitmap_check
from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.check import check_array, check_nnz, check_shape_and_type, refuse
from flashllm.formats.slot24_encode import STEPS, slots_shape
from flashllm.formats.slot24_pairs import LEGAL_WINDOW, legal_window
from flashllm.formats.tiles import tile_grid


def check_fields(*, shape: Any, dtype: Any, nnz: Any, window: Any, path: str | None = None) -> None:
    """``FormatError`` unless the scalar fields have legal types and ranges."""
    check_shape_and_type(shape=shape, dtype=dtype, path=path)
    if not legal_window(window):
        refuse("window", LEGAL_WINDOW, window, path)
    check_nnz(nnz, shape=(shape[0], min(shape[1], slots_shape(shape, window)[1])), path=path)


def check_buffers(
    *, shape: tuple[int, int], window: int, picks: Any, columns: Any, path: str | None = None, **bitmap: Any
) -> None:
    """``FormatError`` unless the buffers (NumPy or CuPy) have the types and shapes the matrix asks for."""
    slots = slots_shape(shape, window)
    bitmap_check.check_buffers(shape=slots, path=path, **bitmap)
    tiles_m, tiles_k = tile_grid(slots)
    reason = f"{tiles_m} x {tiles_k} tiles"
    tiles = tiles_m * tiles_k
    check_array("picks", picks, np.uint32, (tiles, PARTS, LANES, 2), reason=reason, path=path)
    check_array("columns", columns, np.uint8, (tiles, PARTS, LANES, STEPS), reason=reason, path=path)


def check_content(
    *, shape: tuple[int, int], nnz: int, window: int, picks: Any, columns: Any, path: str | None = None, **bitmap: Any
) -> None:
    """``FormatError`` unless the slots are a sound bitmap, and picks, columns and ``nnz`` agree with it."""
    bitmap_check.check_content(shape=slots_shape(shape, window), nnz=nnz, path=path, **bitmap)
