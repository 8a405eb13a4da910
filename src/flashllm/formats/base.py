# SPDX-License-Identifier: Apache-2.0
"""Names and limits that all sparse weight formats share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

DType = Literal["fp16", "bf16"]
DTYPES: tuple[DType, ...] = ("fp16", "bf16")

MAX_DIMENSION = 2**31 - 1
"""Largest M or K. Kernels hold row and column numbers in 32 bits, element counts in 64."""


@dataclass(frozen=True, kw_only=True)
class RoundingReport:
    """What rounding a wider source to fp16 or bf16 did to its nonzero elements.

    ``total`` counts the nonzero elements of the source (NaN included), ``changed`` those whose value is
    not exactly representable, among them ``became_zero`` (too small: pruned) and ``became_infinite``
    (too large).
    """

    total: int
    changed: int
    became_zero: int
    became_infinite: int


ReportCallback = Callable[[RoundingReport], None]
