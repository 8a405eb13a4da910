# SPDX-License-Identifier: Apache-2.0
"""Slot24: checks every invariant in time linear in the number of tiles and values."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.formats import bitmap_check
from flashllm.formats.bitmap_encode import GROUP, LANES, PARTS
from flashllm.formats.check import check_array, check_nnz, check_shape_and_type, refuse
from flashllm.formats.slot24_encode import slots_shape, unpack_picks
from flashllm.formats.slot24_pairs import (
    GROUP_VALUES,
    LEGAL_WINDOW,
    MAX_WINDOW,
    PAIRS,
    RESIDUES,
    column_lists,
    legal_group_values,
    legal_window,
)
from flashllm.formats.slot24_parts import PARTS_OF, Columns, Parts, legal_part_rows
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

if TYPE_CHECKING:
    from flashllm.formats.bitmap import Bitmap


def check_fields(
    *, shape: Any, dtype: Any, nnz: Any, window: Any, part_rows: Any, group_values: Any, path: str | None = None
) -> None:
    """Raise ``FormatError`` unless the scalar fields have legal types and ranges."""
    check_shape_and_type(shape=shape, dtype=dtype, path=path)
    if not legal_window(window):
        refuse("window", LEGAL_WINDOW, window, path)
    if not legal_part_rows(part_rows):
        refuse("part_rows", " or ".join(map(str, PARTS_OF)), part_rows, path)
    if not legal_group_values(group_values):
        refuse("group_values", " or ".join(map(str, GROUP_VALUES)), group_values, path)
    check_nnz(nnz, shape=(shape[0], min(shape[1], slots_shape(shape, window)[1])), path=path)


def check_buffers(
    *,
    shape: tuple[int, int],
    window: int,
    part_rows: int,
    picks: Any,
    columns: Any,
    path: str | None = None,
    **bitmap: Any,
) -> None:
    """Raise ``FormatError`` unless the buffers (NumPy or CuPy) have the types and shapes that the matrix requires."""
    slots = slots_shape(shape, window)
    bitmap_check.check_buffers(shape=slots, path=path, **bitmap)
    tiles_m, tiles_k = tile_grid(slots)
    reason = f"{tiles_m} x {tiles_k} tiles"
    tiles = tiles_m * tiles_k
    check_array("picks", picks, np.uint32, (tiles, PARTS, LANES, 2), reason=reason, path=path)
    check_array(
        "columns", columns, np.uint8, (tiles, PARTS, LANES, PARTS_OF[part_rows].steps), reason=reason, path=path
    )


def check_content(
    *,
    slots: Bitmap,
    shape: tuple[int, int],
    window: int,
    parts: Parts,
    group_values: int,
    picks: Any,
    columns: Any,
    path: str | None,
) -> None:
    """Raise ``FormatError`` unless ``slots``, as stored, is a valid bitmap, and picks and columns agree with it.

    Call ``check_fields`` and ``check_buffers`` first. The index in an error counts entries of the flattened buffer.
    """
    slots.check_content(path=path)
    _check_groups(slots.masks, group_values, path)
    tiles_k = slots.tiles[1]
    first_column = np.arange(tiles_k * TILE_K)[:, None] // PAIRS * window
    for number, values in enumerate(slots.strips()):
        first = number * tiles_k
        listed = parts.unpack_columns(columns[first : first + tiles_k])
        _check_columns(first, listed, window, parts, path)
        stored = parts.restored(values) != 0
        from_right = parts.restored(unpack_picks(picks[first : first + tiles_k]))
        _check_rows(first, stored, shape, parts, path)
        if (from_right & ~stored).any():
            row, slot = np.argwhere(from_right & ~stored)[0].tolist()
            expected = "bits only where a value is stored"
            got = f"one at row {row} of the tiles, slot {slot}"
            raise FormatError(
                field="picks", index=parts.word_of_pick(first, row, slot), expected=expected, got=got, path=path
            )
        beyond = (listed >= window) | (listed + first_column >= shape[1])
        wrong = stored & np.where(from_right, beyond[parts.band_of_row, :, 1], beyond[parts.band_of_row, :, 0])
        if wrong.any():
            row, slot = np.argwhere(wrong)[0].tolist()
            band, side = int(parts.band_of_row[row]), int(from_right[row, slot])
            raise FormatError(
                field="columns",
                index=parts.byte_of_column(first, band, slot, side),
                expected=f"values only in columns of the matrix, below {shape[1]}, and in no dummy",
                got=f"one in column {listed[band, slot, side]} of window {slot // PAIRS}, row {row} of the tiles",
                path=path,
            )


def _check_groups(masks: NDArray[np.uint32], group_values: int, path: str | None) -> None:
    """Check that no group, the bits 8 apart in a word, has more than ``group_values`` bits set."""
    flags = np.unpackbits(np.ascontiguousarray(masks, "<u4").view(np.uint8).reshape(-1, GROUP, 1), axis=2)
    full = flags.sum(axis=1).max(axis=1) > group_values
    if full.any():
        at = int(np.argmax(full))
        raise FormatError(
            field="masks",
            index=at,
            expected=f"at most {group_values} bits for a group of {GROUP} slots",
            got=f"0x{masks.ravel()[at]:08x}",
            path=path,
        )


def _check_rows(first: int, stored: NDArray[np.bool_], shape: tuple[int, int], parts: Parts, path: str | None) -> None:
    """Check that values lie in rows of the matrix; ``stored`` [128, slots] is the row of tiles from ``first`` on."""
    rows = shape[0] - first // (stored.shape[1] // TILE_K) * TILE_M
    if stored[rows:].any():
        row, slot = np.argwhere(stored[rows:])[0].tolist()
        raise FormatError(
            field="masks",
            index=parts.word_of_mask(first, rows + row, slot),
            expected=f"values only in rows of the matrix, below {shape[0]}",
            got=f"one at row {rows + row} of the tiles, slot {slot}",
            path=path,
        )


def _check_columns(first: int, listed: Columns, window: int, parts: Parts, path: str | None) -> None:
    """Check that every band lists each left and right as often as a window has it; ``listed`` is [bands, slots, 2]."""
    for side, (name, wanted) in enumerate(zip(("left", "right"), column_lists(window), strict=True)):
        lists = listed[:, :, side].reshape(parts.bands, -1, PAIRS)
        wrong = (np.sort(lists, axis=-1) != np.sort(wanted)).any(axis=-1)
        if not wrong.any():
            continue
        band, number = np.argwhere(wrong)[0].tolist()
        missing = Counter(wanted.tolist())
        for slot, column in enumerate(lists[band, number].tolist(), number * PAIRS):
            missing[column] -= 1
            if missing[column] < 0:
                copies = (MAX_WINDOW - window) // RESIDUES
                raise FormatError(
                    field="columns",
                    index=parts.byte_of_column(first, band, slot, side),
                    expected=f"every {name} of a window of {window} once, and {copies} copies of its dummies",
                    got=f"{column}" if column not in wanted else f"{column} once more",
                    path=path,
                )
