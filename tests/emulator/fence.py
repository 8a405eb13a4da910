# SPDX-License-Identifier: Apache-2.0
"""Arrays surrounded by elements that must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GUARD = 1 << 17  # elements: more than a whole block writes
NAN = 0x7FDA


class Fence:
    """A copy of 16-bit or 32-bit elements between NaNs, at an address that is a multiple of 16."""

    def __init__(self, inner: NDArray[Any]) -> None:
        size, guard = inner.nbytes // 2, GUARD
        room = np.full(size + 2 * guard + 16, NAN, np.uint16)
        start = guard + (-(room.ctypes.data // 2 + guard)) % 8
        self._before, self._after = room[:start], room[start + size :]
        self.inner = room[start : start + size].view(inner.dtype).reshape(inner.shape)
        self.inner[...] = inner
        assert self.inner.ctypes.data % 16 == 0

    def check(self) -> None:
        assert (self._before == NAN).all(), "written before the array"
        assert (self._after == NAN).all(), "written behind the array"
