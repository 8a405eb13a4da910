# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: prunes a matrix column by column, with later columns compensating for the error of each.

Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", ICML'23, section 3 and
algorithm 1: with H = x^T x and H^-1 = U^T U, U upper triangular, the error of zeroing element j of a row is
(w_j / U_jj)^2, and the best compensation is to add -(w_j / U_jj) U_j,: to the elements of the row that follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.errors import ArgumentError
from flashllm.formats.sources import array_module
from flashllm.prune.select import smallest
from flashllm.prune.statistics import Gram

COLUMNS = 128
"""Columns of a block, whose mask is chosen at once, after all earlier blocks have updated it."""
DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""
_ATTEMPTS = 6


def sparsegpt(w: Any, statistics: Gram, sparsity: float) -> Any:
    """A float32 [M, K] with the fraction ``sparsity`` of zeros, spread evenly over blocks of columns.

    Raises ``ArgumentError`` if the inputs hold infinities or NaN.
    """
    unused, factor = statistics.solved(_unused_and_factor)
    # Transposed, so that each column is contiguous in memory.
    columns = w.T.copy()
    columns[unused] = 0
    size, rows = columns.shape
    for first in range(0, size, COLUMNS):
        last = min(first + COLUMNS, size)
        count = round(sparsity * rows * last) - round(sparsity * rows * first)
        errors = _prune_block(columns[first:last], factor[first:last, first:last], count)
        columns[last:] -= factor[first:last, last:].T @ errors
    return array_module(w).ascontiguousarray(columns.T)


def _prune_block(columns: Any, factor: Any, count: int) -> Any:
    """Zero ``count`` elements of ``columns`` [C, M] in place; returns the errors [C, M] for later columns to absorb."""
    xp = array_module(columns)
    diagonal = factor.diagonal()[:, None]
    mask = smallest((columns / diagonal) ** 2, count)
    errors = xp.empty_like(columns)
    for i in range(len(columns)):
        errors[i] = xp.where(mask[i], columns[i] / factor[i, i], 0)
        columns[i:] -= factor[i, i:, None] * errors[i]
        columns[i][mask[i]] = 0  # rounding may have left something
    return errors


def _unused_and_factor(hessian: Any) -> tuple[Any, Any]:
    """Which columns have only zeros as input, and the factor for the others: what every layer of this input needs."""
    unused = hessian.diagonal() == 0
    return unused, _inverse_factor(hessian, unused)


def _inverse_factor(hessian: Any, unused: Any) -> Any:
    """U of H^-1 = U^T U, float32; H gets 1 on the diagonal where all inputs are zero, and is damped."""
    xp = array_module(hessian)
    damped = hessian.astype(np.float64)
    damping = DAMPING * float(damped.diagonal().mean())
    if not np.isfinite(damping):
        raise ArgumentError("statistics", expected="finite inputs", got="infinities or NaN")
    places = xp.arange(len(damped))
    damped[places, places] += unused
    for _ in range(_ATTEMPTS):
        damped[places, places] += damping
        try:
            factor = xp.linalg.cholesky(xp.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            factor = None
        if factor is not None and bool(xp.isfinite(factor).all()):
            return xp.ascontiguousarray(factor.astype(np.float32))
        damping *= 10
    raise ArgumentError("statistics", expected="inputs whose products can be inverted", got="a singular matrix")
