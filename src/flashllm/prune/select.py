# SPDX-License-Identifier: Apache-2.0
"""Chooses exactly ``count`` elements of smallest score; among equals the first, so that NumPy and CuPy agree."""

from __future__ import annotations

from typing import Any

from flashllm.errors import ArgumentError
from flashllm.formats.sources import array_module


def smallest(scores: Any, count: int) -> Any:
    """A mask of the ``count`` smallest of ``scores``, of any shape; NaN is the largest."""
    if not 0 <= count <= scores.size:
        raise ArgumentError("count", expected=f"0..{scores.size}", got=str(count))
    xp = array_module(scores)
    flat = scores.reshape(-1)
    return _rows(flat[None], count, xp).reshape(scores.shape)


def smallest_of_rows(scores: Any, count: int) -> Any:
    """A mask of the ``count`` smallest of every row of ``scores`` [M, K]; NaN is the largest."""
    if not 0 <= count <= scores.shape[1]:
        raise ArgumentError("count", expected=f"0..{scores.shape[1]}", got=str(count))
    return _rows(scores, count, array_module(scores))


def _rows(scores: Any, count: int, xp: Any) -> Any:
    if count == 0:
        return xp.zeros(scores.shape, bool)
    last = xp.partition(scores, count - 1, axis=1)[:, count - 1 : count]
    below, ties = scores < last, scores == last
    undecided = xp.isnan(last)  # so many NaN that some must be chosen
    if undecided.any():
        below, ties = below | (undecided & ~xp.isnan(scores)), ties | (undecided & xp.isnan(scores))
    missing = count - below.sum(axis=1, keepdims=True)
    return below | (ties & (xp.cumsum(ties, axis=1) <= missing))
