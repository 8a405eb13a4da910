# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL: checks every invariant in time linear in the number of words and tiles.

A kernel scatters by the stored locations without checking them, so data from outside must pass these checks first.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.check import check_nnz, check_shape_and_type, is_int, refuse
from flashllm.formats.tiled_csl_encode import (
    ORDERS,
    TILE_ELEMENTS,
    WORDS_PER_VECTOR,
    rows_and_columns,
)
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

_CHUNK_TILES = 256  # tiles checked at once: the table of last writers takes 8 MiB


def check_fields(*, shape: Any, dtype: Any, nnz: Any, order: Any, max_tile_words: Any, path: str | None = None) -> None:
    """Raise ``FormatError`` unless the scalar fields have legal types and ranges."""
    check_shape_and_type(shape=shape, dtype=dtype, path=path)
    if order not in ORDERS:
        refuse("order", " or ".join(map(repr, ORDERS)), order, path)
    check_nnz(nnz, shape=shape, path=path)
    if not is_int(max_tile_words) or not 0 <= max_tile_words <= TILE_ELEMENTS or max_tile_words % WORDS_PER_VECTOR:
        refuse("max_tile_words", f"a multiple of {WORDS_PER_VECTOR} in 0..{TILE_ELEMENTS}", max_tile_words, path)


def check_buffers(*, shape: tuple[int, int], words: Any, tile_offsets: Any, path: str | None = None) -> None:
    """Raise ``FormatError`` unless the buffers (NumPy or CuPy) have the types and lengths that the shape requires."""
    tiles_m, tiles_k = tile_grid(shape)
    for field, array, dtype in (("words", words, np.uint32), ("tile_offsets", tile_offsets, np.int32)):
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            expected = f"a contiguous 1-D array of {np.dtype(dtype).name}"
            got = f"{array.dtype} of shape {tuple(array.shape)}"
            raise FormatError(field=field, expected=expected, got=got, path=path)
    if tile_offsets.size != tiles_m * tiles_k + 2:
        expected = f"{tiles_m * tiles_k + 2} entries ({tiles_m} x {tiles_k} tiles + 2)"
        raise FormatError(field="tile_offsets", expected=expected, got=str(tile_offsets.size), path=path)
    if words.size % WORDS_PER_VECTOR:
        expected = f"a multiple of {WORDS_PER_VECTOR} words"
        raise FormatError(field="words", expected=expected, got=str(words.size), path=path)


def check_content(
    *,
    shape: tuple[int, int],
    nnz: int,
    max_tile_words: int,
    words: NDArray[np.uint32],
    tile_offsets: NDArray[np.int32],
    path: str | None = None,
) -> None:
    """Raise ``FormatError`` unless offsets, words, ``nnz`` and ``max_tile_words`` agree and locations are legal.

    Call ``check_fields`` and ``check_buffers`` first.
    """
    vectors = _check_offsets(tile_offsets, words.size, path)
    largest = int(vectors.max()) * WORDS_PER_VECTOR
    if largest != max_tile_words:
        raise FormatError(field="max_tile_words", expected=str(largest), got=str(max_tile_words), path=path)
    used = np.flatnonzero(vectors)
    found = 0
    last_writer = np.empty(min(_CHUNK_TILES, used.size) * TILE_ELEMENTS, np.int32)
    for start in range(0, used.size, _CHUNK_TILES):
        tiles = used[start : start + _CHUNK_TILES]
        found += _check_tiles(shape, words, tile_offsets, tiles, last_writer, path)
    if found != nnz:
        raise FormatError(field="nnz", expected=f"{found}, the words with a value", got=str(nnz), path=path)


def _check_offsets(offsets: NDArray[np.int32], words: int, path: str | None) -> NDArray[np.int32]:
    """Vectors of each tile, after checking the offset table."""

    def bad(index: int, expected: str) -> NoReturn:
        raise FormatError(field="tile_offsets", index=index, expected=expected, got=str(offsets[index]), path=path)

    if offsets[0] != 0:
        bad(0, "0")
    falls = offsets[1:-1] < offsets[:-2]
    if falls.any():
        at = int(np.argmax(falls)) + 1
        bad(at, f"at least {offsets[at - 1]}, the entry before")
    if int(offsets[-2]) != words // WORDS_PER_VECTOR:
        bad(offsets.size - 2, f"{words // WORDS_PER_VECTOR}, the length of words / {WORDS_PER_VECTOR}")
    if offsets[-1] != offsets[-2]:
        bad(offsets.size - 1, f"{offsets[-2]}, the entry before once more")
    # Entries are monotone from 0 to a non-negative total, so the differences cannot overflow.
    vectors: NDArray[np.int32] = offsets[1:-1] - offsets[:-2]
    limit = TILE_ELEMENTS // WORDS_PER_VECTOR
    if vectors.max() > limit:
        at = int(np.argmax(vectors > limit)) + 1
        bad(at, f"at most {int(offsets[at - 1]) + limit}: a tile has {TILE_ELEMENTS} places")
    return vectors


def _check_tiles(
    shape: tuple[int, int],
    words: NDArray[np.uint32],
    offsets: NDArray[np.int32],
    tiles: NDArray[np.int64],
    last_writer: NDArray[np.int32],
    path: str | None,
) -> int:
    """Check the words of ``tiles`` (ascending, none empty) and return how many hold a value."""
    # Tiles between two of these hold no word, so one slice covers them all.
    first = int(offsets[tiles[0]]) * WORDS_PER_VECTOR
    part = words[first : int(offsets[tiles[-1] + 1]) * WORDS_PER_VECTOR]

    def bad(index: Any, expected: str, got: str | None = None) -> NoReturn:
        word = part[int(index)]
        shown = got or f"{int(word):#010x} (location {int(word) >> 16}, value {int(word) & 0xFFFF:#06x})"
        raise FormatError(field="words", index=first + int(index), expected=expected, got=shown, path=path)

    loc = part >> np.uint32(16)
    outside = loc >= TILE_ELEMENTS
    if outside.any():
        bad(np.argmax(outside), f"a location below {TILE_ELEMENTS}")
    values = part.astype(np.uint16)
    is_pad = (values & MAGNITUDE) == 0
    negative_zero = is_pad & (values != 0)
    if negative_zero.any():
        bad(np.argmax(negative_zero), "no -0.0: zeros are pruned and padding has value 0x0000")

    counts = (offsets[tiles + 1] - offsets[tiles]) * WORDS_PER_VECTOR
    starts = np.cumsum(counts) - counts
    pads = np.add.reduceat(is_pad, starts, dtype=np.int64)
    if pads.max() >= WORDS_PER_VECTOR:
        tile = int(np.argmax(pads >= WORDS_PER_VECTOR))
        # The fourth padding word of the tile is the first that need not be there.
        nth = np.flatnonzero(is_pad[starts[tile] : starts[tile] + counts[tile]])[WORDS_PER_VECTOR - 1]
        bad(starts[tile] + nth, f"at most 3 padding words in tile {tiles[tile]}", f"{pads[tile]} of them")

    # Each word writes its number at its place, values after padding. A value that does not find its own
    # number was overwritten by another value; padding that finds a value's number sits on that value.
    place = np.repeat(np.arange(tiles.size, dtype=np.int64) * TILE_ELEMENTS, counts) + loc
    number = np.arange(part.size, dtype=np.int32)
    stored = np.flatnonzero(~is_pad)
    padding = np.flatnonzero(is_pad)
    last_writer[place[padding]] = number[padding]
    last_writer[place[stored]] = number[stored]
    lost = last_writer[place[stored]] != number[stored]
    if lost.any():
        at = stored[int(np.argmax(lost))]
        bad(at, f"a location used once in its tile (word {first + int(last_writer[place[at]])} has the same)")
    on_value = ~is_pad[last_writer[place[padding]]]
    if on_value.any():
        bad(padding[int(np.argmax(on_value))], "padding at a place without a value")

    if shape[0] % TILE_M or shape[1] % TILE_K:
        grid_row, grid_column = np.divmod(tiles, tile_grid(shape)[1])
        row, column = rows_and_columns(loc)
        row += np.repeat(grid_row * TILE_M, counts)
        column += np.repeat(grid_column * TILE_K, counts)
        beyond = ~is_pad & ((row >= shape[0]) | (column >= shape[1]))
        if beyond.any():
            at = int(np.argmax(beyond))
            bad(at, f"an element inside {shape[0]} x {shape[1]}", f"row {row[at]}, column {column[at]}")
    return int(stored.size)
