# SPDX-License-Identifier: Apache-2.0
"""The bitmap encoder on the CPU: vectorised over a row of tiles; see docs/formats/bitmap.md.

Mirrors cuda/flashllm/bitmap.cuh. Within a part of a tile (four parts, one per warp) the elements of a lane form two
streams, one for each half of the 16 columns of a step, in the order in which a warp needs them as tensor-core
fragments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.runs import runs_of
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid, whole_tiles

PARTS = 4
LANES = 32
STREAMS = 2 * LANES
"""Streams of a part. Number 2 * lane + h is half h of the columns of a step: 0 is the first half, 1 the second."""
STREAM_ELEMENTS = TILE_M * TILE_K // PARTS // STREAMS
"""Elements of one stream in one tile."""
GROUP = 4
"""Elements of a group, which are neighbours in a stream: two rows by two columns of a fragment."""
PLACE_TILES = 8
"""Streams trade columns after this many tiles; their places are stored there."""
SLACK = 31
"""Value rows by which a stream may lag behind the longest."""
CHUNK_ROWS = 16
"""Value rows of each part in a chunk, which a block of the kernel copies at a time."""
MAX_ROWS = 2**31 - 1
"""Most value rows of a matrix: row numbers are int32."""


@dataclass(frozen=True, kw_only=True)
class EncodedBitmap:
    """The buffers of a bitmap weight."""

    masks: NDArray[np.uint32]
    """[tiles, 4 parts, 32 lanes, 2 words]."""
    values: NDArray[np.uint16]
    """[chunks, 4 parts, 16 value rows, 32 lanes, 2]: patterns of the first and second halves of steps.

    A stream has one of the 32 columns of its half. At least two rows follow the last front, because a stream that has
    ended may still read its next two values.
    """
    fronts: NDArray[np.int32]
    """[tiles + 1]: the value row that the longest stream has reached when a tile begins and, last, at the end."""
    places: NDArray[np.uint16]
    """[ceil(tiles / 8), 4 parts, 64 streams]: where each stream continues at every eighth tile; see :class:`Places`."""
    nnz: int


def stream_order(block: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """[tiles, 4, 64 streams, 32]: the elements of whole tiles ``block`` [128, tiles * 64] as streams."""
    tiles = block.shape[1] // TILE_K
    # row = 64 i + 16 part + 8 b + g, column = 16 s + 8 h + 2 t + e; stream h runs over (s, i, b, e).
    split = block.reshape(2, PARTS, 2, 8, tiles, 4, 2, 4, 2)
    ordered = split.transpose(4, 1, 3, 7, 6, 5, 0, 2, 8)
    return np.ascontiguousarray(ordered).reshape(tiles, PARTS, STREAMS, STREAM_ELEMENTS)


def from_stream_order(streams: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The inverse of :func:`stream_order`."""
    tiles = streams.shape[0]
    ordered = streams.reshape(tiles, PARTS, 8, 4, 2, 4, 2, 2, 2)
    return np.ascontiguousarray(ordered.transpose(6, 1, 7, 2, 0, 5, 4, 3, 8)).reshape(TILE_M, tiles * TILE_K)


def pack_masks(kept: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Mask words [tiles, 4, 32, 2] of flags in stream order [tiles, 4, 64, 32]."""
    tiles = kept.shape[0]
    # [lane, h, word, s % 2, i, element of the group] -> bit 8 element + 4 (s % 2) + 2 i + h of the word
    flags = kept.reshape(tiles, PARTS, LANES, 2, 2, 4, GROUP)
    bits = np.packbits(flags.transpose(0, 1, 2, 4, 6, 5, 3).reshape(-1, 8), axis=-1, bitorder="little")
    return bits.reshape(-1).view("<u4").astype(np.uint32, copy=False).reshape(tiles, PARTS, LANES, 2)


def unpack_masks(masks: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """The inverse of :func:`pack_masks`."""
    tiles = masks.shape[0]
    octets = np.ascontiguousarray(masks, "<u4").view(np.uint8)
    flags = np.unpackbits(octets, bitorder="little").reshape(tiles, PARTS, LANES, 2, GROUP, 4, 2)
    ordered = np.ascontiguousarray(flags.transpose(0, 1, 2, 6, 3, 5, 4)).view(np.bool_)
    return ordered.reshape(tiles, PARTS, STREAMS, STREAM_ELEMENTS)


def flag_counts(kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of true flags in each stream of ``kept`` [tiles, 4, 64, 32]."""
    # One 64-bit addition adds eight byte-sized flags: the sum of four words leaves every byte at most 4.
    partial = kept.view(np.uint64).sum(axis=-1, dtype=np.uint64)
    counts: NDArray[np.int64] = partial.view(np.uint8).reshape(*kept.shape[:3], 8).sum(axis=-1, dtype=np.int64)
    return counts


class Places(NamedTuple):
    """Where streams continue; each field is [..., 4, 64], by stream. Packed: five bits each, the last field highest."""

    givers: NDArray[np.integer]
    """Lanes of the streams that had the columns before."""
    lanes: NDArray[np.integer]
    """Lanes of the columns."""
    lags: NDArray[np.integer]
    """Rows behind the front."""

    @classmethod
    def unpack(cls, packed: NDArray[np.uint16]) -> Places:
        """The fields of ``packed``."""
        return cls(packed & 31, packed >> 5 & 31, packed >> 10)

    def pack(self) -> NDArray[np.uint16]:
        """The packed form, as it is stored."""
        return (self.givers | self.lanes << 5 | self.lags << 10).astype(np.uint16)


OWN_COLUMNS = np.broadcast_to(np.arange(STREAMS), (PARTS, STREAMS))
"""The columns of streams at the start of a run: each has the column of its own number, 2 * lane + half."""


@dataclass
class Position:
    """Where streams stand: rows and columns [4, 64], by stream."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @classmethod
    def at_front(cls, front: int) -> Position:
        """The position at the start of a run: all streams at ``front``, in their own columns."""
        return cls(np.full((PARTS, STREAMS), front, np.int64), OWN_COLUMNS)

    @property
    def heights(self) -> NDArray[np.int64]:
        """Rows [4, 64], by column."""
        return by_column(self.rows, self.columns)

    def traded(self, lanes: NDArray[np.integer]) -> Position:
        """The streams after taking the columns of ``lanes`` [4, 64]: each continues where its new column ended."""
        columns = 2 * lanes.astype(np.int64) + np.arange(STREAMS) % 2
        return Position(np.take_along_axis(self.heights, columns, axis=1), columns)


def by_column(of_streams: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Reorder ``of_streams`` [..., 64] from by stream to by column; ``columns`` [..., 64] are those of the streams."""
    out = np.empty_like(columns)
    np.put_along_axis(out, columns, of_streams, axis=-1)
    return out


def places_at(
    tiles: NDArray[np.int64],
    fronts: NDArray[np.integer],
    starts: NDArray[np.int64],
    columns: NDArray[np.int64],
    before: NDArray[np.int64],
    restarts: NDArray[np.int64],
) -> Places:
    """The places to store for the multiples of ``PLACE_TILES`` among consecutive ``tiles``.

    ``fronts`` [tiles], ``starts`` and ``columns`` [tiles, 4, 64] are those of these tiles; ``before`` [4, 64] are the
    columns that streams had before the first. Where a run begins, no stream takes over the column of another.
    """
    stored = np.flatnonzero(tiles % PLACE_TILES == 0)
    had = np.concatenate([before[None], columns])[stored]
    had[np.isin(tiles[stored], restarts)] = OWN_COLUMNS
    givers = np.take_along_axis(by_column(np.broadcast_to(OWN_COLUMNS, had.shape), had), columns[stored], axis=-1)
    return Places(givers // 2, columns[stored] // 2, fronts[stored].astype(np.int64)[:, None, None] - starts[stored])


def stream_starts(
    counts: NDArray[np.int64],
    position: Position,
    fronts: NDArray[np.int32],
    places: NDArray[np.uint16],
    first: int,
    restarts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column [tiles, 4, 64] where each stream stands before each of the tiles from ``first`` on.

    ``counts`` [tiles, 4, 64] are the numbers of values in these tiles. ``position`` is where the streams stand before
    the tiles and is moved to where they stand after them. ``fronts``, ``places`` and ``restarts`` are those of the
    matrix.
    """
    tiles = len(counts)
    starts = np.cumsum(counts, axis=0) - counts
    columns = np.empty_like(starts)
    restarting = set(restarts.tolist())
    multiples = range(first + -first % PLACE_TILES, first + tiles, PLACE_TILES)
    begins = sorted({first, *multiples, *(tile for tile in restarting if first <= tile < first + tiles)})
    for tile, end in zip(begins, [*begins[1:], first + tiles], strict=True):
        if tile in restarting:
            at = Position.at_front(int(fronts[tile]))
        elif tile % PLACE_TILES == 0:
            at = position.traded(Places.unpack(places[tile // PLACE_TILES]).lanes)
        else:
            at = position
        span = slice(tile - first, end - first)
        starts[span] += at.rows - starts[tile - first]
        columns[span] = at.columns
        position.rows, position.columns = starts[end - first - 1] + counts[end - first - 1], at.columns
    return starts, columns


def value_places(counts: NDArray[np.int64], starts: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of every value in the flattened values, stream by stream.

    Each stream has ``counts`` [tiles, 4, 64] values, from row ``starts`` on, in its column of ``columns``.
    """
    runs = counts.ravel()
    first = np.cumsum(runs) - runs
    row = np.arange(int(runs.sum())) + np.repeat(starts.ravel() - first, runs)
    place = (np.arange(PARTS)[:, None] * CHUNK_ROWS * STREAMS + columns).ravel()
    chunk = row // CHUNK_ROWS * ((PARTS - 1) * CHUNK_ROWS * STREAMS)
    places: NDArray[np.int64] = chunk + row * STREAMS + np.repeat(place, runs)
    return places


def read_streams(
    kept: NDArray[np.bool_],
    values: NDArray[np.uint16],
    counts: NDArray[np.int64],
    starts: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> NDArray[np.uint16]:
    """The elements of whole tiles as streams [tiles, 4, 64, 32].

    The ``kept`` ones are read from rows ``starts`` on in ``columns``; the others are zero.
    """
    out = np.zeros(kept.shape, np.uint16)
    out.reshape(-1)[np.flatnonzero(kept)] = values.reshape(-1)[value_places(counts, starts, columns)]
    return out


def estimated_value_bytes(grid: tuple[int, int], density: float) -> int:
    """Bytes of the values for random elements of ``density`` in ``grid`` tiles along M and along K.

    In a run, the longest of the 256 streams is some standard deviations ahead of the mean. Since streams trade columns,
    the columns drift only as far apart as streams do in ``PLACE_TILES`` tiles. Accurate within 5 % at densities from
    0.05 to 0.9.
    """
    runs = runs_of(grid)
    tiles = grid[0] * grid[1] / runs.count
    deviation = (STREAM_ELEMENTS * min(tiles, PLACE_TILES) * density * (1 - density)) ** 0.5
    ahead = (2.9 if tiles <= PLACE_TILES else 2.0) * deviation
    rows = STREAM_ELEMENTS * density * tiles + 1 + ahead
    return int(runs.count * rows) * PARTS * STREAMS * 2


def chunks_for(front: int) -> int:
    """Chunks of values when the longest stream ends at row ``front``; two more rows may be read."""
    return (front + 1) // CHUNK_ROWS + 1


def encode_strips(
    strips: Iterable[NDArray[np.uint16]], shape: tuple[int, int], *, group_values: int = GROUP
) -> EncodedBitmap:
    """Encode a matrix given as strips [rows, K] of 16-bit patterns, each of ``TILE_M`` rows except perhaps the last.

    No group of the matrix may have more than ``group_values`` elements; with the zeros that are added, none will.
    """
    tiles_m, tiles_k = tile_grid(shape)
    tiles = tiles_m * tiles_k
    masks = np.empty((tiles, PARTS, LANES, 2), np.uint32)
    fronts = np.zeros(tiles + 1, np.int64)
    places = np.zeros((-(-tiles // PLACE_TILES), PARTS, STREAMS), np.uint16)
    values = _Values()
    position = Position.at_front(0)
    restarts = runs_of((tiles_m, tiles_k)).first_tiles()
    nnz = 0
    for grid_row, strip in enumerate(strips):
        first = grid_row * tiles_k
        before = position.columns
        streams = stream_order(whole_tiles(strip, tiles_k))
        kept = (streams & MAGNITUDE) != 0
        counts = flag_counts(kept)
        nnz += int(counts.sum())
        starts, columns, padding = _advance(counts, position, fronts[first : first + tiles_k + 1], first, restarts)
        counts += padding
        _pad(kept, padding, group_values)
        masks[first : first + tiles_k] = pack_masks(kept)
        stored = slice(-(-first // PLACE_TILES), -(-(first + tiles_k) // PLACE_TILES))
        of_tiles = fronts[first : first + tiles_k]
        numbers = np.arange(first, first + tiles_k)
        places[stored] = places_at(numbers, of_tiles, starts, columns, before, restarts).pack()
        where = value_places(counts, starts, columns)
        values.put(streams, kept, where, int(fronts[first + tiles_k]), done=(grid_row + 1) / tiles_m)
    if int(fronts[-1]) > MAX_ROWS:
        raise ArgumentError("a", expected=f"at most {MAX_ROWS} value rows", got=str(int(fronts[-1])))
    return EncodedBitmap(masks=masks, values=values.finish(), fronts=fronts.astype(np.int32), places=places, nnz=nnz)


def _advance(
    counts: NDArray[np.int64],
    position: Position,
    fronts: NDArray[np.int64],
    first: int,
    restarts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row and column where each stream stands before each tile, and how many zeros it must add in the tile.

    Advances ``position`` and fills ``fronts`` [tiles + 1] after its first entry, which is that of tile ``first``. At a
    restart, all streams continue at the front, each in its own column. At every other multiple of ``PLACE_TILES``, they
    trade columns. A stream that would be more than ``SLACK`` rows behind the longest after a tile adds zeros to catch
    up; there is room for them, as the longest gains at most the elements that every stream has in a tile.
    """
    starts = np.empty_like(counts)
    columns = np.empty_like(counts)
    padding = np.empty_like(counts)
    tiles = counts.shape[0]
    restarting = [*(int(restart) - first for restart in restarts if first <= restart < first + tiles), tiles]
    for tile in range(tiles):
        at = position
        if tile == restarting[0]:
            restarting.pop(0)
            at = Position.at_front(int(fronts[tile]))
        elif (first + tile) % PLACE_TILES == 0:
            coming = counts[tile : min(tile + PLACE_TILES, restarting[0])].sum(axis=0)
            at = position.traded(_lanes_to_trade(position.heights, coming))
        starts[tile], columns[tile] = at.rows, at.columns
        reached = at.rows + counts[tile]
        front = fronts[tile + 1] = reached.max()
        position.rows, position.columns = np.maximum(reached, front - SLACK), at.columns
        np.subtract(position.rows, reached, out=padding[tile])
    return starts, columns, padding


def _lanes_to_trade(heights: NDArray[np.int64], coming: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lanes [4, 64] whose columns the streams get; ``coming`` [4, 64] counts the values that each has to come.

    In each half of a part, the stream with the most values gets the column that is furthest behind, and so on; among
    equals, the lower lane comes first.
    """
    lowest = np.argsort(heights.reshape(PARTS, LANES, 2), axis=1, kind="stable")
    longest = np.argsort(-coming.reshape(PARTS, LANES, 2), axis=1, kind="stable")
    lanes = np.empty_like(lowest)
    np.put_along_axis(lanes, longest, lowest, axis=1)
    return lanes.reshape(PARTS, STREAMS)


def _pad(kept: NDArray[np.bool_], padding: NDArray[np.int64], group_values: int) -> None:
    """In every stream of every tile, set the flags of the first ``padding`` zeros whose groups have room for them."""
    where = np.nonzero(padding)
    if where[0].size:
        flags = kept[where]
        zeros = ~flags.reshape(len(flags), -1, GROUP)
        room = group_values - GROUP + zeros.sum(axis=2, keepdims=True)
        zeros &= np.cumsum(zeros, axis=2) <= room
        free = zeros.reshape(flags.shape)
        kept[where] = flags | (free & (np.cumsum(free, axis=1) <= padding[where][:, None]))


_CHUNK_VALUES = PARTS * CHUNK_ROWS * STREAMS


class _Values:
    """A growing array of values [chunks, 4, 16, 64]."""

    def __init__(self) -> None:
        self._flat = np.zeros(0, np.uint16)
        self._used = 1

    def put(
        self,
        streams: NDArray[np.uint16],
        kept: NDArray[np.bool_],
        where: NDArray[np.int64],
        end: int,
        *,
        done: float,
    ) -> None:
        """Store the kept elements of streams [tiles, 4, 64, 32] at the places ``where``.

        They end below row ``end``. ``done`` is the fraction of the matrix that is then stored; the final size is
        estimated from it.
        """
        self._used = chunks_for(end)
        if self._used * _CHUNK_VALUES > self._flat.size:
            size = max(self._used, min(int(self._used / done * 1.01) + 1, 2 * self._used))
            # resize() fills with zeros, and reallocates in place where the system can: no second copy exists.
            self._flat.resize(size * _CHUNK_VALUES, refcheck=False)
        values = streams.reshape(-1)[np.flatnonzero(kept)]
        values[(values & MAGNITUDE) == 0] = 0  # padding may sit on a -0.0
        self._flat[where] = values

    def finish(self) -> NDArray[np.uint16]:
        """All chunks as [chunks, 4, 16, 32, 2]."""
        self._flat.resize(self._used * _CHUNK_VALUES, refcheck=False)
        return self._flat.reshape(self._used, PARTS, CHUNK_ROWS, LANES, 2)
