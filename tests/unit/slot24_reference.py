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
    slots: NDArray[np.uint16]
    bitmap: bitmap_reference.Encoded
    picks: list[int]
    columns: list[int]


@dataclass(frozen=True)
class Column:
    """A column of one part of one window: number there, place in its list, and the rows where it has elements."""

    number: int
    position: int
    rows: frozenset[int]


def part_rows(part: int) -> list[int]:
    """Rows of a tile that a part has."""
    return [*range(16 * part, 16 * part + 16), *range(64 + 16 * part, 80 + 16 * part)]


def lists_of(window: int) -> tuple[list[int], list[int]]:
    """Numbers of the lefts and of the rights, in the order of their lists."""
    lefts = [c for c in range(window) if c % 8 < 4]
    rights = [c for c in range(window) if c % 8 >= 4]
    for copy in range((256 - window) // 8):
        order = (0, 1, 2, 3) if copy % 2 == 0 else (3, 2, 1, 0)
        lefts += [window + residue for residue in order]
        rights += [window + 4 + residue for residue in order]
    return lefts, rights


def rows_of(strip: NDArray[np.uint16], window: int, number: int, part: int, column: int) -> frozenset[int]:
    """Rows of a part in which column ``column`` of window ``number`` of a strip [128, K] has an element."""
    at = number * window + column
    if column >= window or at >= strip.shape[1]:
        return frozenset()
    return frozenset(row for row in part_rows(part) if int(strip[row, at]) not in (0x0000, 0x8000))


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


def arrange(pairs: dict[Column, Column]) -> list[Pair]:
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
        step, r = divmod(turn, 4)
        chosen = [classes[a, best[a]].pop(0) for a in range(4)]
        sets[4 * step + (r if step % 2 == 0 else 3 - r)] = [(left.number, right.number) for left, right in chosen]
    return [pair for number in range(32) for pair in sets[number]]


def pairs_of(strip: NDArray[np.uint16], window: int, number: int, part: int) -> list[Pair] | None:
    """Pairs of one part of one window of a strip [128, K]."""
    left_numbers, right_numbers = lists_of(window)
    lefts, rights = (
        [Column(c, position, rows_of(strip, window, number, part, c)) for position, c in enumerate(numbers)]
        for numbers in (left_numbers, right_numbers)
    )
    pairs = match(lefts, rights)
    return None if pairs is None else arrange(pairs)


def strips_of(bits: NDArray[np.uint16]) -> list[NDArray[np.uint16]]:
    """Strips [128, K] with zeros below the matrix."""
    whole = np.zeros((-(-bits.shape[0] // 128) * 128, bits.shape[1]), np.uint16)
    whole[: bits.shape[0]] = bits
    return [whole[first : first + 128] for first in range(0, len(whole), 128)]


def all_pairs(bits: NDArray[np.uint16], window: int) -> dict[tuple[int, int, int], list[Pair]] | None:
    """By strip, window and part; ``None`` when one does not pair up."""
    out = {}
    for strip_number, strip in enumerate(strips_of(bits)):
        for number in range(-(-bits.shape[1] // window)):
            for part in range(4):
                pairs = pairs_of(strip, window, number, part)
                if pairs is None:
                    return None
                out[strip_number, number, part] = pairs
    return out


def encode(bits: NDArray[np.uint16], window: int | None = None) -> Encoded | None:
    """All buffers of a matrix of 16-bit patterns; ``None`` when ``window`` is too large for it."""
    for size in WINDOWS if window is None else (window,):
        pairs = all_pairs(bits, size)
        if pairs is not None:
            return write(bits, size, pairs)
    return None


def write(bits: NDArray[np.uint16], window: int, pairs: dict[tuple[int, int, int], list[Pair]]) -> Encoded:
    """The buffers, for given pairs."""
    strips = strips_of(bits)
    windows = -(-bits.shape[1] // window)
    slots = np.zeros((128 * len(strips), 128 * windows), np.uint16)
    picks = [0] * (len(strips) * 2 * windows * 4 * 32 * 2)
    columns = [0] * (len(strips) * 2 * windows * 4 * 32 * 4)
    for (strip_number, number, part), ordered in pairs.items():
        strip = strips[strip_number]
        for place, pair in enumerate(ordered):
            tile = (strip_number * windows + number) * 2 + place // 64
            step, q = place % 64 // 16, place % 16
            for side, column in enumerate(pair):
                columns[((tile * 4 + part) * 32 + 2 * q + side) * 4 + step] = column
                for row in rows_of(strip, window, number, part, column):
                    slots[strip_number * 128 + row, number * 128 + place] = strip[row, number * window + column]
                    if side == 1:
                        word, bit = place_of_pick(row, step, q)
                        picks[((tile * 4 + part) * 32 + word // 2) * 2 + word % 2] |= 1 << bit
    slots = slots[: bits.shape[0]]
    return Encoded(window, slots, bitmap_reference.encode(slots), picks, columns)


def place_of_pick(row: int, step: int, q: int) -> tuple[int, int]:
    """Word (2 * lane + its word) of the part, and bit, for pair ``q`` of a step in a row of the tile."""
    i, within = divmod(row, 64)
    b, g = divmod(within % 16, 8)
    v, half_of_word = divmod(step, 2)
    h, in_half = divmod(q, 8)
    u, e = divmod(in_half, 2)
    lane = 4 * g + 2 * half_of_word + h
    return 2 * lane + v, 16 * b + 4 * u + 2 * e + i


def decode(
    slots: NDArray[np.uint16], picks: list[int], columns: list[int], shape: tuple[int, int], window: int
) -> NDArray[np.uint16]:
    """The matrix, from slots [M, 128 * windows], picks and columns."""
    out = np.zeros(shape, np.uint16)
    windows = -(-shape[1] // window)
    for row, slot in np.argwhere(slots).tolist():
        number, place = divmod(slot, 128)
        tile = (row // 128 * windows + number) * 2 + place // 64
        step, q = place % 64 // 16, place % 16
        part = row % 64 // 16
        word, bit = place_of_pick(row % 128, step, q)
        side = picks[((tile * 4 + part) * 32 + word // 2) * 2 + word % 2] >> bit & 1
        column = columns[((tile * 4 + part) * 32 + 2 * q + side) * 4 + step]
        out[row, number * window + column] = slots[row, slot]
    return out


def assert_as_written(w: Any, want: Encoded) -> None:
    """The bytes of the weight ``w`` are those of the written format."""
    assert w.window == want.window
    assert w.columns.ravel().tolist() == want.columns
    assert w.picks.ravel().tolist() == want.picks
    assert w.masks.ravel().tolist() == want.bitmap.masks
    assert w.values.ravel().tolist() == want.bitmap.values
    assert w.fronts.tolist() == want.bitmap.fronts
    assert w.lags.ravel().tolist() == want.bitmap.lags
    assert w.nnz == want.bitmap.nnz
