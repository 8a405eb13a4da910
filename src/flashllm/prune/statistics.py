# SPDX-License-Identifier: Apache-2.0
"""What calibration remembers about the inputs of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flashllm.errors import ArgumentError
from flashllm.formats.sources import array_module


class Statistics(Protocol):
    """Sums over all rows x of a layer's input."""

    def add(self, x: Any) -> None:
        """Include the rows of ``x`` [T, K]."""

    def merge(self, other: Any) -> None:
        """Include what ``other``, of the same class, has seen."""


class Nothing:
    """For methods that look only at weights."""

    def add(self, x: Any) -> None:
        """Remembers nothing."""

    def merge(self, other: Nothing) -> None:
        """Does nothing: neither has seen anything."""


class Norms:
    """Sums of squares of every column: float64 [K]."""

    def __init__(self) -> None:
        self._sums: Any = None

    def add(self, x: Any) -> None:
        """Include the rows of ``x``."""
        sums = (x * x).sum(axis=0, dtype="float64")
        self._sums = sums if self._sums is None else self._sums + sums

    def merge(self, other: Norms) -> None:
        """Include what ``other`` has seen; both have seen something."""
        self._sums = self._sums + other._sums

    def norms(self) -> Any:
        """Euclidean norms of the columns: float32 [K]. Raises ``ArgumentError`` where inputs were not finite.

        With a NaN for every column, all elements would score alike, and the first ones would go.
        """
        xp = array_module(self._sums)
        if not bool(xp.isfinite(self._sums).all()):
            raise ArgumentError("statistics", expected="finite inputs", got="infinities or NaN")
        return xp.sqrt(self._sums).astype("float32")


class Gram:
    """x^T x: float32 [K, K], the Hessian of the layer's squared error up to a factor."""

    def __init__(self) -> None:
        self._sum: Any = None
        self._solution: Any = None

    def add(self, x: Any) -> None:
        """Include the rows of ``x``."""
        product = x.T @ x
        if self._sum is None:
            self._sum = product
        else:
            self._sum += product

    def merge(self, other: Gram) -> None:
        """Include what ``other`` has seen; both have seen something."""
        self._sum += other._sum

    def matrix(self) -> Any:
        """The sum, not a copy."""
        return self._sum

    def solved(self, solve: Callable[[Any], Any]) -> Any:
        """``solve(matrix)``, computed once for all layers of this input; it replaces the sum, which is as large."""
        if self._solution is None:
            self._solution, self._sum = solve(self._sum), None
        return self._solution
