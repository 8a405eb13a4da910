# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL: layout constants and the NumPy encoder.

The encoder needs no sort. It first permutes each tile so that the wanted order is the memory order
(``row``: the tile's own rows; ``bank``: bank, then row, then the half of the bank), so ``flatnonzero``
yields the elements already sorted, and the place of each word follows from its rank by arithmetic.
docs/formats/tiled_csl.md defines the result; cuda/encode/tiled_csl.cu computes the same bytes on a
device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid, whole_tiles

TILE_ELEMENTS = TILE_M * TILE_K
WORDS_PER_VECTOR = 4
"""Words in one 16-byte load; a tile's word count is a multiple of it, and it is the unit of tile offsets."""
BANKS = 32
"""Shared-memory banks of 4 bytes; also the lanes of a warp."""
GROUP_WORDS = BANKS * WORDS_PER_VECTOR
"""Words that a warp reads with one 16-byte load per lane."""
MAX_VECTORS = 2**31 - 1
"""Largest tile offset (int32)."""

Order = Literal["bank", "row"]
ORDERS: tuple[Order, ...] = ("bank", "row")

_CHUNK_TILES = 64  # tiles encoded at once: 1 MiB of values, so that the temporaries stay in the L2 cache
_BANK_ELEMENTS = TILE_ELEMENTS // BANKS


@dataclass(frozen=True, kw_only=True)
class EncodedTiles:
    """Buffers of an encoded matrix; the fields mean what they mean in ``TiledCSL``."""

    words: NDArray[np.uint32]
    tile_offsets: NDArray[np.int32]
    nnz: int
    max_tile_words: int


def location(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Location in 0..8191 of row 0..127 and column 0..63 of a tile."""
    return row * TILE_K + (column ^ ((row & 7) * 8))


def rows_and_columns(loc: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns in the tile of locations 0..8191; the inverse of ``location``."""
    place = loc.astype(np.int64)
    row = place >> 6
    return row, (place & 63) ^ ((row & 7) * 8)


def encode_strips(strips: Iterable[NDArray[np.uint16]], shape: tuple[int, int], order: Order) -> EncodedTiles:
    """Encode a matrix given as strips [rows, K] of 16-bit patterns, each of ``TILE_M`` rows except perhaps the last.

    Peak memory: the result, at most an eighth more while it grows, one strip, and a few MiB.
    """
    tiles_m, tiles_k = tile_grid(shape)
    offsets = np.zeros(tiles_m * tiles_k + 2, np.int64)
    sink = _WordSink()
    nnz = 0
    tile = 0
    for strip in strips:
        for start in range(0, tiles_k, _CHUNK_TILES):
            stop = min(start + _CHUNK_TILES, tiles_k)
            block = whole_tiles(strip[:, start * TILE_K : min(stop * TILE_K, shape[1])], stop - start)
            words, counts = (_encode_bank if order == "bank" else _encode_row)(block)
            vectors = -(-counts // WORDS_PER_VECTOR)
            offsets[tile + 1 : tile + 1 + len(vectors)] = vectors
            tile += len(vectors)
            nnz += int(counts.sum())
            sink.append(words, done=tile / (tiles_m * tiles_k))
    largest = int(offsets.max())
    np.cumsum(offsets, out=offsets)
    check_vectors(int(offsets[-1]))
    return EncodedTiles(
        words=sink.finish(),
        tile_offsets=offsets.astype(np.int32),
        nnz=nnz,
        max_tile_words=largest * WORDS_PER_VECTOR,
    )


def check_vectors(total: int) -> None:
    """``ArgumentError`` when the offsets of a matrix would not fit int32."""
    if total > MAX_VECTORS:
        words = total * WORDS_PER_VECTOR
        raise ArgumentError("a", expected=f"at most {MAX_VECTORS * WORDS_PER_VECTOR} words", got=str(words))


class _WordSink:
    """A word array that grows; the first chunk sets the estimate of the final size."""

    def __init__(self) -> None:
        self._words = np.empty(0, np.uint32)
        self._used = 0

    def append(self, words: NDArray[np.uint32], *, done: float) -> None:
        end = self._used + words.size
        if end > self._words.size:
            # resize() reallocates in place where the system can, so no second copy of the words exists.
            self._words.resize(max(end, min(int(end / done * 1.01), end + end // 8 + (1 << 20))), refcheck=False)
        self._words[self._used : end] = words
        self._used = end

    def finish(self) -> NDArray[np.uint32]:
        self._words.resize(self._used, refcheck=False)
        return self._words


def _bank_table() -> NDArray[np.uint32]:
    """Location << 16 of each position of a tile in bank-major order [bank][row][half]."""
    bank, row, half = np.meshgrid(np.arange(BANKS), np.arange(TILE_M), np.arange(2), indexing="ij")
    return ((row * TILE_K + bank * 2 + half) << 16).astype(np.uint32).ravel()


def _row_table() -> NDArray[np.uint32]:
    """Location << 16 of each position of a tile in row-major order."""
    row, column = np.meshgrid(np.arange(TILE_M), np.arange(TILE_K), indexing="ij")
    return (location(row, column) << 16).astype(np.uint32).ravel()


_BANK_PLACES = _bank_table()
_ROW_PLACES = _row_table()
_CHUNK_OF = [np.arange(8) ^ r for r in range(8)]  # source chunk of each swizzled 8-column chunk in rows r, r + 8, ...


def _bank_major(block: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """[tiles, 8192]: each tile of ``block`` [128, tiles * 64] in the order [bank][row][half]."""
    tiles = block.shape[1] // TILE_K
    pairs = block.view(np.uint32).reshape(TILE_M // 8, 8, tiles, 8, 4)  # row / 8, row % 8, tile, chunk, pair
    out = np.empty((tiles, 8, 4, TILE_M // 8, 8), np.uint32)
    for r in range(8):
        out[..., r] = pairs[:, r][:, :, _CHUNK_OF[r]].transpose(1, 2, 3, 0)
    return out.view(np.uint16).reshape(tiles, TILE_ELEMENTS)


def _counts(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of true entries in each row of ``mask`` [tiles, 8192]."""
    # One 64-bit addition adds eight byte-sized flags: the sum of 128 words leaves every byte at most 128.
    partial = mask.view(np.uint64).reshape(-1, 128).sum(axis=1, dtype=np.uint64)
    counts: NDArray[np.int64] = partial.view(np.uint8).reshape(mask.shape[0], -1).sum(axis=1, dtype=np.int64)
    return counts


def _take_zeros(
    mask: NDArray[np.bool_], counts: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Set the padding places of every tile in ``mask``: its first ``-count % 4`` zeros.

    Returns (tiles, positions) of each tile's first padding place, then of its second, then of its third.
    """
    taken = []
    pad = -counts % WORDS_PER_VECTOR
    for i in range(WORDS_PER_VECTOR - 1):
        tiles = np.flatnonzero(pad > i)
        positions = mask[tiles].argmin(axis=1)
        mask[tiles, positions] = True
        taken.append((tiles, positions))
    return taken


def _encode_row(block: NDArray[np.uint16]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Words of whole tiles in row order, and the stored elements of each tile."""
    tiles = block.shape[1] // TILE_K
    flat = np.ascontiguousarray(block.reshape(TILE_M, tiles, TILE_K).transpose(1, 0, 2)).reshape(tiles, TILE_ELEMENTS)
    mask = (flat & MAGNITUDE) != 0
    counts = _counts(mask)
    padded = counts + -counts % WORDS_PER_VECTOR
    start = np.cumsum(padded) - padded
    at = np.flatnonzero(mask)
    words = np.empty(int(padded.sum()), np.uint32)
    words[np.arange(at.size) + np.repeat(start - (np.cumsum(counts) - counts), counts)] = (
        _ROW_PLACES[at & (TILE_ELEMENTS - 1)] | flat.ravel()[at]
    )
    for i, (tile, position) in enumerate(_take_zeros(mask, counts)):
        words[start[tile] + counts[tile] + i] = _ROW_PLACES[position]
    return words, counts


def _encode_bank(block: NDArray[np.uint16]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Words of whole tiles in bank order, and the stored elements of each tile."""
    flat = _bank_major(block)
    tiles = flat.shape[0]
    mask = (flat & MAGNITUDE) != 0
    counts = _counts(mask)
    _take_zeros(mask, counts)
    at = np.flatnonzero(mask)
    values = flat.ravel()[at]
    values[(values & MAGNITUDE) == 0] = 0  # padding may sit on a -0.0

    # starts[tile * 32 + bank]: where the elements of one bank of one tile begin in ``at``.
    starts = np.searchsorted(at, np.arange(tiles * BANKS + 1) * _BANK_ELEMENTS)
    per_bank = np.diff(starts).reshape(tiles, BANKS)
    at = at.astype(np.int32)
    vectors = per_bank.sum(axis=1) // WORDS_PER_VECTOR
    full = WORDS_PER_VECTOR * (vectors // BANKS)
    clean = np.minimum(per_bank.min(axis=1), full)
    tile_start = WORDS_PER_VECTOR * (np.cumsum(vectors) - vectors)

    # Clean rounds: element k of bank b in round k, lane b.
    runs = per_bank.ravel()
    lane_start = (tile_start[:, None] + WORDS_PER_VECTOR * np.arange(BANKS)).ravel()
    rank = np.arange(at.size) - np.repeat(starts[:-1], runs)
    to = np.repeat(lane_start, runs) + (rank >> 2) * GROUP_WORDS + (rank & 3)

    # The rest wraps around: lane by lane, each lane's places filled before the next lane's.
    rest = np.flatnonzero(rank >= np.repeat(np.repeat(clean, BANKS), runs))
    bank_index = at[rest] >> 8
    tile = bank_index >> 5
    surplus = per_bank - clean[:, None]
    skipped = np.cumsum(surplus, axis=1) - surplus - clean[:, None]
    position = skipped.ravel()[bank_index] + rank[rest]
    to[rest] = tile_start[tile] + wrap_around(position, full[tile], clean[tile], (vectors % BANKS)[tile])

    words = np.empty(at.size, np.uint32)
    words[to] = _BANK_PLACES[at & (TILE_ELEMENTS - 1)] | values
    return words, counts


def wrap_around(
    position: NDArray[np.int64], full: NDArray[np.int64], clean: NDArray[np.int64], rem: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Word index in the tile of the ``position``-th element that is not in a clean round.

    ``full``: rounds of 32 lanes; the first ``clean`` of them are taken. ``rem``: lanes in the four tail
    rounds.
    """
    depth = full - clean
    long_lanes = rem * (depth + WORDS_PER_VECTOR)  # places in the lanes that also have four tail rounds
    in_long = position < long_lanes
    height = np.where(in_long, depth + WORDS_PER_VECTOR, np.maximum(depth, 1))
    local = np.where(in_long, position, position - long_lanes)
    lane = local // height
    j = local - lane * height
    lane += np.where(in_long, 0, rem)
    row = clean + j  # tail rounds are simply the rounds from ``full`` on, as full is a multiple of 4
    place: NDArray[np.int64] = (row >> 2) * GROUP_WORDS + lane * WORDS_PER_VECTOR + (row & 3)
    return place
