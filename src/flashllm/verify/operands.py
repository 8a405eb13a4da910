# SPDX-License-Identifier: Apache-2.0
"""Operands of a case and what their product must be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.bench import check
from flashllm.bench.data import random_matrix, to_float64
from flashllm.formats.bits import numpy_dtype, to_bits
from flashllm.formats.weight import SparseWeight
from flashllm.registry import weight_class
from flashllm.verify.cases import TILE, Data

_LARGEST_INTEGER = 4
_HUGE = 32768.0  # exact in both types; a few of them overflow fp16
_X_SEED = 1 << 33


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Operands, and the product they must give."""

    x: NDArray[Any]
    """[N, K]"""
    w: SparseWeight
    expected: NDArray[np.float64]
    """[N, M]: rounded once to the output type where an exact result is required, else as computed."""
    reference: check.Reference | None
    """Present where an error bound applies."""
    without_zeros: NDArray[np.float64] | None = None
    """[N, M]: values that are right too, element by element, since the format may leave zeros of W out."""


@lru_cache(maxsize=64)
def make_problem(data: Data) -> Problem:
    """The problem of a case, reproducible from ``data`` alone."""
    kept = _mask(data)
    if data.operands == "random":
        w = np.where(kept, _values(data.m, data.k, data, data.seed), 0).astype(numpy_dtype(data.dtype))
        x = _values(data.n, data.k, data, data.seed + _X_SEED)
    else:
        rng = np.random.default_rng(data.seed)
        w = np.where(kept, _integers(rng, data.m, data.k), 0.0)
        x = _integers(rng, data.n, data.k)
        if data.operands == "special":
            _add_special(w, x, data)
        w, x = w.astype(numpy_dtype(data.dtype)), x.astype(numpy_dtype(data.dtype))
    w64, x64 = to_float64(w, data.dtype), to_float64(x, data.dtype)
    made = weight_class(data.format)
    options = {**made.ENCODINGS[data.encoding], **dict(data.layout)}
    packed = made.from_dense(w, dtype=data.dtype, **options)
    if data.operands == "random":
        reference = check.make_reference(x64, w64, np.arange(data.m), data.dtype)
        return Problem(x=x, w=packed, expected=reference.values, reference=reference)

    def rounded(product: NDArray[np.float64]) -> NDArray[np.float64]:
        y: NDArray[np.float64] = to_float64(to_bits(product, data.dtype).view(numpy_dtype(data.dtype)), data.dtype)
        return y

    with np.errstate(invalid="ignore", over="ignore"):
        # Integers this small multiply and add exactly in float64, as they would in int64.
        expected = rounded(x64 @ w64.T)
        leaves_out = data.operands == "special" and not made.MULTIPLIES_ZEROS
        without_zeros = rounded(_product_of_stored(x64, w64)) if leaves_out else None
    return Problem(x=x, w=packed, expected=expected, reference=None, without_zeros=without_zeros)


def _product_of_stored(x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """``x @ w.T``, except that zeros of w are not multiplied."""
    finite = np.isfinite(x).all(axis=0)
    y = x[:, finite] @ w[:, finite].T
    for column in np.flatnonzero(~finite):
        y += np.where(w[:, column] != 0, x[:, column, None] * w[:, column], 0.0)
    return y


def _mask(data: Data) -> NDArray[np.bool_]:
    """Which elements of W are kept."""
    shape = (data.m, data.k)
    kept: NDArray[np.bool_]
    if data.pattern in ("full", "empty"):
        kept = np.full(shape, data.pattern == "full")
    elif data.pattern == "every-other-tile":
        row, column = np.indices(shape)
        kept = (row // TILE[0] + column // TILE[1]) % 2 == 0
    else:
        kept = random_matrix(*shape, density=1.0 - data.sparsity, pattern=data.pattern, seed=data.seed) != 0
    return kept


def _values(rows: int, columns: int, data: Data, seed: int) -> NDArray[Any]:
    matrix: NDArray[Any] = random_matrix(rows, columns, seed=seed, dtype=data.dtype)
    return matrix


def _integers(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    """+-1 to +-4."""
    size = rng.integers(1, _LARGEST_INTEGER + 1, (rows, columns))
    signed: NDArray[Any] = size * rng.choice((-1, 1), (rows, columns))
    return signed.astype(np.float64)


def _add_special(w: NDArray[np.float64], x: NDArray[np.float64], data: Data) -> None:
    """Put NaN and infinities into W and an infinity into x; make the products of one row of W overflow fp16."""
    w[data.m // 3, data.k // 2] = np.nan
    w[0, 0] = -np.inf
    w[-1, -1] = np.inf
    w[data.m // 2] *= _HUGE / _LARGEST_INTEGER
    x[data.n // 2, data.k // 3] = np.inf  # meets pruned zeros: NaN where they are multiplied
