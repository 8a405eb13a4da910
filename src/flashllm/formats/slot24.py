# SPDX-License-Identifier: Apache-2.0
"""Slot24: pairs of columns share the slots of 2:4 sparse tensor cores, stored as a bitmap; docs/formats/slot24.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.formats.base import DType, ReportCallback
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import estimated_value_bytes
from flashllm.formats.bits import RoundingTally, check_dtype
from flashllm.formats.decoded import csr_of, dense_of
from flashllm.formats.slot24_check import check_buffers, check_content, check_fields
from flashllm.formats.slot24_encode import EncodedSlots, decode_strips, encode, slots_shape
from flashllm.formats.slot24_pairs import RESIDUES, check_group_values, check_window
from flashllm.formats.slot24_parts import PARTS_OF, Parts, check_part_rows
from flashllm.formats.sources import canonical_csr, check_dense, default_dtype, dense_strips, is_cupy, scipy_strips
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid
from flashllm.formats.weight import SparseWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE_BYTES = 1024 + 1024 + 512 + 68  # masks, picks, columns; front and places
_TALL_SAVES = 256  # of these bytes, where parts have 64 rows
_DENSITIES = (0.17, 0.25, 0.29, 0.35)
_WINDOWS = (256, 240, 176, 128)  # about the largest in which the columns of large random matrices pair up
_TALL_DENSITY = 0.17  # up to here they also pair up for 64 rows, in windows of at least 248
_SMALL = 1 << 15  # bytes: for the value rows at the end, which are not full


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot24(SparseWeight):
    """A sparse weight W [M, K] as a matrix of slots, each of which holds a value of one of two columns.

    ``window`` columns of W share 128 slots in pairs. Each band of ``part_rows`` rows, 32 or 64 of the 128 rows of a
    tile, has its own pairs. ``masks``, ``values``, ``fronts`` and ``places`` are those of the ``Bitmap`` of the slots,
    128 per window; where bands have 64 rows, each tile of the bitmap has its slots in another order. No group of four
    of its elements has more than ``group_values`` values, 2 or 4. ``picks`` is uint32 [tiles, 4, 32, 2]: one bit per
    slot, 1 where its value is from the right column. ``columns`` is uint8 [tiles, 4, 32, 4], or [tiles, 4, 32, 2] for
    bands of 64 rows: the column in the window for each lane and step of a part.
    """

    FORMAT: ClassVar[str] = "slot24"
    VERSION: ClassVar[int] = 4
    BUFFERS: ClassVar[tuple[str, ...]] = ("masks", "values", "fronts", "places", "picks", "columns")
    ENCODINGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "window-128": {"window": 128},
        "part-rows-32": {"part_rows": 32},
        "part-rows-64": {"part_rows": 64},
        "group-values-4": {"group_values": 4},
    }
    LAYOUT: ClassVar[tuple[str, ...]] = ("part_rows", "group_values")
    MULTIPLIES_ZEROS: ClassVar[bool] = False

    window: int
    part_rows: int
    group_values: int
    masks: Any = field(repr=False)
    values: Any = field(repr=False)
    fronts: Any = field(repr=False)
    places: Any = field(repr=False)
    picks: Any = field(repr=False)
    columns: Any = field(repr=False)

    @classmethod
    def check_structure(cls, fields: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None) -> None:
        """Raise ``FormatError`` unless fields, types and lengths are legal."""
        check_fields(**fields, path=path)
        shape, window, part_rows = tuple(fields["shape"]), fields["window"], fields["part_rows"]
        check_buffers(shape=shape, window=window, part_rows=part_rows, **arrays, path=path)

    def check_content(self, *, path: str | None) -> None:
        """Raise ``FormatError`` at the first breach of what a kernel relies on, or if values and ``nnz`` disagree.

        The order of the pairs in a window is not checked, as results do not depend on it.
        """
        check_content(
            slots=self.slots,
            shape=self.shape,
            window=self.window,
            parts=self._parts,
            group_values=self.group_values,
            picks=self.picks,
            columns=self.columns,
            path=path,
        )

    @classmethod
    def estimated_bytes(cls, shape: tuple[int, int], density: float) -> int:
        """Masks, picks and columns of as many windows as random matrices need, and 2 bytes per stored element."""
        window = int(np.interp(density, _DENSITIES, _WINDOWS)) // RESIDUES * RESIDUES
        tiles_m, tiles_k = grid = tile_grid(slots_shape(shape, window))
        slots = tiles_m * tiles_k * TILE_M * TILE_K
        values = estimated_value_bytes(grid, density * shape[0] * shape[1] / slots)
        tile_bytes = _TILE_BYTES - (_TALL_SAVES if density <= _TALL_DENSITY else 0)
        return tiles_m * tiles_k * tile_bytes + values + _SMALL

    @classmethod
    def densest(cls, **layout: int) -> float:
        """Groups of two values are only for very sparse matrices."""
        return 0.08 if layout.get("group_values") == 2 else 1.0

    @classmethod
    def from_dense(
        cls,
        a: Any,
        *,
        dtype: str | None = None,
        window: int | None = None,
        part_rows: int | None = None,
        group_values: int | None = None,
        report: ReportCallback | None = None,
    ) -> Slot24:
        """Encode a dense matrix [M, K].

        ``a`` is a NumPy array of float16, bfloat16 (ml_dtypes), float32 or float64, or a CuPy array of float16,
        bfloat16, float32 or, with ``dtype="bf16"``, uint16 bit patterns; a CuPy array is encoded on its device.
        ``dtype`` is ``"fp16"`` or ``"bf16"``; by default bf16 for bf16 input, else fp16. Other types are rounded to
        nearest even; ``report`` is called once with the resulting ``RoundingReport``. ``window`` is how many columns
        share 128 slots, a multiple of 8 in 128..256; by default the largest in a list that the matrix allows.
        ``part_rows`` is how many rows pair their columns alike, 32 or 64; by default 64 where windows can then be
        nearly as large as possible. ``group_values`` is how many values a group of four slots may have, 2 or 4; by
        default 2 where the windows and the pairing allow it. Raises ``ArgumentError``, also when the columns do not
        pair up as these arguments require.
        """
        check_window(window)
        check_part_rows(part_rows)
        check_group_values(group_values)
        if is_cupy(a):
            from flashllm.encode import slot24 as device

            asked = {"window": window, "part_rows": part_rows, "group_values": group_values}
            return device.encode(a, dtype=dtype, **asked, report=report)
        shape = check_dense(a)
        kind = check_dtype(dtype) if dtype is not None else default_dtype(a)
        tally = RoundingTally() if report is not None else None
        strips = partial(dense_strips, a, kind, TILE_M)
        encoded = encode(strips, shape, window, part_rows, group_values, tally)
        return cls._from_encoded(encoded, shape, kind, tally, report)

    @classmethod
    def from_scipy(
        cls,
        s: Any,
        *,
        dtype: str = "fp16",
        window: int | None = None,
        part_rows: int | None = None,
        group_values: int | None = None,
        report: ReportCallback | None = None,
    ) -> Slot24:
        """Encode a CSR, CSC or COO ``scipy.sparse`` matrix or array [M, K] of real values.

        Duplicate positions are summed in the type of the source (float64 for integers), and the sums are rounded as in
        ``from_dense``. ``window``, ``part_rows`` and ``group_values`` are as in ``from_dense``. Raises
        ``ArgumentError`` for any other type, ``FormatError`` for invalid index arrays.
        """
        check_window(window)
        check_part_rows(part_rows)
        check_group_values(group_values)
        kind = check_dtype(dtype)
        csr = canonical_csr(s)
        shape = (int(csr.shape[0]), int(csr.shape[1]))
        tally = RoundingTally() if report is not None else None
        strips = partial(scipy_strips, csr, kind, TILE_M)
        encoded = encode(strips, shape, window, part_rows, group_values, tally)
        return cls._from_encoded(encoded, shape, kind, tally, report)

    @classmethod
    def _from_encoded(
        cls,
        encoded: EncodedSlots,
        shape: tuple[int, int],
        dtype: DType,
        tally: RoundingTally | None,
        report: ReportCallback | None,
    ) -> Slot24:
        if report is not None and tally is not None:
            report(tally.report())
        return cls(
            shape=shape,
            dtype=dtype,
            nnz=encoded.bitmap.nnz,
            window=encoded.how.window,
            part_rows=encoded.how.parts.rows,
            group_values=encoded.how.group_values,
            masks=encoded.bitmap.masks,
            values=encoded.bitmap.values,
            fronts=encoded.bitmap.fronts,
            places=encoded.bitmap.places,
            picks=encoded.picks,
            columns=encoded.columns,
        )

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of slots along M and along K; a window has two along K."""
        return tile_grid(slots_shape(self.shape, self.window))

    @property
    def slots(self) -> Bitmap:
        """The matrix of slots as it is stored, in whole tiles; it shares the buffers of this weight."""
        return Bitmap(
            shape=slots_shape(self.shape, self.window),
            dtype=self.dtype,
            nnz=self.nnz,
            **{name: getattr(self, name) for name in Bitmap.BUFFERS},
        )

    def to_dense(self) -> Any:
        """Dense [M, K], float16 or ml_dtypes.bfloat16: a NumPy array, or a CuPy array for a device weight."""
        if self.is_device:
            from flashllm.encode import slot24 as device

            return device.decode(self)
        return dense_of(self.strips(), self.shape, self.dtype)

    def to_scipy(self) -> Any:
        """``scipy.sparse.csr_array`` [M, K] of float32 with sorted indices; every value is exact."""
        return csr_of(self.to_host().strips(), self.shape, self.dtype)

    def strips(self) -> Iterator[NDArray[np.uint16]]:
        """Patterns [up to 128, K] of each row of tiles (host buffers)."""
        return decode_strips(self.slots.strips(), self.picks, self.columns, self.shape, self.window, self._parts)

    @property
    def _parts(self) -> Parts:
        return PARTS_OF[self.part_rows]
