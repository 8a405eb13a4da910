# SPDX-License-Identifier: Apache-2.0
"""Bitmap: one bit per element, and the stored values in the order in which warps need them; docs/formats/bitmap.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.formats.base import DType, ReportCallback
from flashllm.formats.bitmap_check import check_buffers, check_content, check_fields
from flashllm.formats.bitmap_encode import (
    EncodedBitmap,
    Position,
    encode_strips,
    estimated_value_bytes,
    flag_counts,
    from_stream_order,
    read_streams,
    stream_starts,
    unpack_masks,
)
from flashllm.formats.bits import RoundingTally, check_dtype
from flashllm.formats.decoded import csr_of, dense_of
from flashllm.formats.runs import runs_of
from flashllm.formats.sources import canonical_csr, check_dense, default_dtype, dense_strips, is_cupy, scipy_strips
from flashllm.formats.tiles import TILE_M, tile_grid
from flashllm.formats.weight import SparseWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK_BYTES = 0.131  # per element: 1 bit, plus the fronts of tiles and places of streams
_SMALL = 1 << 15  # bytes: for the value rows at the end, which are not full


@dataclass(frozen=True, kw_only=True, eq=False)
class Bitmap(SparseWeight):
    """A sparse weight W [M, K] as masks and value streams.

    ``masks`` is uint32 [tiles, 4, 32, 2]: two words for each lane of the four warps that share a tile of 128 x 64.
    ``values`` is uint16 [chunks, 4, 16, 32, 2]: each chunk holds 16 value rows of each of the four parts. ``fronts`` is
    int32 [tiles + 1]: the value row that the longest stream has reached when a tile begins. ``places`` is uint16
    [ceil(tiles / 8), 4, 64]: for every eighth tile, the column that each stream has from there on, the stream that had
    this column before, and how many rows the column is behind the front (``Places`` in bitmap_encode.py). ``nnz`` does
    not count the zeros that keep streams from falling too far behind.
    """

    FORMAT: ClassVar[str] = "bitmap"
    VERSION: ClassVar[int] = 4
    BUFFERS: ClassVar[tuple[str, ...]] = ("masks", "values", "fronts", "places")

    masks: Any = field(repr=False)
    values: Any = field(repr=False)
    fronts: Any = field(repr=False)
    places: Any = field(repr=False)

    @classmethod
    def check_structure(cls, fields: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None) -> None:
        """Raise ``FormatError`` unless fields, types and lengths are legal."""
        check_fields(**fields, path=path)
        check_buffers(shape=tuple(fields["shape"]), **arrays, path=path)

    def check_content(self, *, path: str | None) -> None:
        """Raise ``FormatError`` at the first breach of what a kernel relies on, or if values and ``nnz`` disagree."""
        check_content(shape=self.shape, nnz=self.nnz, **self.arrays(), path=path)

    @classmethod
    def estimated_bytes(cls, shape: tuple[int, int], density: float) -> int:
        """One bit per element and 2 bytes per stored one, plus what streams leave empty by ending unevenly."""
        return int(shape[0] * shape[1] * _MASK_BYTES) + estimated_value_bytes(tile_grid(shape), density) + _SMALL

    @classmethod
    def from_dense(cls, a: Any, *, dtype: str | None = None, report: ReportCallback | None = None) -> Bitmap:
        """Encode a dense matrix [M, K].

        ``a`` is a NumPy array of float16, bfloat16 (ml_dtypes), float32 or float64, or a CuPy array of float16,
        bfloat16, float32 or, with ``dtype="bf16"``, uint16 bit patterns; a CuPy array is encoded on its device.
        ``dtype`` is ``"fp16"`` or ``"bf16"``; by default bf16 for bf16 input, else fp16. Other types are rounded to
        nearest even; ``report`` is called once with the resulting ``RoundingReport``. Raises ``ArgumentError``.
        """
        if is_cupy(a):
            from flashllm.encode import bitmap as device

            return device.encode(a, dtype=dtype, report=report)
        shape = check_dense(a)
        kind = check_dtype(dtype) if dtype is not None else default_dtype(a)
        tally = RoundingTally() if report is not None else None
        return cls._from_encoded(encode_strips(dense_strips(a, kind, TILE_M, tally), shape), shape, kind, tally, report)

    @classmethod
    def from_scipy(cls, s: Any, *, dtype: str = "fp16", report: ReportCallback | None = None) -> Bitmap:
        """Encode a CSR, CSC or COO ``scipy.sparse`` matrix or array [M, K] of real values.

        Duplicate positions are summed in the type of the source (float64 for integers), and the sums are rounded as in
        ``from_dense``. Raises ``ArgumentError`` for any other type, ``FormatError`` for invalid index arrays.
        """
        kind = check_dtype(dtype)
        csr = canonical_csr(s)
        shape = (int(csr.shape[0]), int(csr.shape[1]))
        tally = RoundingTally() if report is not None else None
        encoded = encode_strips(scipy_strips(csr, kind, TILE_M, tally), shape)
        return cls._from_encoded(encoded, shape, kind, tally, report)

    @classmethod
    def _from_encoded(
        cls,
        encoded: EncodedBitmap,
        shape: tuple[int, int],
        dtype: DType,
        tally: RoundingTally | None,
        report: ReportCallback | None,
    ) -> Bitmap:
        if report is not None and tally is not None:
            report(tally.report())
        return cls(
            shape=shape,
            dtype=dtype,
            nnz=encoded.nnz,
            masks=encoded.masks,
            values=encoded.values,
            fronts=encoded.fronts,
            places=encoded.places,
        )

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along M and along K."""
        return tile_grid(self.shape)

    def to_dense(self) -> Any:
        """Dense [M, K], float16 or ml_dtypes.bfloat16: a NumPy array, or a CuPy array for a device weight."""
        if self.is_device:
            from flashllm.encode import bitmap as device

            return device.decode(self)
        return dense_of(self.strips(), self.shape, self.dtype)

    def to_scipy(self) -> Any:
        """``scipy.sparse.csr_array`` [M, K] of float32 with sorted indices; every value is exact."""
        return csr_of(self.to_host().strips(), self.shape, self.dtype)

    def strips(self) -> Iterator[NDArray[np.uint16]]:
        """Patterns [up to 128, K] of each row of tiles (host buffers)."""
        tiles_m, tiles_k = self.tiles
        position = Position.at_front(0)
        restarts = runs_of(self.tiles).first_tiles()
        for grid_row in range(tiles_m):
            kept = unpack_masks(self.masks[grid_row * tiles_k : (grid_row + 1) * tiles_k])
            counts = flag_counts(kept)
            where = stream_starts(counts, position, self.fronts, self.places, grid_row * tiles_k, restarts)
            block = from_stream_order(read_streams(kept, self.values, counts, *where))
            yield block[: self.shape[0] - grid_row * TILE_M, : self.shape[1]]
