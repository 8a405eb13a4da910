# SPDX-License-Identifier: Apache-2.0
"""Which columns of a window share a slot: the pairing of slot24 on the CPU; see docs/formats/slot24.md.

The rows of a strip fall into bands of 32 or 64 rows. A *problem* is one band of one window: 128 left and 128 right
columns, each a mask of the band's rows. A left and a right may pair if no row has an element in both. The docs page
fixes every choice made here, so that another encoder can produce the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, brief
from flashllm.formats.bitmap_encode import PARTS
from flashllm.formats.check import is_int
from flashllm.formats.slot24_groups import pair_in_groups
from flashllm.formats.slot24_matching import augment
from flashllm.formats.slot24_parts import PARTS_OF, STEPS, Columns, Masks, Parts
from flashllm.formats.tiles import TILE_M

PAIRS = 128
"""Pairs, and so slots, of a window."""
MIN_WINDOW, MAX_WINDOW = PAIRS, 2 * PAIRS
RESIDUES = 8
"""Columns of a set have different numbers modulo this; those in the lower half of the residues are lefts."""
SETS = 4
"""Sets of a step, and pairs of a set."""
WINDOWS = (256, 248, 240, 232, 224, 216, 208, 192, 176, 160, 144, 128)
"""Window sizes that are tried, in this order."""
GROUP_VALUES = (2, 4)
"""How many values a group may have, in the order in which they are tried."""
_GROUP_DENSITY = 0.27
"""Density of slots up to which random slots find neighbours such that groups have at most two values."""
_LARGE_WINDOW = 248
"""From this size on, groups of two values and parts of 64 rows are tried where the encoder has the choice."""
LEGAL_WINDOW = f"a multiple of {RESIDUES} in {MIN_WINDOW}..{MAX_WINDOW}"
"""What :func:`legal_window` accepts, for messages."""

_CLASSES = RESIDUES // 2
_SIGMAS = np.array(list(permutations(range(_CLASSES))))  # [24, 4], lexicographic
_HEAVIEST = 4

Problems = tuple[Masks, Masks]
"""Row masks of the lefts and of the rights, each [problems, 128] by list position."""


def legal_window(window: object) -> bool:
    """Whether ``window`` is a multiple of 8 in 128..256."""
    return is_int(window) and MIN_WINDOW <= window <= MAX_WINDOW and window % RESIDUES == 0


@cache
def column_lists(window: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Window-relative columns [128] of the lefts and of the rights: real ones, then the copies of the dummies.

    Successive copies run through the residues in alternating directions: dummies get their partners by weight, and if
    one residue got all the heavy ones, the streams of its slots would outrun all others.
    """
    real = np.arange(window).reshape(-1, 2, _CLASSES)
    lefts = np.empty(((MAX_WINDOW - window) // RESIDUES, _CLASSES), np.int64)
    lefts[0::2] = np.arange(_CLASSES)
    lefts[1::2] = np.arange(_CLASSES)[::-1]
    lefts += window
    sides = (real[:, 0], lefts), (real[:, 1], lefts + _CLASSES)
    left, right = (np.concatenate(side).ravel().astype(np.uint8) for side in sides)
    return left, right


@dataclass(frozen=True)
class Arrangement:
    """What an encoder may choose: the shape of parts, the window, and how many values a group may have."""

    parts: Parts
    window: int
    group_values: int


def tried(window: int | None, part_rows: int | None, group_values: int | None, density: float) -> list[Arrangement]:
    """What an encoder tries, in this order, for a matrix of this density; an argument of ``None`` is left open.

    Groups of two values save a kernel a third of its decoding, so they come first, but not in windows that make more
    than 3 % more tiles, nor where slots are too full for them to have a chance. Parts of 64 rows halve what the kernel
    gathers, which is at least a tenth of the shared memory's work, so they come before parts of 32, but not in windows
    that make more than 7 % more tiles than parts of 32 would.
    """
    windows = WINDOWS if window is None else (window,)
    large = tuple(size for size in windows if size >= _LARGE_WINDOW)
    few = windows if window is not None else large
    found = []
    for values in GROUP_VALUES if group_values is None else (group_values,):
        for rows in (64, 32) if part_rows is None else (part_rows,):
            sizes = large if rows == 64 and part_rows is None else windows
            if values == 2 and group_values is None:
                sizes = tuple(size for size in sizes if size in few and density * size <= _GROUP_DENSITY * PAIRS)
            found += [Arrangement(PARTS_OF[rows], size, values) for size in sizes]
    return found


def column_masks(stored: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[4, K]: for each band of 32 rows and each column, the rows that are ``stored`` [up to 128, K], a bit per row."""
    rows = np.zeros((TILE_M, stored.shape[1]), np.bool_)
    rows[: len(stored)] = stored
    octets = np.packbits(rows.reshape(2, PARTS, 2, 8, -1), axis=3, bitorder="little")[:, :, :, 0]
    masks = np.ascontiguousarray(octets.transpose(1, 3, 0, 2)).reshape(-1).view("<u4")
    return masks.astype(np.uint32, copy=False).reshape(PARTS, -1)


def problems_of(masks: Masks, window: int) -> Problems:
    """The problems of column masks [bands, K]; problem number = band * windows + window."""
    columns = masks.shape[-1]
    windows = -(-columns // window)
    whole = np.zeros((len(masks), windows * window), masks.dtype)
    whole[:, :columns] = masks
    split = whole.reshape(-1, window // RESIDUES, 2, _CLASSES)
    both = np.zeros((2, len(split), PAIRS), masks.dtype)
    for side in range(2):
        both[side, :, : window // 2] = split[:, :, side].reshape(len(split), -1)
    return both[0], both[1]


def match(problems: Problems) -> NDArray[np.int64] | None:
    """List position [problems, 128] of the right that each left pairs with; ``None`` when one cannot be matched."""
    lefts, rights = problems
    left_order, right_order = (np.argsort(-np.bitwise_count(side).astype(np.int8), kind="stable") for side in problems)
    probes = np.take_along_axis(lefts, left_order, axis=1)
    ordered = np.take_along_axis(rights, right_order, axis=1)
    free = np.ones(ordered.shape, np.bool_)
    number = np.arange(len(lefts))
    partner = np.full(lefts.shape, -1, np.int64)
    for turn in range(PAIRS):
        fits = (ordered & probes[:, turn, None]) == 0
        fits &= free
        at = fits.argmax(axis=1)
        found = fits[number, at]
        which, at = number[found], at[found]
        free[which, at] = False
        partner[which, left_order[found, turn]] = right_order[found, at]
    for problem in np.flatnonzero((partner < 0).any(axis=1)):
        fits = (lefts[problem][:, None] & rights[problem]) == 0
        if not augment(fits, left_order[problem].tolist(), partner[problem]):
            return None
    return partner


def arrange(problems: Problems, partner: NDArray[np.int64], window: int, parts: Parts) -> NDArray[np.int64]:
    """Left list positions [problems, 128] in the order of the slots: 32 sets of columns with 8 different residues.

    Sets are formed from heavy pairs first, so that the pairs of a set weigh about the same, and then placed by their
    weight. A stream of values passes through one set of every step, so every second step is filled from its last set,
    and all streams advance at one speed. Where two parts share the steps of a tile, one part has the heaviest and the
    lightest of them.
    """
    lefts, rights = column_lists(window)
    kind = (lefts % _CLASSES) * np.int64(_CLASSES) + rights[partner] % _CLASSES
    weight = np.bitwise_count(problems[0] | np.take_along_axis(problems[1], partner, axis=1)).astype(np.int8)
    by_kind = np.lexsort((-weight, kind), axis=1)
    counts = (kind[:, :, None] == np.arange(_CLASSES**2)).sum(axis=1)
    following = np.cumsum(counts, axis=1) - counts
    number = np.arange(len(partner))[:, None]
    kinds = np.arange(_CLASSES) * _CLASSES + _SIGMAS
    sets = np.arange(PAIRS // _CLASSES).reshape(-1, STEPS, SETS)[:, parts.step_order].reshape(-1, SETS)
    sets[1::2] = sets[1::2, ::-1]
    found = np.empty((len(partner), sets.size, _CLASSES), np.int64)
    for turn in range(sets.size):
        chosen = kinds[counts[:, kinds].min(axis=2).argmax(axis=1)]
        found[:, turn] = by_kind[number, following[number, chosen]]
        following[number, chosen] += 1
        counts[number, chosen] -= 1
    weights = weight[number, found.reshape(partner.shape)].reshape(found.shape).sum(axis=2, dtype=np.int64)
    heavy_first = np.argsort(-weights, axis=1, kind="stable")
    out = np.empty_like(found)
    out[:, sets.ravel()] = np.take_along_axis(found, heavy_first[:, :, None], axis=1)
    return out.reshape(partner.shape)


def pair_up(masks: Masks, how: Arrangement) -> tuple[Columns, Columns] | None:
    """Window-relative left and right columns, each [bands, windows, 128] in the order of the slots.

    ``masks`` are column masks [bands, K]. Returns ``None`` if a window of some band cannot be paired up.
    """
    problems = problems_of(masks, how.window)
    lefts, rights = column_lists(how.window)
    if how.group_values == 2:
        places = pair_in_groups(*problems, (lefts % _CLASSES, rights % _CLASSES))
    else:
        partner = match(problems)
        if partner is None:
            return None
        order = arrange(problems, partner, how.window, how.parts)
        places = order, np.take_along_axis(partner, order, axis=1)
    if places is None:
        return None
    shape = (len(masks), -1, PAIRS)
    return lefts[places[0]].reshape(shape), rights[places[1]].reshape(shape)


def has_lonely_column(masks: Masks, window: int) -> bool:
    """Whether one of the heaviest columns of some problem fits none of the other side, so that pairing must fail."""
    sides = problems_of(masks, window)
    for side, other in (sides, sides[::-1]):
        heaviest = np.argpartition(-np.bitwise_count(side).astype(np.int8), _HEAVIEST, axis=1)[:, :_HEAVIEST]
        for rank in range(_HEAVIEST):
            column = np.take_along_axis(side, heaviest[:, rank, None], axis=1)
            if not ((column & other) == 0).any(axis=1).all():
                return True
    return False


def legal_group_values(values: object) -> bool:
    """Whether ``values`` is a legal limit for the values of a group."""
    return is_int(values) and values in GROUP_VALUES


def check_group_values(values: int | None) -> None:
    """Raise ``ArgumentError`` unless ``values`` is ``None`` or a limit that the format has."""
    if values is not None and not legal_group_values(values):
        raise ArgumentError("group_values", expected="None, 2 or 4", got=brief(values))


def check_window(window: int | None) -> None:
    """Raise ``ArgumentError`` unless ``window`` is ``None`` or a size that the format has."""
    if window is not None and not legal_window(window):
        raise ArgumentError("window", expected=f"None or {LEGAL_WINDOW}", got=brief(window))
