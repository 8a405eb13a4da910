# SPDX-License-Identifier: Apache-2.0
"""The part of a matching that slot24's two ways of pairing columns share; see docs/formats/slot24.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def augment(fits: NDArray[np.bool_], left_order: Sequence[int], partner: NDArray[np.int64]) -> bool:
    """Give every left of one problem a right that ``fits`` [lefts, rights], along alternating paths.

    ``partner`` holds the right of each left, -1 where it has none, and is updated. False if some left cannot get one.
    """
    size = len(fits)
    octets = np.packbits(fits, axis=1, bitorder="little")
    reaches = [int.from_bytes(row.tobytes(), "little") for row in octets]
    pairs = partner.tolist()
    owner = [-1] * size
    for left, right in enumerate(pairs):
        if right >= 0:
            owner[right] = left
    free = sum(1 << right for right, left in enumerate(owner) if left < 0)
    for start in left_order:
        if pairs[start] >= 0:
            continue
        unseen = (1 << size) - 1
        queue, parent = [start], [-1] * size
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
