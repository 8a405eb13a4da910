# SPDX-License-Identifier: Apache-2.0
"""The methods: which elements of a matrix become zeros, and what happens to the others.

- ``magnitude``: those of smallest magnitude in the whole matrix, or in every row.
- ``wanda``: those of smallest |w| * ||x_j|| in every row (Sun et al., "A simple and effective pruning approach for
  large language models", ICLR'24, section 3).
- ``sparsegpt``: prune/sparsegpt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashllm.errors import ArgumentError
from flashllm.prune.select import smallest, smallest_of_rows
from flashllm.prune.sparsegpt import sparsegpt
from flashllm.prune.statistics import Gram, Norms, Nothing, Statistics


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to prune a matrix."""

    calibrates: bool
    """It needs text."""
    statistics: Callable[[], Statistics]
    """What it needs to know about the inputs."""
    prune: Callable[[Any, Any, float], Any]
    """``prune(w, statistics, sparsity)``: a new float32 [M, K] with that fraction of zeros; kept elements may change
    where ``exact`` is not."""
    exact: bool = True
    """Kept elements stay as they are."""


def magnitude(w: Any, _: Statistics, sparsity: float) -> Any:
    """``w`` without the smallest ``round(sparsity * M * K)`` elements."""
    return _without(w, smallest(abs(w), round(sparsity * w.size)))


def magnitude_of_rows(w: Any, _: Statistics, sparsity: float) -> Any:
    """``w`` without the smallest ``round(sparsity * K)`` elements of every row."""
    return _without(w, smallest_of_rows(abs(w), round(sparsity * w.shape[1])))


def wanda(w: Any, statistics: Norms, sparsity: float) -> Any:
    """``w`` without the ``round(sparsity * K)`` elements of every row that contribute the least to outputs."""
    return _without(w, smallest_of_rows(abs(w) * statistics.norms(), round(sparsity * w.shape[1])))


METHODS: Mapping[str, Method] = {
    "magnitude": Method(calibrates=False, statistics=Nothing, prune=magnitude),
    "magnitude-row": Method(calibrates=False, statistics=Nothing, prune=magnitude_of_rows),
    "wanda": Method(calibrates=True, statistics=Norms, prune=wanda),
    "sparsegpt": Method(calibrates=True, statistics=Gram, prune=sparsegpt, exact=False),
}
"""The methods by name."""


def method(name: str) -> Method:
    """The method of that name. Raises ``ArgumentError``."""
    if name not in METHODS:
        raise ArgumentError("method", expected=f"one of {', '.join(METHODS)}", got=repr(name))
    return METHODS[name]


def _without(w: Any, mask: Any) -> Any:
    pruned = w.copy()
    pruned[mask] = 0
    return pruned
