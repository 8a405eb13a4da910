# SPDX-License-Identifier: Apache-2.0
"""Is an output right? The promised error bound, per element, and a looser comparison of whole outputs.

Every function takes either NumPy or CuPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashllm.baselines.baseline import Way

ACCUMULATION = 2.0**-20
"""Error of the fp32 sum, relative to |x| |W|: tensor cores truncate."""
WHOLE_SLACK = 8.0
"""The comparison of whole outputs allows this many half-units in the last place of either output."""
BASELINE_LIMIT = Way.error_limit
"""A vendor library may add split-K pieces in fp16: its error may be this many times the bound."""


@dataclass(frozen=True, kw_only=True)
class OutputType:
    """Rounding of an output type: half a unit in the last place, half the smallest step, and the overflow limit."""

    unit: float
    smallest: float
    overflow: float


OUTPUT_TYPES: dict[str, OutputType] = {
    # overflow: the largest finite value plus half a step; from there on the rounded result is infinite
    "fp16": OutputType(unit=2.0**-11, smallest=2.0**-25, overflow=65520.0),
    "bf16": OutputType(unit=2.0**-8, smallest=0.0, overflow=(2.0 - 2.0**-8) * 2.0**127),
}


def namespace(array: Any) -> Any:
    """The module (numpy or cupy) that made ``array``."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    import cupy

    return cupy


@dataclass(frozen=True, kw_only=True)
class Reference:
    """float64 result of some columns of y[N, M]: ``values`` and ``magnitude`` = |x| |W|^T, both [N,
    len(rows)].

    ``rows`` are the rows of W (columns of y) that were computed.
    """

    rows: Any
    values: Any
    magnitude: Any
    dtype: str


def sample_rows(m: int, count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sorted row numbers: the first, the last and random ones between, ``min(count, m)`` in all."""
    if count >= m:
        return np.arange(m, dtype=np.int64)
    inner = np.random.default_rng(seed).choice(np.arange(1, m - 1), size=max(0, count - 2), replace=False)
    return np.unique(np.concatenate(([0, m - 1], inner))).astype(np.int64)


def make_reference(x64: Any, w64: Any, rows: Any, dtype: str) -> Reference:
    """Reference of ``x64[N, K] @ w64[R, K]^T``, where ``w64`` holds the rows ``rows`` of W; both float64."""
    return Reference(rows=rows, values=x64 @ w64.T, magnitude=abs(x64) @ abs(w64).T, dtype=dtype)


def bounds(reference: Reference) -> Any:
    """The promised bound u |ref| + 2^-20 |x||W| + s of every element, [N, len(rows)] float64."""
    kind = OUTPUT_TYPES[reference.dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        return kind.unit * abs(reference.values) + ACCUMULATION * reference.magnitude + kind.smallest


def error_ratios(y64: Any, reference: Reference) -> Any:
    """|y - ref| over :func:`bounds`, [N, len(rows)]; ``y64`` is [N, M] float64.

    Infinity where an element is NaN or infinite and the reference is not, or the other way round.
    """
    xp = namespace(reference.values)
    kind = OUTPUT_TYPES[reference.dtype]
    got, want = y64[:, reference.rows], reference.values
    bound = bounds(reference)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = abs(got - want)
        ratio = xp.where(bound > 0, error / bound, xp.where(error == 0, 0.0, np.inf))
        infinite = xp.where(got == xp.copysign(xp.full_like(want, np.inf), want), 0.0, np.inf)
        # Near the overflow limit the fp32 sum may round either way: there both results are right.
        # An infinite reference needs no margin: it comes from an infinite weight, not from rounding.
        certain = (abs(want) == np.inf) | (abs(want) - ACCUMULATION * reference.magnitude >= kind.overflow)
        possible = abs(want) + ACCUMULATION * reference.magnitude >= kind.overflow
        ratio = xp.where(certain, infinite, xp.where(possible, xp.minimum(ratio, infinite), ratio))
        ratio = xp.where(xp.isnan(want), xp.where(xp.isnan(got), 0.0, np.inf), ratio)
        return xp.where(xp.isnan(ratio), np.inf, ratio)


def error_over_bound(y64: Any, reference: Reference) -> float:
    """The largest of :func:`error_ratios`; 0 for no elements."""
    ratio = error_ratios(y64, reference)
    return float(ratio.max()) if ratio.size else 0.0


def whole_error_over_bound(y64: Any, other64: Any, x64: Any, largest_weight: float, dtype: str) -> float:
    """Largest ratio of |y - other| to a bound that needs no reference, over all of y[N, M].

    The bound is 8 u (|y| + |other|) + 2^-20 |x_n|_1 max|W| + 8 s per element: looser than the promise (|x||W|
    is replaced by what it can be at most, and ``other``, a vendor library's output, has errors of its own),
    yet far below one wrong or missing product.
    """
    xp = namespace(y64)
    kind = OUTPUT_TYPES[dtype]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        room = 2.0 * ACCUMULATION * abs(x64).sum(axis=1, keepdims=True) * largest_weight
        bound = WHOLE_SLACK * (kind.unit * (abs(y64) + abs(other64)) + kind.smallest) + room
        same = (y64 == other64) | (xp.isnan(y64) & xp.isnan(other64))
        ratio = xp.where(same, 0.0, abs(y64 - other64) / bound)
        ratio = xp.where(xp.isnan(ratio), np.inf, ratio)
    return float(ratio.max()) if ratio.size else 0.0


def poison(y: Any, dtype: str) -> None:
    """Fill ``y`` with NaN, so that an element nobody writes fails every check."""
    if y.dtype == np.uint16:
        y.fill(0x7FC0 if dtype == "bf16" else 0x7E00)
    else:
        y.fill(float("nan"))
