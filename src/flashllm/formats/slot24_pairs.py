# SPDX-License-Identifier: Apache-2.0
"""Which columns of a window share a slot: the pairing of slot24 on the CPU; see docs/formats/slot24.md.

The rows of a strip fall into bands of 32 or 64 rows. A *problem* is one band of one window: 128 left and 128 right
columns, each a mask of the band's rows. A left and a right may pair where no row has both. The docs page fixes every
choice made here, so that another encoder can give the same bytes.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, brief
from flashllm.formats.bitmap_encode import PARTS
from flashllm.formats.check import is_int
from flashllm.formats.slot24_parts import PARTS_OF, STEPS, Columns, Masks, Parts
from flashllm.formats.tiles import TILE_M

PAIRS = 128
"""Pairs, and so slots, of a window."""
MIN_WINDOW, MAX_WINDOW = PAIRS, 2 * PAIRS
RESIDUES = 8
"""Columns of a set have different numbers modulo this; the lower half of the residues are lefts."""
SETS = 4
"""Sets of a step, and pairs of a set."""
WINDOWS = (256, 248, 240, 232, 224, 216, 208, 192, 176, 160, 144, 128)
"""Window sizes that are tried, in this order."""
_LEAST_TALL_WINDOW = 248
"""Parts of 64 rows are only tried from here on where the encoder has the choice: see :func:`tried`."""
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

    Copies run through the residues to and fro: dummies take their partners by weight, and were one residue to get
    the heavy ones, the streams of its slots would outrun all others.
    """
    real = np.arange(window).reshape(-1, 2, _CLASSES)
    lefts = np.empty(((MAX_WINDOW - window) // RESIDUES, _CLASSES), np.int64)
    lefts[0::2] = np.arange(_CLASSES)
    lefts[1::2] = np.arange(_CLASSES)[::-1]
    lefts += window
    sides = (real[:, 0], lefts), (real[:, 1], lefts + _CLASSES)
    left, right = (np.concatenate(side).ravel().astype(np.uint8) for side in sides)
    return left, right


def tried(window: int | None, part_rows: int | None) -> list[tuple[Parts, int]]:
    """Shapes of parts and windows that an encoder tries, in this order, when these are given.

    Parts of 64 rows halve what a kernel gathers, 64 of 425 wavefronts of a tile at the least. So they come first, but
    not in windows that make more than 7 % more tiles of it than parts of 32 rows would.
    """
    windows = WINDOWS if window is None else (window,)
    if part_rows is not None:
        return [(PARTS_OF[part_rows], size) for size in windows]
    tall = [(PARTS_OF[64], size) for size in windows if size >= _LEAST_TALL_WINDOW]
    return [*tall, *((PARTS_OF[32], size) for size in windows)]


def column_masks(stored: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[4, K]: for every column the rows of each band of 32 that are ``stored`` [up to 128, K], a bit per row."""
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
        if not _augment(lefts[problem], rights[problem], left_order[problem], partner[problem]):
            return None
    return partner


def _augment(lefts: Masks, rights: Masks, left_order: NDArray[np.int64], partner: NDArray[np.int64]) -> bool:
    """Give every left of one problem a partner along alternating paths; False when one has none."""
    octets = np.packbits((lefts[:, None] & rights) == 0, axis=1, bitorder="little")
    reaches = [int.from_bytes(row.tobytes(), "little") for row in octets]
    pairs = partner.tolist()
    owner = [-1] * PAIRS
    for left, right in enumerate(pairs):
        if right >= 0:
            owner[right] = left
    free = sum(1 << right for right, left in enumerate(owner) if left < 0)
    for start in left_order.tolist():
        if pairs[start] >= 0:
            continue
        unseen = (1 << PAIRS) - 1
        queue, parent = [start], [-1] * PAIRS
        for left in queue:
            reach = reaches[left] & unseen
            if ends := reach & free:
                right = (ends & -ends).bit_length() - 1
                free ^= 1 << right
                while right >= 0:  # a left on the path gives its right to the one before it
                    pairs[left], owner[right], right = right, left, pairs[left]
                    left = parent[right] if right >= 0 else left
                break
            unseen ^= reach
            while reach:
                right = (reach & -reach).bit_length() - 1
                parent[right] = left
                queue.append(owner[right])
                reach &= reach - 1
        else:
            return False
    partner[:] = pairs
    return True


def arrange(problems: Problems, partner: NDArray[np.int64], window: int, parts: Parts) -> NDArray[np.int64]:
    """Left list positions [problems, 128] in the order of the slots: 32 sets of columns with 8 different residues.

    Heavy pairs come first. So the pairs of a set weigh about the same, and the streams of values that pass through
    them go on at one speed; every second step is filled from its last set, since a lane reads every other set. Where
    two parts share the steps of a tile, one has the heaviest and the lightest of them.
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
    out = np.empty((len(partner), sets.size, _CLASSES), np.int64)
    for place in sets.ravel():
        chosen = kinds[counts[:, kinds].min(axis=2).argmax(axis=1)]
        out[:, place] = by_kind[number, following[number, chosen]]
        following[number, chosen] += 1
        counts[number, chosen] -= 1
    return out.reshape(partner.shape)


def pair_up(masks: Masks, window: int, parts: Parts) -> tuple[Columns, Columns] | None:
    """Window-relative left and right columns, each [bands, windows, 128] in the order of the slots.

    For column masks [bands, K]; ``None`` when a window of some band cannot be paired up.
    """
    problems = problems_of(masks, window)
    partner = match(problems)
    if partner is None:
        return None
    order = arrange(problems, partner, window, parts)
    lefts, rights = column_lists(window)
    shape = (len(masks), -1, PAIRS)
    return lefts[order].reshape(shape), rights[np.take_along_axis(partner, order, axis=1)].reshape(shape)


def has_lonely_column(masks: Masks, window: int) -> bool:
    """Whether one of the heaviest columns of some problem fits none of the other side: then nothing pairs up."""
    sides = problems_of(masks, window)
    for side, other in (sides, sides[::-1]):
        heaviest = np.argpartition(-np.bitwise_count(side).astype(np.int8), _HEAVIEST, axis=1)[:, :_HEAVIEST]
        for rank in range(_HEAVIEST):
            column = np.take_along_axis(side, heaviest[:, rank, None], axis=1)
            if not ((column & other) == 0).any(axis=1).all():
                return True
    return False


def check_window(window: int | None) -> None:
    """``ArgumentError`` unless ``window`` is ``None`` or a size that the format has."""
    if window is not None and not legal_window(window):
        raise ArgumentError("window", expected=f"None or {LEGAL_WINDOW}", got=brief(window))
