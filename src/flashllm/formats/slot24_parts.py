# SPDX-License-Identifier: Apache-2.0
"""The two shapes that a part of a slot24 tile may have: where rows, slots and columns go; see docs/formats/slot24.md.

A *band* is the rows of a tile that pair their columns alike. Bands of 32 rows are the four parts of a bitmap. A band of
64 has two parts, each of which has half of the band's slots: there the bitmap is of a matrix S' whose tiles hold the
slots of S in another order. Only this module and ``slot24::Bands`` in cuda/flashllm/slot24.cuh know that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, brief
from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.check import is_int
from flashllm.formats.tiles import TILE_K, TILE_M

STEP_PAIRS = LANES // 2
"""Pairs of a step: the slots that one instruction multiplies; each lane has one column of a pair."""
STEPS = TILE_K // STEP_PAIRS
"""Steps of a tile."""

_Item = TypeVar("_Item", np.uint16, np.bool_)
Masks = NDArray[np.unsignedinteger[Any]]
"""For each column, its rows: one bit for each row of a band."""
Columns = NDArray[np.uint8]
"""Window-relative columns of the pairs of a strip: [bands, windows, 128], lefts or rights."""


@dataclass(frozen=True)
class Parts:
    """Parts that are ``rows`` high: 32 or 64."""

    rows: int

    @property
    def bands(self) -> int:
        """Bands of a tile."""
        return TILE_M // self.rows

    @property
    def halves(self) -> int:
        """Parts of a band, which divide its steps between them."""
        return PARTS // self.bands

    @property
    def steps(self) -> int:
        """Steps of a part."""
        return STEPS // self.halves

    @property
    def step_order(self) -> tuple[int, ...]:
        """Steps of a tile from heavy to light pairs: of two halves, one gets the first and last, the other the rest."""
        return (0, 1, 2, 3) if self.halves == 1 else (0, 2, 3, 1)

    @property
    def split_rows(self) -> tuple[int, int, int]:
        """The rows of a tile split as (runs of a band, bands, rows of a run): index 1 selects the band."""
        run = 16 if self.halves == 1 else self.rows
        return self.rows // run, self.bands, run

    @cached_property
    def band_of_row(self) -> NDArray[np.int64]:
        """Band [128] of each row of a tile."""
        run = self.split_rows[2]
        return np.arange(TILE_M) // run % self.bands

    def band_masks(self, masks: NDArray[np.uint32]) -> Masks:
        """The masks [bands, columns], from the masks [4, columns] of bands of 32 rows."""
        if self.halves == 1:
            return masks
        # Half word i of mask f: rows 64 i + 16 f .. 64 i + 16 f + 15.
        words = np.ascontiguousarray(masks, "<u4").view("<u2").reshape(PARTS, -1, self.bands)
        tall = np.ascontiguousarray(words.transpose(2, 1, 0)).reshape(self.bands, -1).view("<u8")
        return tall.astype(np.uint64, copy=False)

    def stored(self, slots: NDArray[_Item]) -> NDArray[_Item]:
        """S' from whole tiles of slots S [128, tiles * 64]."""
        if self.halves == 1:
            return slots
        # Row 64 r + 32 w + 16 i + a, slot 32 h + 16 v + q -> row 64 i + 32 r + 16 h + a, slot 32 v + 16 w + q.
        split = slots.reshape(2, 2, 2, 16, -1, 2, 2, STEP_PAIRS)
        return np.ascontiguousarray(split.transpose(2, 0, 5, 3, 4, 6, 1, 7)).reshape(slots.shape)

    def restored(self, stored: NDArray[_Item]) -> NDArray[_Item]:
        """The inverse of :meth:`stored`."""
        if self.halves == 1:
            return stored
        split = stored.reshape(2, 2, 2, 16, -1, 2, 2, STEP_PAIRS)
        return np.ascontiguousarray(split.transpose(1, 6, 0, 3, 4, 2, 5, 7)).reshape(stored.shape)

    def place(self, row: int, slot: int) -> tuple[int, int]:
        """Row and slot in S' of one slot of S; the row counts within the tile."""
        if self.halves == 1:
            return row, slot
        r, w, i, a = row // 64, row // 32 % 2, row // 16 % 2, row % 16
        h, v, q = slot // 32 % 2, slot // 16 % 2, slot % 16
        return 64 * i + 32 * r + 16 * h + a, slot // TILE_K * TILE_K + 32 * v + 16 * w + q

    def pack_columns(self, lefts: Columns, rights: Columns) -> Columns:
        """The list [tiles, 4, 32, steps] of the columns of pairs."""
        steps = np.stack([lefts, rights], axis=-1).reshape(self.bands, -1, self.halves, self.steps, LANES)
        return np.ascontiguousarray(steps.transpose(1, 0, 2, 4, 3)).reshape(-1, PARTS, LANES, self.steps)

    def unpack_columns(self, columns: Columns) -> Columns:
        """Window-relative columns [bands, slots, 2] of the left and the right of each slot in a row of tiles."""
        split = columns.reshape(-1, self.bands, self.halves, LANES, self.steps)
        return np.ascontiguousarray(split.transpose(1, 0, 2, 4, 3)).reshape(self.bands, -1, 2)

    def byte_of_column(self, tile: int, band: int, slot: int, side: int) -> int:
        """Index in ``columns`` of one side of a slot, which is counted from the first slot of ``tile``."""
        step, pair = divmod(slot, STEP_PAIRS)
        part, inside = divmod(step % STEPS, self.steps)
        lane = 2 * pair + side
        return (((tile + step // STEPS) * PARTS + band * self.halves + part) * LANES + lane) * self.steps + inside

    def word_of_pick(self, tile: int, row: int, slot: int) -> int:
        """Index in ``picks`` of the word with the bit of a slot (counted as above) in a row of the tiles."""
        row, slot = self.place(row, slot)
        step, pair = divmod(slot, STEP_PAIRS)
        lane = row % 8 * 4 + step % 2 * 2 + pair // (STEP_PAIRS // 2)
        return (((tile + step // STEPS) * PARTS + row // 16 % PARTS) * LANES + lane) * 2 + step % STEPS // 2

    def word_of_mask(self, tile: int, row: int, slot: int) -> int:
        """Index in ``masks`` of the word with the bit of a slot (counted as above) in a row of the tiles."""
        row, slot = self.place(row, slot)
        step, pair = divmod(slot, STEP_PAIRS)
        lane = row % 8 * 4 + pair % 8 // 2
        return (((tile + step // STEPS) * PARTS + row // 16 % PARTS) * LANES + lane) * 2 + step % STEPS // 2


PARTS_OF = {rows: Parts(rows) for rows in (32, 64)}
"""All shapes of parts that the format has, by their rows."""


def legal_part_rows(rows: object) -> bool:
    """Whether parts may have ``rows`` rows."""
    return is_int(rows) and rows in PARTS_OF


def check_part_rows(rows: int | None) -> None:
    """Raise ``ArgumentError`` unless ``rows`` is ``None`` or a number of rows that parts may have."""
    if rows is not None and not legal_part_rows(rows):
        raise ArgumentError("part_rows", expected="None, 32 or 64", got=brief(rows))
