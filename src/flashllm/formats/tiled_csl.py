# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL: one 32-bit word per stored element, by tiles of 128 x 64; see docs/formats/tiled_csl.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.errors import ArgumentError
from flashllm.formats.base import DType, ReportCallback
from flashllm.formats.bits import MAGNITUDE, RoundingTally, check_dtype, numpy_dtype, widen
from flashllm.formats.sources import (
    canonical_csr,
    check_dense,
    default_dtype,
    dense_strips,
    is_cupy,
    scipy_strips,
)
from flashllm.formats.tiled_csl_check import check_buffers, check_content, check_fields
from flashllm.formats.tiled_csl_encode import (
    ORDERS,
    WORDS_PER_VECTOR,
    EncodedTiles,
    Order,
    encode_strips,
    rows_and_columns,
)
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid
from flashllm.formats.weight import SparseWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TILE_K", "TILE_M", "WORDS_PER_VECTOR", "Order", "TiledCSL", "check_order"]

_PACKING = 1.1  # times 4 bytes per stored element: for tile padding and offsets


def check_order(order: str) -> Order:
    """``order`` itself if it names an order of the words in a tile; raises ``ArgumentError`` otherwise."""
    for known in ORDERS:
        if order == known:
            return known
    raise ArgumentError("order", expected=" or ".join(map(repr, ORDERS)), got=repr(order))


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledCSL(SparseWeight):
    """A sparse weight W [M, K] in Tiled-CSL.

    ``words`` is uint32 [padded elements]: value bits in the low half, location in the tile in the high
    half. ``tile_offsets`` is int32 [tiles + 2], in units of 4 words: where each tile starts, the total,
    the total again. ``nnz`` counts the stored elements without padding; ``max_tile_words`` is the
    largest padded tile. ``order`` says how the words of a tile are arranged: ``"bank"`` for few
    shared-memory conflicts, ``"row"`` for plain row-major.
    """

    FORMAT: ClassVar[str] = "tiled-csl"
    BUFFERS: ClassVar[tuple[str, ...]] = ("words", "tile_offsets")
    ENCODINGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "row-order": {"order": "row"}}

    words: Any = field(repr=False)
    tile_offsets: Any = field(repr=False)
    order: Order
    max_tile_words: int

    @classmethod
    def check_structure(cls, fields: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None) -> None:
        """Raise ``FormatError`` unless fields, types and lengths are legal."""
        check_fields(**fields, path=path)
        check_buffers(shape=tuple(fields["shape"]), **arrays, path=path)

    @classmethod
    def estimated_bytes(cls, shape: tuple[int, int], density: float) -> int:
        """4 bytes per stored element, a tenth for padding, and the offsets."""
        return int(4 * _PACKING * density * shape[0] * shape[1]) + 4096

    @classmethod
    def from_dense(
        cls, a: Any, *, dtype: str | None = None, order: str = "bank", report: ReportCallback | None = None
    ) -> TiledCSL:
        """Encode a dense matrix [M, K].

        ``a`` is a NumPy array of float16, bfloat16 (ml_dtypes), float32 or float64, or a CuPy array of
        float16, bfloat16, float32 or, with ``dtype="bf16"``, uint16 bit patterns; a CuPy array is
        encoded on its device. ``dtype`` is ``"fp16"`` or ``"bf16"``; by default bf16 for bf16 input,
        else fp16. Other types are rounded to nearest even; ``report`` is called once with the resulting
        ``RoundingReport``. Raises ``ArgumentError``.
        """
        if is_cupy(a):
            from flashllm.encode import tiled_csl as device

            return device.encode(a, dtype=dtype, order=order, report=report)
        shape = check_dense(a)
        kind = check_dtype(dtype) if dtype is not None else default_dtype(a)
        way = check_order(order)
        tally = RoundingTally() if report is not None else None
        encoded = encode_strips(dense_strips(a, kind, TILE_M, tally), shape, way)
        return cls._from_encoded(encoded, shape, kind, way, tally, report)

    @classmethod
    def from_scipy(
        cls, s: Any, *, dtype: str = "fp16", order: str = "bank", report: ReportCallback | None = None
    ) -> TiledCSL:
        """Encode a CSR, CSC or COO ``scipy.sparse`` matrix or array [M, K] of real values.

        Duplicate positions are summed in the type of the source (float64 for integers), and the sums are
        rounded as in ``from_dense``. Raises ``ArgumentError`` for any other type, ``FormatError`` for invalid
        index arrays.
        """
        kind = check_dtype(dtype)
        way = check_order(order)
        csr = canonical_csr(s)
        shape = (int(csr.shape[0]), int(csr.shape[1]))
        tally = RoundingTally() if report is not None else None
        encoded = encode_strips(scipy_strips(csr, kind, TILE_M, tally), shape, way)
        return cls._from_encoded(encoded, shape, kind, way, tally, report)

    @classmethod
    def _from_encoded(
        cls,
        encoded: EncodedTiles,
        shape: tuple[int, int],
        dtype: DType,
        order: Order,
        tally: RoundingTally | None,
        report: ReportCallback | None,
    ) -> TiledCSL:
        if report is not None and tally is not None:
            report(tally.report())
        return cls(
            shape=shape,
            dtype=dtype,
            nnz=encoded.nnz,
            words=encoded.words,
            tile_offsets=encoded.tile_offsets,
            order=order,
            max_tile_words=encoded.max_tile_words,
        )

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along M and along K."""
        return tile_grid(self.shape)

    def check_content(self, *, path: str | None) -> None:
        """Raise ``FormatError`` at the first breach. The order of the words in a tile is not checked, as results do not
        depend on it.
        """
        check_content(
            shape=self.shape,
            nnz=self.nnz,
            max_tile_words=self.max_tile_words,
            words=self.words,
            tile_offsets=self.tile_offsets,
            path=path,
        )

    def to_dense(self) -> Any:
        """Dense [M, K], float16 or ml_dtypes.bfloat16: a NumPy array, or a CuPy array for a device weight."""
        if self.is_device:
            from flashllm.encode import tiled_csl as device

            return device.decode(self)
        rows, columns = self.shape
        out = np.zeros((rows, columns), np.uint16)
        for grid_row in range(self.tiles[0]):
            row, column, value = self._elements(grid_row)
            out[row, column] = value
        return out.view(numpy_dtype(self.dtype))

    def to_scipy(self) -> Any:
        """``scipy.sparse.csr_array`` [M, K] of float32 with sorted indices; every value is exact."""
        import scipy.sparse

        host = self.to_host()
        indptr = np.zeros(self.shape[0] + 1, np.int64)
        indices = np.empty(self.nnz, np.int32)
        data = np.empty(self.nnz, np.float32)
        end = 0
        for grid_row in range(self.tiles[0]):
            row, column, value = host._elements(grid_row)
            by_place = np.lexsort((column, row))
            start, end = end, end + row.size
            indices[start:end] = column[by_place]
            data[start:end] = widen(value, self.dtype)[by_place]
            first = grid_row * TILE_M
            height = min(TILE_M, self.shape[0] - first)
            indptr[first + 1 : first + 1 + height] = np.bincount(row - first, minlength=height)
        np.cumsum(indptr, out=indptr)
        return scipy.sparse.csr_array((data, indices, indptr), shape=self.shape)

    def _elements(self, grid_row: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint16]]:
        """Row, column and pattern of every stored element in one row of tiles (host buffers)."""
        tiles_k = self.tiles[1]
        offsets = self.tile_offsets[grid_row * tiles_k : (grid_row + 1) * tiles_k + 1].astype(np.int64)
        offsets *= WORDS_PER_VECTOR
        part = self.words[offsets[0] : offsets[-1]]
        row, column = rows_and_columns(part >> np.uint32(16))
        row += grid_row * TILE_M
        column += np.repeat(np.arange(tiles_k) * TILE_K, np.diff(offsets))
        value = part.astype(np.uint16)
        stored = (value & MAGNITUDE) != 0
        return row[stored], column[stored], value[stored]
