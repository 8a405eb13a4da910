# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL written a second time, element by element, from docs/formats/tiled_csl.md alone.

Slow and simple on purpose; imports nothing from the package, so that it is independent of the encoders it checks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def place_of(row: int, column: int) -> int:
    """Location of an element by its row and column in a tile."""
    chunk, inside = divmod(column, 8)
    return 64 * row + 8 * (chunk ^ (row % 8)) + inside


def bank_of(location: int) -> int:
    """Shared-memory bank (4 bytes wide) of a location when the tile starts at bank 0."""
    return (location * 2 // 4) % 32


def encode(bits: NDArray[np.uint16], order: str) -> tuple[list[int], list[int]]:
    """(words, tile offsets) of a matrix of 16-bit patterns."""
    rows, columns = bits.shape
    words: list[int] = []
    offsets = [0]
    for top in range(0, rows, 128):
        for left in range(0, columns, 64):
            tile = np.zeros((128, 64), np.uint16)
            part = bits[top : top + 128, left : left + 64]
            tile[: part.shape[0], : part.shape[1]] = part
            words += encode_tile(tile, order)
            offsets.append(len(words) // 4)
    return words, [*offsets, offsets[-1]]


def encode_tile(tile: NDArray[np.uint16], order: str) -> list[int]:
    """Words of one 128 x 64 tile."""
    value_at = {place_of(row, column): int(tile[row, column]) & 0xFFFF for row in range(128) for column in range(64)}
    value_at = {place: 0 if value in (0x0000, 0x8000) else value for place, value in value_at.items()}
    missing = -sum(value != 0 for value in value_at.values()) % 4
    if order == "row":
        places = [place_of(row, column) for row in range(128) for column in range(64)]
        chosen = [p for p in places if value_at[p]] + [p for p in places if not value_at[p]][:missing]
        return [place << 16 | value_at[place] for place in chosen]
    places = sorted(value_at, key=lambda p: (bank_of(p), p))
    zeros = [p for p in places if not value_at[p]][:missing]
    chosen = [p for p in places if value_at[p] or p in zeros]
    lists = [[p for p in chosen if bank_of(p) == bank] for bank in range(32)]
    full = 4 * (len(chosen) // 128)
    tail = len(chosen) % 128 // 4
    clean = min([full, *map(len, lists)])
    slots = [(number, lane) for lane in range(32) for number in range(clean, full + (4 if lane < tail else 0))]
    rest = [p for bank in lists for p in bank[clean:]]
    assert len(slots) == len(rest)
    at = dict(zip(slots, rest, strict=True))
    at |= {(number, bank): lists[bank][number] for bank in range(32) for number in range(clean)}
    out = [0] * len(chosen)
    for (number, lane), place in at.items():
        out[number // 4 * 128 + lane * 4 + number % 4] = place << 16 | value_at[place]
    return out


def rounds(words: NDArray[np.uint32]) -> list[list[int]]:
    """Banks of the words that each warp-wide 2-byte store of a tile writes, round by round."""
    out = []
    for start in range(0, len(words), 128):
        group = words[start : start + 128]
        out += [[bank_of(int(word) >> 16) for word in group[v::4]] for v in range(4)]
    return [banks for banks in out if banks]


def wavefronts(words: NDArray[np.uint32]) -> int:
    """Shared-memory passes of a tile's stores: per round as many as its busiest bank has words."""
    return sum(max(map(banks.count, set(banks))) for banks in rounds(words))
