# SPDX-License-Identifier: Apache-2.0
"""The slot24 encoder on the CPU, and the way back: a strip of 128 rows at a time; see docs/formats/slot24.md.

Two columns of a window share a slot, a left and a right one, paired anew for each of the four parts of a strip. The
slots are a matrix S [M, 128 per window], which is stored as a bitmap.
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
    WINDOWS,
    column_masks,
    has_lonely_column,
    pair_up,
)
from flashllm.formats.sources import Strips
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

STEP_PAIRS = LANES // 2
"""Pairs of a step: the slots that one instruction multiplies, a column of each pair for every lane."""
STEPS = TILE_K // STEP_PAIRS
"""Steps of a tile."""
TILES = PAIRS // TILE_K
"""Tiles of slots in a window."""
PART_OF_ROW = np.arange(TILE_M) // 16 % PARTS
"""Part [128] of each row of a tile."""

Columns = NDArray[np.uint8]
"""Window-relative columns of the pairs of a strip: [4 parts, windows, 128], lefts or rights."""


@dataclass(frozen=True, kw_only=True)
class EncodedSlots:
    """The buffers of a slot24 weight."""

    window: int
    bitmap: EncodedBitmap
    """Of the slots."""
    picks: NDArray[np.uint32]
    """[tiles, 4 parts, 32 lanes, 2 words]."""
    columns: NDArray[np.uint8]
    """[tiles, 4 parts, 32 lanes, 4 steps]."""


def slots_shape(shape: tuple[int, int], window: int) -> tuple[int, int]:
    """(M, slots of a row): the shape of the matrix of slots."""
    return shape[0], -(-shape[1] // window) * PAIRS


def encode(
    strips: Callable[[RoundingTally | None], Strips],
    shape: tuple[int, int],
    window: int | None,
    tally: RoundingTally | None = None,
) -> EncodedSlots:
    """Encode a matrix that ``strips`` gives as strips [rows, K] of 16-bit patterns, 128 rows each but the last.

    It is called twice, since the window must be known before the first slot is written, and the second time with
    ``tally``. ``window`` is legal or ``None``. ``ArgumentError`` for a window in which the columns do not pair up.
    """
    masks = [column_masks((strip & MAGNITUDE) != 0) for strip in strips(None)]
    size, pairs = _choose(masks, window)
    slots_of = slots_shape(shape, size)
    tiles_m, tiles_k = tile_grid(slots_of)
    picks = np.empty((tiles_m * tiles_k, PARTS, LANES, 2), np.uint32)
    columns = np.empty((tiles_m * tiles_k, PARTS, LANES, STEPS), np.uint8)

    def slots() -> Strips:
        for number, (strip, (lefts, rights)) in enumerate(zip(strips(tally), pairs, strict=True)):
            here = slice(number * tiles_k, (number + 1) * tiles_k)
            values, from_right = _fill(strip, size, lefts, rights)
            picks[here] = pack_picks(from_right)
            columns[here] = pack_columns(lefts, rights)
            yield values

    bitmap = encode_strips(slots(), slots_of)
    return EncodedSlots(window=size, bitmap=bitmap, picks=picks, columns=columns)


def _choose(masks: list[NDArray[np.uint32]], window: int | None) -> tuple[int, list[tuple[Columns, Columns]]]:
    """The window, and the pairs of every strip: of the largest window in which all columns pair up."""
    for size in WINDOWS if window is None else (window,):
        pairs = _pair_strips(masks, size)
        if pairs is not None:
            return size, pairs
    raise unpaired(window)


def unpaired(window: int | None) -> ArgumentError:
    """The error for a window in which columns do not pair up."""
    return ArgumentError(
        "window", expected="a size in which all columns pair up (None takes the largest)", got=str(window)
    )


def _pair_strips(masks: list[NDArray[np.uint32]], window: int) -> list[tuple[Columns, Columns]] | None:
    # Most windows that are too large have a column that fits nowhere, which is far cheaper to see than a matching.
    if any(has_lonely_column(strip, window) for strip in masks):
        return None
    pairs = []
    for strip in masks:
        found = pair_up(strip, window)
        if found is None:
            return None
        pairs.append(found)
    return pairs


def _fill(
    strip: NDArray[np.uint16], window: int, lefts: Columns, rights: Columns
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Slots [rows, 128 * windows] of a strip [rows, K], and which of [128, 128 * windows] hold the right column."""
    windows = lefts.shape[1]
    width = min(window + RESIDUES, MAX_WINDOW)  # with a copy of each dummy
    whole = np.zeros((TILE_M, windows, width), np.uint16)
    for number in range(windows):
        here = strip[:, number * window : (number + 1) * window]
        whole[: len(strip), number, : here.shape[1]] = np.where((here & MAGNITUDE) != 0, here, np.uint16(0))
    by_part = whole.reshape(2, PARTS, TILE_M // 2 // PARTS, windows * width)
    first = np.arange(windows)[:, None] * width
    values = np.empty((2, PARTS, TILE_M // 2 // PARTS, windows * PAIRS), np.uint16)
    from_right = np.empty(values.shape, np.bool_)
    for part in range(PARTS):
        right = by_part[:, part].take((first + rights[part]).ravel(), axis=-1)
        values[:, part] = by_part[:, part].take((first + lefts[part]).ravel(), axis=-1) | right
        from_right[:, part] = right != 0
    return values.reshape(TILE_M, -1)[: len(strip)], from_right.reshape(TILE_M, -1)


def pack_picks(from_right: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Words [tiles, 4, 32, 2] of flags [128, tiles * 64]: which slots hold the value of the right column."""
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


def pack_columns(lefts: Columns, rights: Columns) -> NDArray[np.uint8]:
    """The list [tiles, 4, 32, 4] of the columns of pairs."""
    steps = np.stack([lefts, rights], axis=-1).reshape(PARTS, -1, TILES, STEPS, LANES)
    return np.ascontiguousarray(steps.transpose(1, 2, 0, 4, 3)).reshape(-1, PARTS, LANES, STEPS)


def unpack_columns(columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Window-relative columns [4 parts, slots, 2] of the left and the right of each slot in a row of tiles."""
    return np.ascontiguousarray(columns.transpose(1, 0, 3, 2)).reshape(PARTS, -1, 2)


def decode_strips(
    slots: Iterable[NDArray[np.uint16]],
    picks: NDArray[np.uint32],
    columns: NDArray[np.uint8],
    shape: tuple[int, int],
    window: int,
) -> Iterator[NDArray[np.uint16]]:
    """Patterns [up to 128, K] of each row of tiles, from those of the slots."""
    tiles_k = tile_grid(slots_shape(shape, window))[1]
    first_column = np.arange(tiles_k * TILE_K)[:, None] // PAIRS * window
    for number, values in enumerate(slots):
        here = slice(number * tiles_k, (number + 1) * tiles_k)
        side = unpack_picks(picks[here]).view(np.uint8)
        place = unpack_columns(columns[here]) + first_column
        row, slot = np.nonzero(values)
        out = np.zeros((len(values), shape[1]), np.uint16)
        out[row, place[PART_OF_ROW[row], slot, side[row, slot]]] = values[row, slot]
        yield out
