# SPDX-License-Identifier: Apache-2.0
"""What every sparse weight format offers, and the names shared by all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

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


@runtime_checkable
class SparseWeight(Protocol):
    """A weight matrix W [M, K] with most elements pruned, as some format stores it.

    Buffers are NumPy arrays on the host or CuPy arrays on a device. Encoding is exact: every stored
    element keeps its row, column and bit pattern. +0.0, -0.0 and explicit zeros of a sparse source are
    pruned; NaN and infinity are stored.
    """

    @property
    def format(self) -> str:
        """Name of the format, e.g. ``"tiled-csl"``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K): output features, input features."""

    @property
    def dtype(self) -> DType:
        """Type of the stored values."""

    @property
    def nnz(self) -> int:
        """Stored elements, padding not counted."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    @property
    def bytes_per_element(self) -> float:
        """``nbytes / (M * K)``; a dense fp16 matrix has 2."""

    @property
    def density(self) -> float:
        """``nnz / (M * K)``."""

    @property
    def sparsity(self) -> float:
        """``1 - density``."""

    @property
    def is_device(self) -> bool:
        """True when the buffers are CuPy arrays."""

    def arrays(self) -> dict[str, Any]:
        """The buffers by name."""

    def metadata(self) -> dict[str, Any]:
        """All that is needed beside the buffers to rebuild the weight; values fit JSON."""

    def to_dense(self) -> Any:
        """Dense matrix [M, K], on the host or the device that holds the buffers."""

    def to_scipy(self) -> Any:
        """``scipy.sparse.csr_array`` [M, K] of float32 (SciPy has no 16-bit floats)."""

    def validate(self) -> None:
        """Check every invariant of the format; raise ``FormatError`` at the first breach."""

    def to_device(self) -> SparseWeight:
        """The same weight with CuPy buffers on the current device."""

    def to_host(self) -> SparseWeight:
        """The same weight with NumPy buffers."""

    def save(self, path: str | Path, *, name: str = "weight") -> None:
        """Write the weight to a file of its own."""
