# SPDX-License-Identifier: Apache-2.0
"""The slot24 encoder and decoder on the CPU, for one strip of 128 rows at a time; see docs/formats/slot24.md.

Two columns of a window, a left and a right one, share a slot; they are paired anew for each band of 32 or 64 rows of a
strip. The slots form a matrix S of 128 columns per window, which is stored as a bitmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.bitmap_encode import LANES, PARTS, EncodedBitmap, encode_strips
from flashllm.formats.bits import MAGNITUDE, RoundingTally
from flashllm.formats.slot24_pairs import (
    MAX_WINDOW,
    PAIRS,
    RESIDUES,
    Arrangement,
    column_masks,
    has_lonely_column,
    pair_up,
    tried,
)
from flashllm.formats.slot24_parts import Columns, Parts
from flashllm.formats.sources import Strips
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

TILES = PAIRS // TILE_K
"""Tiles of slots in a window."""


@dataclass(frozen=True, kw_only=True)
class EncodedSlots:
    """The buffers of a slot24 weight."""

    how: Arrangement
    bitmap: EncodedBitmap
    """The bitmap of the slots."""
    picks: NDArray[np.uint32]
    """[tiles, 4 parts, 32 lanes, 2 words]."""
    columns: NDArray[np.uint8]
    """[tiles, 4 parts, 32 lanes, steps of a part]."""


def slots_shape(shape: tuple[int, int], window: int) -> tuple[int, int]:
    """The shape of the matrix of slots: the rows of whole tiles, and the slots of a row."""
    return -(-shape[0] // TILE_M) * TILE_M, -(-shape[1] // window) * PAIRS


def encode(
    strips: Callable[[RoundingTally | None], Strips],
    shape: tuple[int, int],
    window: int | None,
    part_rows: int | None,
    group_values: int | None,
    tally: RoundingTally | None = None,
) -> EncodedSlots:
    """Encode a matrix that ``strips`` yields as 16-bit patterns [rows, K], of 128 rows each except perhaps the last.

    ``strips`` is called twice, since the window must be known before the first slot is written; the second call gets
    ``tally``. ``window``, ``part_rows`` and ``group_values`` are legal or ``None``. Raises ``ArgumentError`` when the
    columns do not pair up as these require.
    """
    masks = [column_masks((strip & MAGNITUDE) != 0) for strip in strips(None)]
    how, pairs = _choose(masks, shape, window, part_rows, group_values)
    parts, size = how.parts, how.window
    slots_of = slots_shape(shape, size)
    tiles_m, tiles_k = tile_grid(slots_of)
    picks = np.empty((tiles_m * tiles_k, PARTS, LANES, 2), np.uint32)
    columns = np.empty((tiles_m * tiles_k, PARTS, LANES, parts.steps), np.uint8)

    def slots() -> Strips:
        for number, (strip, (lefts, rights)) in enumerate(zip(strips(tally), pairs, strict=True)):
            here = slice(number * tiles_k, (number + 1) * tiles_k)
            values, from_right = _fill(strip, size, parts, lefts, rights)
            picks[here] = pack_picks(parts.stored(from_right))
            columns[here] = parts.pack_columns(lefts, rights)
            yield parts.stored(values)

    bitmap = encode_strips(slots(), slots_of, group_values=how.group_values)
    return EncodedSlots(how=how, bitmap=bitmap, picks=picks, columns=columns)


def _choose(
    masks: list[NDArray[np.uint32]],
    shape: tuple[int, int],
    window: int | None,
    part_rows: int | None,
    group_values: int | None,
) -> tuple[Arrangement, list[tuple[Columns, Columns]]]:
    """The first arrangement with which all columns pair up, and the pairs of every strip."""
    stored = sum(int(np.bitwise_count(strip).sum()) for strip in masks)
    for how in tried(window, part_rows, group_values, stored / (shape[0] * shape[1])):
        pairs = _pair_strips(masks, how)
        if pairs is not None:
            return how, pairs
    raise unpaired(window, group_values)


def unpaired(window: int | None, group_values: int | None) -> ArgumentError:
    """The error for a window or groups in which columns do not pair up."""
    if window is None:
        return ArgumentError(
            "group_values", expected="None or 4: for fewer the columns do not pair up", got=str(group_values)
        )
    return ArgumentError(
        "window", expected="a size in which all columns pair up (None takes the largest)", got=str(window)
    )


def _pair_strips(masks: list[NDArray[np.uint32]], how: Arrangement) -> list[tuple[Columns, Columns]] | None:
    # Most windows that are too large have a column that fits no other, and finding one is far cheaper than matching.
    if any(has_lonely_column(how.parts.band_masks(strip), how.window) for strip in masks):
        return None
    pairs = []
    for strip in masks:
        found = pair_up(how.parts.band_masks(strip), how)
        if found is None:
            return None
        pairs.append(found)
    return pairs


def _fill(
    strip: NDArray[np.uint16], window: int, parts: Parts, lefts: Columns, rights: Columns
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Slots [128, 128 * windows] of a strip [rows, K], and which of them hold a value of the right column."""
    windows = lefts.shape[1]
    width = min(window + RESIDUES, MAX_WINDOW)  # with a copy of each dummy
    whole = np.zeros((TILE_M, windows, width), np.uint16)
    for number in range(windows):
        here = strip[:, number * window : (number + 1) * window]
        whole[: len(strip), number, : here.shape[1]] = np.where((here & MAGNITUDE) != 0, here, np.uint16(0))
    by_band = whole.reshape(*parts.split_rows, windows * width)
    first = np.arange(windows)[:, None] * width
    values = np.empty((*parts.split_rows, windows * PAIRS), np.uint16)
    from_right = np.empty(values.shape, np.bool_)
    for band in range(parts.bands):
        right = by_band[:, band].take((first + rights[band]).ravel(), axis=-1)
        values[:, band] = by_band[:, band].take((first + lefts[band]).ravel(), axis=-1) | right
        from_right[:, band] = right != 0
    return values.reshape(TILE_M, -1), from_right.reshape(TILE_M, -1)


def pack_picks(from_right: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Words [tiles, 4, 32, 2] of flags [128, tiles * 64], as stored: which slots hold the value of the right column."""
    tiles = from_right.shape[1] // TILE_K
    # row = 64 i + 16 part + 8 b + g; slot = 16 (2 v + s) + 8 h + 2 u + e -> bit 16 b + 4 u + 2 e + i of word v,
    # lane 4 g + 2 s + h
    split = from_right.reshape(2, PARTS, 2, 8, tiles, 2, 2, 2, 4, 2)
    bits = np.packbits(split.transpose(4, 1, 3, 6, 7, 5, 2, 8, 9, 0).reshape(-1, 8), axis=-1, bitorder="little")
    return bits.reshape(-1).view("<u4").astype(np.uint32, copy=False).reshape(tiles, PARTS, LANES, 2)


def unpack_picks(picks: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """The inverse of :func:`pack_picks`."""
    tiles = len(picks)
    flags = np.unpackbits(np.ascontiguousarray(picks, "<u4").view(np.uint8), bitorder="little")
    split = flags.reshape(tiles, PARTS, 8, 2, 2, 2, 2, 4, 2, 2)
    ordered = np.ascontiguousarray(split.transpose(9, 1, 6, 2, 0, 5, 3, 4, 7, 8)).view(np.bool_)
    return ordered.reshape(TILE_M, tiles * TILE_K)


def decode_strips(
    stored: Iterable[NDArray[np.uint16]],
    picks: NDArray[np.uint32],
    columns: Columns,
    shape: tuple[int, int],
    window: int,
    parts: Parts,
) -> Iterator[NDArray[np.uint16]]:
    """Patterns [up to 128, K] of each row of tiles, from the patterns of the slots as they are stored."""
    tiles_k = tile_grid(slots_shape(shape, window))[1]
    first_column = np.arange(tiles_k * TILE_K)[:, None] // PAIRS * window
    for number, strip in enumerate(stored):
        here = slice(number * tiles_k, (number + 1) * tiles_k)
        values = parts.restored(strip)[: shape[0] - number * TILE_M]
        side = parts.restored(unpack_picks(picks[here])).view(np.uint8)
        place = parts.unpack_columns(columns[here]) + first_column
        row, slot = np.nonzero(values)
        out = np.zeros((len(values), shape[1]), np.uint16)
        out[row, place[parts.band_of_row[row], slot, side[row, slot]]] = values[row, slot]
        yield out
