# SPDX-License-Identifier: Apache-2.0
"""Slot24 written down a second time, pair by pair, as docs/formats/slot24.md describes it.

Slow and simple on purpose; imports nothing from the package, so that the encoders have something to be wrong against.
The slots are encoded by the second writing of bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import bitmap_reference
import numpy as np
from numpy.typing import NDArray

WINDOWS = (256, 248, 240, 232, 224, 216, 208, 192, 176, 160, 144, 128)
Pair = tuple[int, int]
"""Left and right column, as numbers in the window."""


@dataclass
class Encoded:
    """The buffers, flat."""

    window: int
    part_rows: int
    slots: NDArray[np.uint16]
    bitmap: bitmap_reference.Encoded
    picks: list[int]
    columns: list[int]


@dataclass(frozen=True)
class Column:
    """A column of one band of one window: number there, place in its list, and the rows where it has elements."""

    number: int
    position: int
    rows: frozenset[int]


def band_rows(part_rows: int, band: int) -> list[int]:
    """Rows of a tile that a band has."""
    if part_rows == 64:
        return list(range(64 * band, 64 * band + 64))
    return [*range(16 * band, 16 * band + 16), *range(64 + 16 * band, 80 + 16 * band)]


def lists_of(window: int) -> tuple[list[int], list[int]]:
    """Numbers of the lefts and of the rights, in the order of their lists."""
    lefts = [c for c in range(window) if c % 8 < 4]
    rights = [c for c in range(window) if c % 8 >= 4]
    for copy in range((256 - window) // 8):
        order = (0, 1, 2, 3) if copy % 2 == 0 else (3, 2, 1, 0)
        lefts += [window + residue for residue in order]
        rights += [window + 4 + residue for residue in order]
    return lefts, rights


def rows_of(strip: NDArray[np.uint16], window: int, number: int, rows: list[int], column: int) -> frozenset[int]:
    """Those of ``rows`` in which column ``column`` of window ``number`` of a strip [128, K] has an element."""
    at = number * window + column
    if column >= window or at >= strip.shape[1]:
        return frozenset()
    return frozenset(row for row in rows if int(strip[row, at]) not in (0x0000, 0x8000))


def by_weight(columns: list[Column]) -> list[Column]:
    """Heavy ones first, ties by position."""
    return sorted(columns, key=lambda column: (-len(column.rows), column.position))


def match(lefts: list[Column], rights: list[Column]) -> dict[Column, Column] | None:
    """Left to right, or ``None``."""
    compatible = {left: [right for right in rights if not left.rows & right.rows] for left in lefts}
    pairs: dict[Column, Column] = {}
    owner: dict[Column, Column] = {}
    for left in by_weight(lefts):
        for right in by_weight(compatible[left]):
            if right not in owner:
                pairs[left], owner[right] = right, left
                break
    for first in by_weight([left for left in lefts if left not in pairs]):
        seen: dict[Column, Column] = {}
        queue = [first]
        end = None
        while queue and end is None:
            left = queue.pop(0)
            for right in compatible[left]:
                if right in seen:
                    continue
                seen[right] = left
                if right not in owner:
                    end = right
                    break
                queue.append(owner[right])
        if end is None:
            return None
        while end is not None:
            left = seen[end]
            former = pairs.get(left)
            pairs[left], owner[end] = end, left
            end = former
    return pairs


def arrange(pairs: dict[Column, Column], part_rows: int) -> list[Pair]:
    """The 128 pairs in the order of the slots."""
    classes: dict[tuple[int, int], list[tuple[Column, Column]]] = {(a, b): [] for a in range(4) for b in range(4)}
    for left, right in sorted(pairs.items(), key=lambda p: (-len(p[0].rows) - len(p[1].rows), p[0].position)):
        classes[left.number % 8, right.number % 8 - 4].append((left, right))
    sets: dict[int, list[Pair]] = {}
    for turn in range(32):
        best, best_least = None, 0
        for s in permutations(range(4)):
            least = min(len(classes[a, s[a]]) for a in range(4))
            if least > best_least:
                best, best_least = s, least
        assert best is not None
        j, r = divmod(turn, 4)
        step = j if part_rows == 32 else j // 4 * 4 + (0, 2, 3, 1)[j % 4]
        chosen = [classes[a, best[a]].pop(0) for a in range(4)]
        sets[4 * step + (r if j % 2 == 0 else 3 - r)] = [(left.number, right.number) for left, right in chosen]
    return [pair for number in range(32) for pair in sets[number]]


def pairs_of(strip: NDArray[np.uint16], window: int, number: int, part_rows: int, band: int) -> list[Pair] | None:
    """Pairs of one band of one window of a strip [128, K]."""
    rows = band_rows(part_rows, band)
    left_numbers, right_numbers = lists_of(window)
    lefts, rights = (
        [Column(c, position, rows_of(strip, window, number, rows, c)) for position, c in enumerate(numbers)]
        for numbers in (left_numbers, right_numbers)
    )
    pairs = match(lefts, rights)
    return None if pairs is None else arrange(pairs, part_rows)


def strips_of(bits: NDArray[np.uint16]) -> list[NDArray[np.uint16]]:
    """Strips [128, K] with zeros below the matrix."""
    whole = np.zeros((-(-bits.shape[0] // 128) * 128, bits.shape[1]), np.uint16)
    whole[: bits.shape[0]] = bits
    return [whole[first : first + 128] for first in range(0, len(whole), 128)]


def all_pairs(bits: NDArray[np.uint16], window: int, part_rows: int) -> dict[tuple[int, int, int], list[Pair]] | None:
    """By strip, window and band; ``None`` when one does not pair up."""
    out = {}
    for strip_number, strip in enumerate(strips_of(bits)):
        for number in range(-(-bits.shape[1] // window)):
            for band in range(128 // part_rows):
                pairs = pairs_of(strip, window, number, part_rows, band)
                if pairs is None:
                    return None
                out[strip_number, number, band] = pairs
    return out


def encode(bits: NDArray[np.uint16], window: int | None = None, part_rows: int | None = None) -> Encoded | None:
    """All buffers of a matrix of 16-bit patterns; ``None`` when ``window`` is too large for it."""
    sizes = WINDOWS if window is None else (window,)
    if part_rows is None:
        tries = [(64, size) for size in (256, 248) if size in sizes] + [(32, size) for size in sizes]
    else:
        tries = [(part_rows, size) for size in sizes]
    for rows, size in tries:
        pairs = all_pairs(bits, size, rows)
        if pairs is not None:
            return write(bits, size, rows, pairs)
    return None


def write(
    bits: NDArray[np.uint16], window: int, part_rows: int, pairs: dict[tuple[int, int, int], list[Pair]]
) -> Encoded:
    """The buffers, for given pairs."""
    strips = strips_of(bits)
    windows = -(-bits.shape[1] // window)
    slots, stored = np.zeros((2, 128 * len(strips), 128 * windows), np.uint16)
    tiles = len(strips) * 2 * windows
    picks = [0] * (tiles * 4 * 32 * 2)
    columns = [0] * (tiles * 4 * 32 * (4 if part_rows == 32 else 2))
    for (strip_number, number, band), ordered in pairs.items():
        strip = strips[strip_number]
        for place, pair in enumerate(ordered):
            tile = (strip_number * windows + number) * 2 + place // 64
            step, q = place % 64 // 16, place % 16
            for side, column in enumerate(pair):
                columns[place_of_column(part_rows, tile, band, step, q, side)] = column
                for row in rows_of(strip, window, number, band_rows(part_rows, band), column):
                    value = strip[row, number * window + column]
                    slots[strip_number * 128 + row, number * 128 + place] = value
                    down, across = stored_place(part_rows, row, place % 64)
                    stored[strip_number * 128 + down, number * 128 + place // 64 * 64 + across] = value
                    if side == 1:
                        word, bit = place_of_pick(part_rows, tile, row, step, q)
                        picks[word] |= 1 << bit
    encoded = bitmap_reference.encode(stored)
    return Encoded(window, part_rows, slots[: bits.shape[0]], encoded, picks, columns)


def place_of_column(part_rows: int, tile: int, band: int, step: int, q: int, side: int) -> int:
    """Index in ``columns`` of a side of pair ``q`` of a step of a tile."""
    if part_rows == 32:
        return ((tile * 4 + band) * 32 + 2 * q + side) * 4 + step
    h, v = divmod(step, 2)
    return ((tile * 4 + 2 * band + h) * 32 + 2 * q + side) * 2 + v


def place_of_pick(part_rows: int, tile: int, row: int, step: int, q: int) -> tuple[int, int]:
    """Index in ``picks``, and bit, for pair ``q`` of a step in a row of the tile."""
    h, in_half = divmod(q, 8)
    u, e = divmod(in_half, 2)
    if part_rows == 32:
        i, within = divmod(row, 64)
        part, within = divmod(within, 16)
        v, half_of_word = divmod(step, 2)
    else:
        r, within = divmod(row, 64)
        fragment, within = divmod(within, 16)
        half_of_word, i = divmod(fragment, 2)
        k_half, v = divmod(step, 2)
        part = 2 * r + k_half
    b, g = divmod(within, 8)
    lane = 4 * g + 2 * half_of_word + h
    return ((tile * 4 + part) * 32 + lane) * 2 + v, 16 * b + 4 * u + 2 * e + i


def stored_place(part_rows: int, row: int, slot: int) -> tuple[int, int]:
    """Row and column in a tile of the bitmap of row and slot of a tile of S."""
    if part_rows == 32:
        return row, slot
    r, within = divmod(row, 64)
    f, a = divmod(within, 16)
    s, q = divmod(slot, 16)
    h, v = divmod(s, 2)
    return 64 * (f % 2) + 16 * (2 * r + h) + a, 32 * v + 16 * (f // 2) + q


def decode(written: Encoded, shape: tuple[int, int]) -> NDArray[np.uint16]:
    """The matrix, from slots, picks and columns."""
    out = np.zeros(shape, np.uint16)
    windows = -(-shape[1] // written.window)
    part_rows = written.part_rows
    for row, slot in np.argwhere(written.slots).tolist():
        number, place = divmod(slot, 128)
        tile = (row // 128 * windows + number) * 2 + place // 64
        step, q = place % 64 // 16, place % 16
        band = next(band for band in range(128 // part_rows) if row % 128 in band_rows(part_rows, band))
        word, bit = place_of_pick(part_rows, tile, row % 128, step, q)
        side = written.picks[word] >> bit & 1
        column = written.columns[place_of_column(part_rows, tile, band, step, q, side)]
        out[row, number * written.window + column] = written.slots[row, slot]
    return out


def assert_as_written(w: Any, want: Encoded) -> None:
    """The bytes of the weight ``w`` are those of the written format."""
    assert (w.window, w.part_rows) == (want.window, want.part_rows)
    assert w.columns.ravel().tolist() == want.columns
    assert w.picks.ravel().tolist() == want.picks
    assert w.masks.ravel().tolist() == want.bitmap.masks
    assert w.values.ravel().tolist() == want.bitmap.values
    assert w.fronts.tolist() == want.bitmap.fronts
    assert w.lags.ravel().tolist() == want.bitmap.lags
    assert w.nnz == want.bitmap.nnz
