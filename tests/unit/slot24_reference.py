# SPDX-License-Identifier: Apache-2.0
"""Slot24 written a second time, pair by pair, as docs/formats/slot24.md describes it.

Slow and simple on purpose; imports nothing from the package, so that it is independent of the encoders it checks.
The slots are encoded by ``bitmap_reference``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
    group_values: int
    slots: NDArray[np.uint16]
    bitmap: bitmap_reference.Encoded
    picks: list[int]
    columns: list[int]


@dataclass(frozen=True, eq=False)  # equal only to itself, which is far faster to compare
class Column:
    """A column of one band of one window: its number there, its place in its list, and the rows with elements."""

    number: int
    position: int
    rows: frozenset[int]


def band_rows(part_rows: int, band: int) -> list[int]:
    """Rows of a tile that belong to a band."""
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
    """Those of ``rows`` in which ``column`` of window ``number`` of a strip [128, K] has an element."""
    at = number * window + column
    if column >= window or at >= strip.shape[1]:
        return frozenset()
    return frozenset(row for row in rows if int(strip[row, at]) not in (0x0000, 0x8000))


def by_weight(columns: list[Column]) -> list[Column]:
    """Heavy ones first, ties by position."""
    return sorted(columns, key=lambda column: (-len(column.rows), column.position))


def match(lefts: list[Column], rights: list[Column]) -> dict[Column, Column] | None:
    """A right for every left, heavy with heavy, or ``None``."""
    compatible = {left: [right for right in rights if not left.rows & right.rows] for left in lefts}
    pairs: dict[Any, Any] = {}
    owner: dict[Any, Any] = {}
    for left in by_weight(lefts):
        for right in by_weight(compatible[left]):
            if right not in owner:
                pairs[left], owner[right] = right, left
                break
    return complete(pairs, owner, by_weight(lefts), compatible)


def complete(
    pairs: dict[Any, Any], owner: dict[Any, Any], lefts: list[Any], compatible: dict[Any, list[Any]]
) -> dict[Any, Any] | None:
    """A right for every left, along alternating paths searched in the order of ``lefts``, or ``None``."""
    for first in lefts:
        if first in pairs:
            continue
        seen: dict[Any, Any] = {}
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


@dataclass(frozen=True, eq=False)
class Slot:
    """A pair of columns, the place of the pair in the list of its side, and the rows where it has values."""

    left: Column
    right: Column
    position: int
    rows: frozenset[int]
    groups: Counter[int]
    """How many values it has in rows a and a + 8 of 16, by the first of the two."""


def match_evenly(
    lefts: list[Any], rights: list[Any], fits: Callable[[Any, Any], bool], attempt: int
) -> dict[Any, Any] | None:
    """A right for every left, heavy with light, or ``None``."""

    def rank(one: Any) -> tuple[int, int]:
        heavier = one.position * (2 * attempt + 1) // 8 % 4 if attempt > 0 else 0
        return len(one.rows) + heavier, one.position

    compatible = {left: [right for right in rights if fits(left, right)] for left in lefts}
    heaviest = [(-len(one.rows), 0, one.position, one) for one in lefts]
    heaviest += [(-len(one.rows), 1, one.position, one) for one in rights]
    heaviest.sort(key=lambda entry: entry[:3])
    pairs: dict[Any, Any] = {}
    owner: dict[Any, Any] = {}
    for _, side, _, one in heaviest:
        if side == 0 and one not in pairs:
            free = [right for right in compatible[one] if right not in owner]
            if free:
                right = min(free, key=rank)
                pairs[one], owner[right] = right, one
        elif side == 1 and one not in owner:
            free = [left for left in lefts if left not in pairs and one in compatible[left]]
            if free:
                left = min(free, key=rank)
                pairs[left], owner[one] = one, left
    return complete(pairs, owner, [entry[3] for entry in heaviest if entry[1] == 0], compatible)


def fit_in_groups(one: Slot, other: Slot) -> bool:
    """Whether no group of the two, rows a and a + 8 of 16, has more than two values."""
    return all(values + other.groups[row] <= 2 for row, values in one.groups.items())


def pair_in_groups(lefts: list[Column], rights: list[Column]) -> list[Pair] | None:
    """The 128 pairs in slot order, with at most two values in any group; ``None`` if there are no such pairs."""
    for attempt in range(8):
        pairs = match_evenly(lefts, rights, lambda left, right: not left.rows & right.rows, attempt)
        if pairs is None:
            return None
        sides: tuple[list[Slot], list[Slot]] = ([], [])
        for left in lefts:
            side = sides[left.number % 2]
            rows = left.rows | pairs[left].rows
            groups = Counter(row - row % 16 + row % 8 for row in rows)
            side.append(Slot(left, pairs[left], len(side), rows, groups))

        def fits(even: Slot, odd: Slot, careful: bool = attempt < 6) -> bool:
            apart = even.right.number % 8 != odd.right.number % 8
            return fit_in_groups(even, odd) and (apart or not careful)

        neighbours = match_evenly(*sides, fits, 0)
        if neighbours is not None:
            quads = [(even, neighbours[even]) for even in sides[0]]
            return [(slot.left.number, slot.right.number) for quad in order_quads(quads) for slot in quad]
    return None


def order_quads(quads: list[tuple[Slot, Slot]]) -> list[tuple[Slot, Slot]]:
    """First the quads that can be taken two by two so that their eight residues all differ; then the others."""
    residues = [{column.number % 8 for slot in quad for column in (slot.left, slot.right)} for quad in quads]
    waiting = list(range(len(quads)))
    ordered, rest = [], []
    while waiting:
        one = waiting.pop(0)
        other = next((n for n in waiting if residues[one] | residues[n] == set(range(8))), None)
        if other is None:
            rest.append(quads[one])
        else:
            waiting.remove(other)
            ordered += [quads[one], quads[other]]
    return ordered + rest


def arrange(pairs: dict[Column, Column], part_rows: int) -> list[Pair]:
    """The 128 pairs in the order of the slots."""
    classes: dict[tuple[int, int], list[tuple[Column, Column]]] = {(a, b): [] for a in range(4) for b in range(4)}
    for left, right in sorted(pairs.items(), key=lambda p: (-len(p[0].rows) - len(p[1].rows), p[0].position)):
        classes[left.number % 8, right.number % 8 - 4].append((left, right))
    chosen: list[list[tuple[Column, Column]]] = []
    for _ in range(32):
        best, best_least = None, 0
        for s in permutations(range(4)):
            least = min(len(classes[a, s[a]]) for a in range(4))
            if least > best_least:
                best, best_least = s, least
        assert best is not None
        chosen.append([classes[a, best[a]].pop(0) for a in range(4)])
    weights = [sum(len(column.rows) for pair in four for column in pair) for four in chosen]
    sets: dict[int, list[Pair]] = {}
    for place, turn in enumerate(sorted(range(32), key=lambda turn: (-weights[turn], turn))):
        j, r = divmod(place, 4)
        step = j if part_rows == 32 else j // 4 * 4 + (0, 2, 3, 1)[j % 4]
        sets[4 * step + (r if j % 2 == 0 else 3 - r)] = [(left.number, right.number) for left, right in chosen[turn]]
    return [pair for number in range(32) for pair in sets[number]]


def pairs_of(
    strip: NDArray[np.uint16], window: int, number: int, part_rows: int, band: int, group_values: int
) -> list[Pair] | None:
    """Pairs of one band of one window of a strip [128, K]."""
    rows = band_rows(part_rows, band)
    left_numbers, right_numbers = lists_of(window)
    lefts, rights = (
        [Column(c, position, rows_of(strip, window, number, rows, c)) for position, c in enumerate(numbers)]
        for numbers in (left_numbers, right_numbers)
    )
    if group_values == 2:
        return pair_in_groups(lefts, rights)
    pairs = match(lefts, rights)
    return None if pairs is None else arrange(pairs, part_rows)


def strips_of(bits: NDArray[np.uint16]) -> list[NDArray[np.uint16]]:
    """Strips [128, K] with zeros below the matrix."""
    whole = np.zeros((-(-bits.shape[0] // 128) * 128, bits.shape[1]), np.uint16)
    whole[: bits.shape[0]] = bits
    return [whole[first : first + 128] for first in range(0, len(whole), 128)]


def all_pairs(
    bits: NDArray[np.uint16], window: int, part_rows: int, group_values: int
) -> dict[tuple[int, int, int], list[Pair]] | None:
    """Pairs by strip, window and band; ``None`` if the columns of one do not pair up."""
    out = {}
    for strip_number, strip in enumerate(strips_of(bits)):
        for number in range(-(-bits.shape[1] // window)):
            for band in range(128 // part_rows):
                pairs = pairs_of(strip, window, number, part_rows, band, group_values)
                if pairs is None:
                    return None
                out[strip_number, number, band] = pairs
    return out


def tries(
    bits: NDArray[np.uint16], window: int | None, part_rows: int | None, group_values: int | None
) -> list[tuple[int, int, int]]:
    """The layouts that an encoder tries, in order: values of a group, rows of a band, window."""
    density = np.count_nonzero(bits & 0x7FFF) / bits.size
    out = []
    for values in (2, 4) if group_values is None else (group_values,):
        for rows in (64, 32) if part_rows is None else (part_rows,):
            for size in WINDOWS if window is None else (window,):
                if rows == 64 and part_rows is None and size < 248:
                    continue
                if values == 2 and group_values is None:
                    if size < 248 and window is None:
                        continue
                    if density * size > 0.27 * 128:
                        continue
                out.append((values, rows, size))
    return out


def encode(
    bits: NDArray[np.uint16],
    window: int | None = None,
    part_rows: int | None = None,
    group_values: int | None = None,
) -> Encoded | None:
    """All buffers of a matrix of 16-bit patterns; ``None`` if its columns do not pair up as required."""
    for values, rows, size in tries(bits, window, part_rows, group_values):
        pairs = all_pairs(bits, size, rows, values)
        if pairs is not None:
            return write(bits, size, rows, pairs, values)
    return None


def write(
    bits: NDArray[np.uint16],
    window: int,
    part_rows: int,
    pairs: dict[tuple[int, int, int], list[Pair]],
    group_values: int = 4,
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
    encoded = bitmap_reference.encode(stored, group_values)
    return Encoded(window, part_rows, group_values, slots[: bits.shape[0]], encoded, picks, columns)


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
    """Row and column, in a tile of the bitmap, of a row and slot in a tile of S."""
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
    assert (w.window, w.part_rows, w.group_values) == (want.window, want.part_rows, want.group_values)
    assert w.columns.ravel().tolist() == want.columns
    assert w.picks.ravel().tolist() == want.picks
    assert w.masks.ravel().tolist() == want.bitmap.masks
    assert w.values.ravel().tolist() == want.bitmap.values
    assert w.fronts.tolist() == want.bitmap.fronts
    assert w.places.ravel().tolist() == want.bitmap.places
    assert w.nnz == want.bitmap.nnz
