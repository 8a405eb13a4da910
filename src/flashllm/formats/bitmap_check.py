# SPDX-License-Identifier: Apache-2.0
"""Bitmap: checks every invariant in time linear in the number of tiles and values.

A kernel follows masks, fronts and places without checking them, so data from outside must pass these checks first.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.formats.bitmap_encode import (
    CHUNK_ROWS,
    LANES,
    PARTS,
    PLACE_TILES,
    SLACK,
    STREAM_ELEMENTS,
    STREAMS,
    Places,
    Position,
    chunks_for,
    flag_counts,
    places_at,
    stream_order,
    stream_starts,
    unpack_masks,
    value_places,
)
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.check import check_array, check_nnz, check_shape_and_type
from flashllm.formats.runs import runs_of
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid

_CHUNK_TILES = 1024  # tiles checked at once: 8 MiB of flags


def check_fields(*, shape: Any, dtype: Any, nnz: Any, path: str | None = None) -> None:
    """Raise ``FormatError`` unless the scalar fields have legal types and ranges."""
    check_shape_and_type(shape=shape, dtype=dtype, path=path)
    check_nnz(nnz, shape=shape, path=path)


def check_buffers(
    *, shape: tuple[int, int], masks: Any, values: Any, fronts: Any, places: Any, path: str | None = None
) -> None:
    """Raise ``FormatError`` unless the buffers (NumPy or CuPy) have the types and shapes that the matrix requires."""
    tiles_m, tiles_k = tile_grid(shape)
    tiles = tiles_m * tiles_k
    wanted: dict[str, tuple[Any, Any, tuple[int | None, ...]]] = {
        "masks": (masks, np.uint32, (tiles, PARTS, LANES, 2)),
        "values": (values, np.uint16, (None, PARTS, CHUNK_ROWS, LANES, 2)),
        "fronts": (fronts, np.int32, (tiles + 1,)),
        "places": (places, np.uint16, (-(-tiles // PLACE_TILES), PARTS, STREAMS)),
    }
    for field, (array, dtype, dimensions) in wanted.items():
        check_array(field, array, dtype, dimensions, reason=f"{tiles_m} x {tiles_k} tiles", path=path)


def check_content(
    *,
    shape: tuple[int, int],
    nnz: int,
    masks: NDArray[np.uint32],
    values: NDArray[np.uint16],
    fronts: NDArray[np.int32],
    places: NDArray[np.uint16],
    path: str | None = None,
) -> None:
    """Raise ``FormatError`` unless masks, fronts, places, values and ``nnz`` agree.

    Call ``check_fields`` and ``check_buffers`` first. The index in an error counts entries of the flattened buffer.
    """
    _check_fronts(fronts, len(values), path)
    if np.any(values == 0x8000):
        at = int(np.argmax(values == 0x8000))
        raise FormatError(
            field="values",
            index=at,
            expected="no -0.0: zeros are pruned and padding is 0x0000",
            got="0x8000",
            path=path,
        )
    _check_lanes(places, path)
    position = Position.at_front(0)
    restarts = runs_of(tile_grid(shape)).first_tiles()
    found = 0
    for start in range(0, len(masks), _CHUNK_TILES):
        tiles = np.arange(start, min(start + _CHUNK_TILES, len(masks)))
        kept = unpack_masks(masks[tiles])
        counts = flag_counts(kept)
        before = position.columns
        starts, columns = stream_starts(counts, position, fronts, places, start, restarts)
        _check_streams(tiles, starts, counts, fronts, path)
        _check_places(places, tiles, places_at(tiles, fronts[tiles], starts, columns, before, restarts), path)
        stored = (values.reshape(-1)[value_places(counts, starts, columns)] & MAGNITUDE) != 0
        found += int(np.count_nonzero(stored))
        _check_inside(shape, tiles, kept, stored, path)
    if found != nnz:
        raise FormatError(field="nnz", expected=f"{found}, the values that are not zero", got=str(nnz), path=path)
    total = int(np.count_nonzero(values))
    if total != found:
        raise FormatError(
            field="values", expected="zeros where no mask has a bit", got=f"{total - found} other values", path=path
        )


def _check_fronts(fronts: NDArray[np.int32], chunks: int, path: str | None) -> None:
    def bad(index: int, expected: str) -> NoReturn:
        raise FormatError(field="fronts", index=index, expected=expected, got=str(fronts[index]), path=path)

    if fronts[0] != 0:
        bad(0, "0")
    steps = np.diff(fronts.astype(np.int64))
    wrong = (steps < 0) | (steps > STREAM_ELEMENTS)
    if wrong.any():
        at = int(np.argmax(wrong))
        bad(
            at + 1,
            f"{fronts[at]} to {int(fronts[at]) + STREAM_ELEMENTS}: a stream has {STREAM_ELEMENTS} elements in a tile",
        )
    if chunks_for(int(fronts[-1])) != chunks:
        raise FormatError(
            field="values",
            expected=f"{chunks_for(int(fronts[-1]))} chunks, two rows beyond the last front {fronts[-1]}",
            got=str(chunks),
            path=path,
        )


def _check_lanes(places: NDArray[np.uint16], path: str | None) -> None:
    """Check that in each half of a part every lane's column belongs to exactly one stream."""
    lanes = Places.unpack(places).lanes.reshape(len(places), PARTS, LANES, 2)
    sound = (np.sort(lanes, axis=2) == np.arange(LANES)[:, None]).all(axis=(1, 2, 3))
    if sound.all():
        return
    at = int(np.argmin(sound))
    for part in range(PARTS):
        for half in range(2):
            found = lanes[at, part, :, half].tolist()
            for lane, column in enumerate(found):
                if column in found[:lane]:
                    raise FormatError(
                        field="places",
                        index=(at * PARTS + part) * STREAMS + 2 * lane + half,
                        expected="a column of a lane whose column no stream of the half has yet",
                        got=f"that of lane {column}",
                        path=path,
                    )


def _check_places(places: NDArray[np.uint16], tiles: NDArray[np.int64], want: Places, path: str | None) -> None:
    """Check the places of the multiples of ``PLACE_TILES`` among ``tiles``: columns continue where they ended."""
    first = -(-int(tiles[0]) // PLACE_TILES)
    found = places[first : first + len(want.lanes)]
    if (found == want.pack()).all():
        return
    wrong = int(np.argmax((found != want.pack()).ravel()))

    def text(at: Places) -> str:
        giver, lane, lag = (int(field.ravel()[wrong]) for field in at)
        return f"the column of lane {lane}, from the stream of lane {giver}, {lag} rows behind the front"

    raise FormatError(
        field="places",
        index=first * PARTS * STREAMS + wrong,
        expected=text(want),
        got=text(Places.unpack(found)),
        path=path,
    )


def _check_streams(
    tiles: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    fronts: NDArray[np.int32],
    path: str | None,
) -> None:
    """Check that after each tile the longest stream is at the front and none is more than ``SLACK`` rows behind."""
    behind = fronts[tiles + 1].astype(np.int64)[:, None, None] - (starts + counts)
    for wrong, expected in (
        (behind.min(axis=(1, 2)) != 0, "the value row that the longest stream reaches by its masks"),
        (behind.max(axis=(1, 2)) > SLACK, f"no stream more than {SLACK} rows behind"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            got = f"{fronts[tiles[at] + 1]}, with streams {behind[at].min()} to {behind[at].max()} rows behind"
            raise FormatError(field="fronts", index=int(tiles[at]) + 1, expected=expected, got=got, path=path)


def _check_inside(
    shape: tuple[int, int],
    tiles: NDArray[np.int64],
    kept: NDArray[np.bool_],
    stored: NDArray[np.bool_],
    path: str | None,
) -> None:
    """Check that nonzero values lie inside the matrix; padding may lie anywhere in a tile."""
    tiles_k = tile_grid(shape)[1]
    rows, columns = shape[0] - tiles // tiles_k * TILE_M, shape[1] - tiles % tiles_k * TILE_K
    if rows.min() >= TILE_M and columns.min() >= TILE_K:
        return
    place = stream_order(np.arange(TILE_M * TILE_K, dtype=np.uint16).reshape(TILE_M, TILE_K))[0]
    tile, part, stream, element = np.nonzero(kept)
    row, column = np.divmod(place[part, stream, element].astype(np.int64), TILE_K)
    beyond = stored & ((row >= rows[tile]) | (column >= columns[tile]))
    if beyond.any():
        at = int(np.argmax(beyond))
        lane = (int(tiles[tile[at]]) * PARTS + int(part[at])) * LANES + int(stream[at]) // 2
        raise FormatError(
            field="masks",
            index=lane * 2 + int(element[at]) // (STREAM_ELEMENTS // 2),
            expected=f"values inside {shape[0]} x {shape[1]}",
            got=f"one at row {row[at]}, column {column[at]} of the tile",
            path=path,
        )
