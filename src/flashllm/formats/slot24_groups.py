# SPDX-License-Identifier: Apache-2.0
"""Pairing of slot24 columns such that each group of four has at most two values; see docs/formats/slot24.md.

A group is two rows, eight apart, of two neighbouring slots: what a lane decodes at a time. With at most two values in
it, the lane loads two instead of four. So the encoder pairs columns evenly, a heavy left with a light right, and then
finds neighbours for the slots. These are two matchings, one after the other, by the same rules, which the docs page
fixes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.formats.slot24_matching import augment
from flashllm.formats.slot24_parts import Masks

ATTEMPTS = 8
"""Pairings that are tried for a problem: each attempt ranks its columns differently."""
_CAREFUL_ATTEMPTS = 6  # the first ones, which keep equal residues apart
_CLASSES = 4  # residues of lefts, and of rights, modulo 8
_LOW_BYTES: dict[int, Any] = {4: np.uint32(0x00FF00FF), 8: np.uint64(0x00FF00FF00FF00FF)}

Places = NDArray[np.int64]
"""[problems, 128]: places in the lists of lefts or of rights."""


def group_words(rows: Masks) -> tuple[Masks, Masks]:
    """Two words for the rows of every slot. The first word of one slot and the second word of another have a bit in
    common where the two slots together have more than two values in a group."""
    low, eight = _LOW_BYTES[rows.dtype.itemsize], rows.dtype.type(8)
    upper: Masks = rows & low
    lower: Masks = rows >> eight & low
    one, two = upper | lower, upper & lower
    return one | two << eight, two | one << eight


def pair_in_groups(
    lefts: Masks, rights: Masks, residues: tuple[NDArray[Any], NDArray[Any]]
) -> tuple[Places, Places] | None:
    """Places of the lefts and of the rights [problems, 128] in the order of the slots.

    ``lefts`` and ``rights`` are row masks [problems, 128]; ``residues`` are those of both lists modulo 4. Returns
    ``None`` if there is a problem for which no attempt succeeds.
    """
    order = np.empty((2, *lefts.shape), np.int64)
    open_problems = np.arange(len(lefts))
    for attempt in range(ATTEMPTS):
        here = lefts[open_problems], rights[open_problems]
        partner, found = match_evenly(*here, None, attempt)
        if not found.all():  # no other attempt would find more
            return None
        found, arranged = _arrange(*here, partner, residues, careful=attempt < _CAREFUL_ATTEMPTS)
        order[:, open_problems[found]] = arranged
        open_problems = open_problems[~found]
        if not len(open_problems):
            return order[0], order[1]
    return None


def ranks(weights: NDArray[np.int64], attempt: int) -> NDArray[np.int64]:
    """Places from light to heavy [problems, n]; later attempts count some columns as up to three elements heavier."""
    shift = (np.arange(weights.shape[1]) * (2 * attempt + 1) >> 3 & 3) if attempt else np.int64(0)
    return np.argsort(weights + shift, axis=1, kind="stable")


def match_evenly(
    lefts: Masks, rights: Masks, kinds: tuple[NDArray[np.int64], NDArray[np.int64]] | None, attempt: int
) -> tuple[Places, NDArray[np.bool_]]:
    """The right of each left [problems, n], and the problems in which every left has one.

    A left and a right fit if their masks have no bit in common and, where ``kinds`` is given, their kinds differ.
    """
    sides = lefts, rights
    count, size = lefts.shape
    weights = [np.bitwise_count(side).astype(np.int64) for side in sides]
    light = [ranks(weight, attempt) for weight in weights]
    heaviest = np.argsort(-np.concatenate(weights, axis=1), axis=1, kind="stable")
    free = [np.ones((count, size), np.bool_) for _ in sides]
    partner = np.full((count, size), -1, np.int64)
    for turn in range(2 * size):
        side_of, place_of = np.divmod(heaviest[:, turn], size)
        for side in range(2):
            which = np.flatnonzero(side_of == side)
            which = which[free[side][which, place_of[which]]]
            place = place_of[which]
            other = light[1 - side][which]
            fits = (sides[1 - side][which[:, None], other] & sides[side][which, place][:, None]) == 0
            if kinds is not None:
                fits &= kinds[1 - side][which[:, None], other] != kinds[side][which, place][:, None]
            fits &= free[1 - side][which[:, None], other]
            rank = fits.argmax(axis=1)
            found = fits[np.arange(len(which)), rank]
            which, place, taken = which[found], place[found], other[found, rank[found]]
            free[side][which, place] = free[1 - side][which, taken] = False
            partner[which, place if side == 0 else taken] = taken if side == 0 else place
    whole: NDArray[np.bool_] = np.asarray((partner >= 0).all(axis=1))
    for problem in np.flatnonzero(~whole):
        fits = (lefts[problem][:, None] & rights[problem]) == 0
        if kinds is not None:
            fits &= kinds[0][problem][:, None] != kinds[1][problem]
        left_order = [int(place) for place in heaviest[problem] if place < size]
        whole[problem] = augment(fits, left_order, partner[problem])
    return partner, whole


def _arrange(
    lefts: Masks,
    rights: Masks,
    partner: Places,
    residues: tuple[NDArray[Any], NDArray[Any]],
    *,
    careful: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The problems in which all slots find neighbours, and their places [2, such problems, 128] in slot order."""
    first, second = group_words(lefts | np.take_along_axis(rights, partner, axis=1))
    left_residue, right_residue = np.asarray(residues[0], np.int64), np.asarray(residues[1], np.int64)[partner]
    even, odd = (np.flatnonzero(left_residue % 2 == parity) for parity in range(2))
    kinds = (right_residue[:, even], right_residue[:, odd]) if careful else None
    neighbour, found = match_evenly(first[:, even], second[:, odd], kinds, 0)
    out = []
    for problem in np.flatnonzero(found):
        quads = np.stack([even, odd[neighbour[problem]]], axis=1)
        out.append(quads[_sets(left_residue[quads], right_residue[problem][quads])].ravel())
    slots = np.array(out, np.int64).reshape(-1, lefts.shape[1])
    return found, np.stack([slots, np.take_along_axis(partner[found], slots, axis=1)])


def _sets(lefts: NDArray[np.int64], rights: NDArray[np.int64]) -> list[int]:
    """The order of pairs of neighbours in which two make a set of four slots; takes the residues of both sides [64, 2].

    Each pair, in turn, takes the next one that has exactly the other residues, so that the eight residues of a set
    differ. Pairs for which there is none come last.
    """
    have = 1 << lefts | 1 << _CLASSES + rights
    have = have[:, 0] | have[:, 1]
    waiting: dict[int, list[int]] = {}
    order, rest = [], []
    used = [False] * len(have)
    for quad, kind in enumerate(have.tolist()):
        waiting.setdefault(kind, []).append(quad)
    for quad, kind in enumerate(have.tolist()):
        if used[quad]:
            continue
        used[quad] = True
        others = waiting.get(0xFF ^ kind, [])
        other = next((place for place in others if not used[place]), None)
        if other is None:
            rest.append(quad)
        else:
            used[other] = True
            order += [quad, other]
    return order + rest
