# SPDX-License-Identifier: Apache-2.0
"""The 2:4 pattern, which sparse tensor cores multiply: at most two values in every four neighbouring columns."""

from __future__ import annotations

from typing import Any

from flashllm.baselines.csr import check_dense
from flashllm.errors import ArgumentError

GROUP = 4
"""Neighbours along K in a group."""
KEPT = 2
"""How many of them may be values."""
_STRIP_ELEMENTS = 1 << 26


def is_two_of_four(dense: Any) -> bool:
    """Whether every group of a C-contiguous float16 array [M, K], K a multiple of 4, has at most two values."""
    xp = check_dense(dense)
    return all(bool((xp.count_nonzero(part.reshape(-1, GROUP), axis=1) <= KEPT).all()) for part in _strips(dense))


def keep_two_of_four(dense: Any) -> Any:
    """A copy of ``dense`` with zeros but for the two largest magnitudes of every group, the first among equals.

    Raises :class:`ArgumentError` unless ``dense`` is C-contiguous float16 [M, K], NumPy or CuPy, with K a multiple of
    4.
    """
    xp = check_dense(dense)
    if dense.shape[1] % GROUP:
        raise ArgumentError("dense", expected=f"K a multiple of {GROUP}", got=f"shape {list(dense.shape)}")
    out = xp.empty_like(dense)
    for part, kept in zip(_strips(dense), _strips(out), strict=True):
        groups = abs(part.reshape(-1, GROUP))
        groups[xp.isnan(groups)] = xp.inf  # which can be compared
        result = kept.reshape(-1, GROUP)
        for i in range(GROUP):
            before = sum((groups[:, j] >= groups[:, i]).astype(xp.int8) for j in range(i))
            after = sum((groups[:, j] > groups[:, i]).astype(xp.int8) for j in range(i + 1, GROUP))
            result[:, i] = xp.where(before + after < KEPT, part.reshape(-1, GROUP)[:, i], xp.float16(0))
    return out


def _strips(dense: Any) -> list[Any]:
    rows = max(1, _STRIP_ELEMENTS // dense.shape[1])
    return [dense[first : first + rows] for first in range(0, dense.shape[0], rows)]
