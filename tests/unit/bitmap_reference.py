# SPDX-License-Identifier: Apache-2.0
"""Bitmap written a second time, element by element, as docs/formats/bitmap.md and the header describe it.

Slow and simple on purpose; imports nothing from the package, so that it is independent of the encoders it checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Stream = tuple[int, int, int]
"""Part, lane, and 0 for the first or 1 for the second half of the columns of a step."""
STREAMS: list[Stream] = [(part, lane, half) for part in range(4) for lane in range(32) for half in range(2)]


@dataclass
class Encoded:
    """The buffers, flat."""

    masks: list[int]
    values: list[int]
    fronts: list[int]
    places: list[int]
    nnz: int


@cache
def place_of(part: int, lane: int, group: int, element: int) -> tuple[int, int]:
    """Row and column in the tile of one of the four elements of a group."""
    g, t = divmod(lane, 4)
    i, half, step = group // 2 % 2, group % 2, group // 4
    return 64 * i + 16 * part + g + 8 * (element // 2), 16 * step + 8 * half + 2 * t + element % 2


@cache
def elements_of(stream: Stream) -> list[tuple[int, int]]:
    """(group, element) of the 32 elements of a stream in one tile, in order."""
    return [(group, element) for group in range(16) if group % 2 == stream[2] for element in range(4)]


def first_rooms(found: dict[tuple[int, int], int], stream: Stream, group_values: int) -> list[tuple[int, int]]:
    """Where a stream that has ``found`` may get zeros, in order; a group holds at most ``group_values`` values."""
    out = []
    for group in range(stream[2], 16, 2):
        room = group_values - sum((group, element) in found for element in range(4))
        out += [(group, element) for element in range(4) if (group, element) not in found][:room]
    return out


def restarts(tiles_m: int, tiles_k: int) -> set[int]:
    """The tiles at which runs begin."""
    runs = min(396, tiles_m * tiles_k // 8) or 1
    weight = 2
    if runs - runs % tiles_m >= 0.965 * runs:
        runs -= runs % tiles_m
        weight = 0
    found = set()
    for run in range(runs):
        row, rest = divmod(run * tiles_m * (tiles_k + weight) // runs, tiles_k + weight)
        found.add(row * tiles_k + min(rest, tiles_k))
    return found


def encode(bits: NDArray[np.uint16], group_values: int = 4) -> Encoded:
    """Masks, values, fronts and places of 16-bit patterns; no group of the matrix has more than ``group_values``."""
    rows, columns = bits.shape
    tiles_k = -(-columns // 64)
    corners = [(top, left) for top in range(0, rows, 128) for left in range(0, columns, 64)]
    tiles = [elements_in(bits[top : top + 128, left : left + 64]) for top, left in corners]
    begins = restarts(-(-rows // 128), tiles_k)
    masks: list[int] = []
    places: list[int] = []
    fronts = [0]
    values: dict[Stream, list[int]] = {}  # of columns, which are numbered as streams are
    has: dict[Stream, Stream] = {}  # the column of each stream
    for number, found in enumerate(tiles):
        if number in begins:
            values = {stream: values.get(stream, []) for stream in STREAMS}
            for column in values.values():
                column += [0] * (fronts[-1] - len(column))
            has = {stream: stream for stream in STREAMS}
        had = has
        if number % 8 == 0 and number not in begins:
            # The elements that come until streams trade again, the run ends, or the row of tiles ends.
            last = number
            while (last + 1) % 8 and (last + 1) % tiles_k and last + 1 < len(tiles) and last + 1 not in begins:
                last += 1
            coming = {stream: sum(len(tile[stream]) for tile in tiles[number : last + 1]) for stream in STREAMS}
            for part in range(4):
                for half in range(2):
                    half_streams = [(part, lane, half) for lane in range(32)]
                    lowest = sorted(half_streams, key=lambda column: len(values[column]))
                    longest = sorted(half_streams, key=lambda stream: -coming[stream])
                    has = has | dict(zip(longest, lowest, strict=True))
        if number % 8 == 0:
            had_by = {column: stream for stream, column in had.items()}
            for stream in STREAMS:
                column = has[stream]
                places.append(had_by[column][1] + 32 * column[1] + 1024 * (fronts[-1] - len(values[column])))
        front = max(len(values[has[stream]]) + len(found[stream]) for stream in STREAMS)
        word = dict.fromkeys(((part, lane, half) for part in range(4) for lane in range(32) for half in range(2)), 0)
        for stream in STREAMS:
            part, lane, _ = stream
            column = values[has[stream]]
            missing = max(0, front - 31 - len(column) - len(found[stream]))
            stored = found[stream]
            if missing > 0:
                stored = stored | dict.fromkeys(first_rooms(stored, stream, group_values)[:missing], 0)
            for group, element in elements_of(stream):
                if (group, element) in stored:
                    column.append(stored[group, element])
                    word[part, lane, group // 8] |= 1 << (8 * element + group % 8)
        masks += word.values()
        fronts.append(front)
    nnz = sum(len(found[stream]) for found in tiles for stream in STREAMS)
    return Encoded(masks, lay_out(values, fronts[-1]), fronts, places, nnz)


def elements_in(inside: NDArray[np.uint16]) -> dict[Stream, dict[tuple[int, int], int]]:
    """The nonzero elements of each stream of a tile, which may reach over the edges of the matrix."""
    tile = np.zeros((128, 64), np.uint16)
    tile[: inside.shape[0], : inside.shape[1]] = inside
    elements = tile.tolist()
    found = {}
    for stream in STREAMS:
        places = {e: place_of(stream[0], stream[1], *e) for e in elements_of(stream)}
        at = {e: elements[row][column] for e, (row, column) in places.items()}
        found[stream] = {e: value for e, value in at.items() if value not in (0x0000, 0x8000)}
    return found


def lay_out(values: dict[Stream, list[int]], front: int) -> list[int]:
    """The value rows, 16 of each part at a time, with at least two after the front."""
    out: list[int] = []
    for first in range(0, front + 2, 16):
        for part in range(4):
            for row in range(first, first + 16):
                for lane in range(32):
                    for half in range(2):
                        stream = values[part, lane, half]
                        out.append(stream[row] if row < len(stream) else 0)
    return out


def decode(masks: list[int], values: list[int], places: list[int], shape: tuple[int, int]) -> NDArray[np.uint16]:
    """The matrix, from masks, values and the lanes of places; fronts and rows carry no further information."""
    begins = restarts(-(-shape[0] // 128), -(-shape[1] // 64))
    rows, columns = shape
    tiles_k = -(-columns // 64)
    out = np.zeros((-(-rows // 128) * 128, tiles_k * 64), np.uint16)
    taken = dict.fromkeys(STREAMS, 0)  # of columns
    has = {stream: stream for stream in STREAMS}
    for number in range(len(masks) // 256):
        top, left = number // tiles_k * 128, number % tiles_k * 64
        if number in begins:
            taken = dict.fromkeys(STREAMS, max(taken.values()))
            has = {stream: stream for stream in STREAMS}
        elif number % 8 == 0:
            for i, (part, lane, half) in enumerate(STREAMS):
                has[part, lane, half] = part, places[number // 8 * 256 + i] // 32 % 32, half
        for stream in STREAMS:
            part, lane, half = stream
            column = has[stream]
            for group, element in elements_of(stream):
                if masks[((number * 4 + part) * 32 + lane) * 2 + group // 8] >> (8 * element + group % 8) & 1:
                    row = taken[column]
                    value = values[((row // 16 * 4 + part) * 16 + row % 16) * 64 + 2 * column[1] + half]
                    down, right = place_of(part, lane, group, element)
                    out[top + down, left + right] = value
                    taken[column] += 1
    return out[:rows, :columns]
