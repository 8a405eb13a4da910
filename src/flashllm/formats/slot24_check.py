# SPDX-License-Identifier: Apache-2.0
"""Slot24: check of every invariant, in time linear in the number of tiles and values."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.formats import bitmap_check
from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.check import check_array, check_nnz, check_shape_and_type, refuse
from flashllm.formats.slot24_encode import (
    PART_OF_ROW,
    STEP_PAIRS,
    STEPS,
    slots_shape,
    unpack_columns,
    unpack_picks,
)
from flashllm.formats.slot24_pairs import LEGAL_WINDOW, MAX_WINDOW, PAIRS, RESIDUES, column_lists, legal_window
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

if TYPE_CHECKING:
    from flashllm.formats.bitmap import Bitmap


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
    *, slots: Bitmap, shape: tuple[int, int], window: int, picks: Any, columns: Any, path: str | None = None
) -> None:
    """``FormatError`` unless ``slots`` is a sound bitmap, and picks and columns agree with it.

    Call ``check_fields`` and ``check_buffers`` first. An index counts the entries of a buffer from its beginning.
    """
    slots.check_content(path=path)
    tiles_k = slots.tiles[1]
    first_column = np.arange(tiles_k * TILE_K)[:, None] // PAIRS * window
    for number, values in enumerate(slots.strips()):
        first = number * tiles_k
        listed = unpack_columns(columns[first : first + tiles_k])
        _check_columns(first, listed, window, path)
        stored = np.zeros((TILE_M, values.shape[1]), np.bool_)
        stored[: len(values)] = values != 0
        from_right = unpack_picks(picks[first : first + tiles_k])
        if (from_right & ~stored).any():
            row, slot = np.argwhere(from_right & ~stored)[0].tolist()
            expected = "bits only where a value is stored"
            got = f"one at row {row} of the tiles, slot {slot}"
            raise FormatError(
                field="picks", index=_word_of_pick(first, row, slot), expected=expected, got=got, path=path
            )
        beyond = (listed >= window) | (listed + first_column >= shape[1])
        wrong = stored & np.where(from_right, beyond[PART_OF_ROW, :, 1], beyond[PART_OF_ROW, :, 0])
        if wrong.any():
            row, slot = np.argwhere(wrong)[0].tolist()
            part, side = int(PART_OF_ROW[row]), int(from_right[row, slot])
            raise FormatError(
                field="columns",
                index=_byte_of_column(first, part, slot, side),
                expected=f"values only in columns of the matrix, below {shape[1]}, and in no dummy",
                got=f"one in column {listed[part, slot, side]} of window {slot // PAIRS}, row {row} of the tiles",
                path=path,
            )


def _check_columns(first: int, listed: NDArray[np.uint8], window: int, path: str | None) -> None:
    """Every part lists every left and right of a window as often as it has them; ``listed`` is [4, slots, 2]."""
    for side, (name, wanted) in enumerate(zip(("left", "right"), column_lists(window), strict=True)):
        lists = listed[:, :, side].reshape(PARTS, -1, PAIRS)
        wrong = (np.sort(lists, axis=-1) != np.sort(wanted)).any(axis=-1)
        if not wrong.any():
            continue
        part, number = np.argwhere(wrong)[0].tolist()
        missing = Counter(wanted.tolist())
        for slot, column in enumerate(lists[part, number].tolist(), number * PAIRS):
            missing[column] -= 1
            if missing[column] < 0:
                copies = (MAX_WINDOW - window) // RESIDUES
                raise FormatError(
                    field="columns",
                    index=_byte_of_column(first, part, slot, side),
                    expected=f"every {name} of a window of {window} once, and {copies} copies of its dummies",
                    got=f"{column}" if column not in wanted else f"{column} once more",
                    path=path,
                )


def _byte_of_column(first: int, part: int, slot: int, side: int) -> int:
    """Index in the columns of a side of a slot, in the row of tiles that begins with tile ``first``."""
    tile, inside = divmod(slot, TILE_K)
    step, pair = divmod(inside, STEP_PAIRS)
    return (((first + tile) * PARTS + part) * LANES + 2 * pair + side) * STEPS + step


def _word_of_pick(first: int, row: int, slot: int) -> int:
    """Index in the picks of the word that has the bit of a slot, in the row of tiles that begins with ``first``."""
    tile, inside = divmod(slot, TILE_K)
    step, pair = divmod(inside, STEP_PAIRS)
    lane = row % 8 * 4 + step % 2 * 2 + pair // (STEP_PAIRS // 2)
    return (((first + tile) * PARTS + int(PART_OF_ROW[row])) * LANES + lane) * 2 + step // 2
