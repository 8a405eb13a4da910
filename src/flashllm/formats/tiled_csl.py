# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL: one 32-bit word per stored element, by tiles of 128 x 64; see docs/formats/tiled_csl.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
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
    TILE_K,
    TILE_M,
    WORDS_PER_VECTOR,
    EncodedTiles,
    Order,
    encode_strips,
    rows_and_columns,
    tile_grid,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TILE_K", "TILE_M", "WORDS_PER_VECTOR", "Order", "TiledCSL", "check_order"]

FORMAT_NAME = "tiled-csl"


def check_order(order: str) -> Order:
    """``order`` itself when it names an order of the words in a tile, else ``ArgumentError``."""
    for known in ORDERS:
        if order == known:
            return known
    raise ArgumentError("order", expected=" or ".join(map(repr, ORDERS)), got=repr(order))


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledCSL:
    """A sparse weight W [M, K] in Tiled-CSL.

    ``words`` is uint32 [padded elements]: value bits in the low half, location in the tile in the high
    half. ``tile_offsets`` is int32 [tiles + 2], in units of 4 words: where each tile starts, the total,
    the total again. ``nnz`` counts the stored elements without padding; ``max_tile_words`` is the
    largest padded tile. ``order`` says how the words of a tile are arranged: ``"bank"`` for few
    shared-memory conflicts, ``"row"`` for plain row-major.

    Both buffers are NumPy arrays or both are CuPy arrays. The constructor checks fields, types and
    lengths, which needs no look into the buffers; ``validate()`` checks the content too.
    """

    BUFFERS: ClassVar[tuple[str, ...]] = ("words", "tile_offsets")

    shape: tuple[int, int]
    dtype: DType
    nnz: int
    words: Any = field(repr=False)
    tile_offsets: Any = field(repr=False)
    order: Order
    max_tile_words: int

    def __post_init__(self) -> None:
        self._check_structure(None)

    def _check_structure(self, path: str | None) -> None:
        check_fields(
            shape=self.shape,
            dtype=self.dtype,
            nnz=self.nnz,
            order=self.order,
            max_tile_words=self.max_tile_words,
            path=path,
        )
        check_buffers(shape=self.shape, words=self.words, tile_offsets=self.tile_offsets, path=path)
        if is_cupy(self.words) != is_cupy(self.tile_offsets):
            raise FormatError(field="tile_offsets", expected="on the side of words", got="host and device", path=path)

    @classmethod
    def from_dense(
        cls, a: Any, *, dtype: str | None = None, order: str = "bank", report: ReportCallback | None = None
    ) -> TiledCSL:
        """Encode a dense matrix [M, K].

        ``a`` is a NumPy array of float16, bfloat16 (ml_dtypes), float32 or float64, or a CuPy array of
        float16, bfloat16, float32 or, with ``dtype="bf16"``, uint16 bit patterns; a CuPy array is
        encoded on its device. ``dtype`` is ``"fp16"`` or ``"bf16"``; by default bf16 for bf16 input,
        else fp16. Other types are rounded to nearest even; ``report`` is called once with the
        ``RoundingReport`` of that. Raises ``ArgumentError``.
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

        Duplicate positions are summed in the type of the source (integers: float64), the sums rounded as
        in ``from_dense``. Raises ``ArgumentError`` for another type, ``FormatError`` for index arrays
        that are not sound.
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
    def format(self) -> str:
        """``"tiled-csl"``."""
        return FORMAT_NAME

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along M and along K."""
        return tile_grid(self.shape)

    @property
    def density(self) -> float:
        """``nnz / (M * K)``."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return int(self.words.nbytes) + int(self.tile_offsets.nbytes)

    @property
    def bytes_per_element(self) -> float:
        """``nbytes / (M * K)``; a dense fp16 matrix has 2."""
        return self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def is_device(self) -> bool:
        """True when the buffers are CuPy arrays."""
        return is_cupy(self.words)

    def arrays(self) -> dict[str, Any]:
        """``{"words": ..., "tile_offsets": ...}``."""
        return {name: getattr(self, name) for name in self.BUFFERS}

    def metadata(self) -> dict[str, Any]:
        """Shape, dtype, nnz, order and max_tile_words, as JSON takes them."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "nnz": self.nnz,
            "order": self.order,
            "max_tile_words": self.max_tile_words,
        }

    @classmethod
    def from_parts(cls, metadata: dict[str, Any], arrays: dict[str, Any], *, path: str | None = None) -> TiledCSL:
        """A weight from ``metadata()`` and ``arrays()``, or ``FormatError``; ``path`` is for messages."""
        for name in ("shape", "dtype", "nnz", "order", "max_tile_words"):
            if name not in metadata:
                raise FormatError(field=name, expected="an entry in the metadata", got="none", path=path)
        for name in cls.BUFFERS:
            if name not in arrays:
                raise FormatError(field=name, expected="a buffer", got="none", path=path)
        fields = {name: metadata[name] for name in ("shape", "dtype", "nnz", "order", "max_tile_words")}
        check_fields(**fields, path=path)
        fields["shape"] = tuple(fields["shape"])
        check_buffers(shape=fields["shape"], words=arrays["words"], tile_offsets=arrays["tile_offsets"], path=path)
        return cls(**fields, words=arrays["words"], tile_offsets=arrays["tile_offsets"])

    def validate(self, *, path: str | None = None) -> None:
        """Check every invariant; ``FormatError`` names field and index, what was expected and what found.

        O(words + tiles) on the host; device buffers are copied there. ``path`` is for messages. Of the
        order of the words in a tile nothing is checked: results do not depend on it.
        """
        self._check_structure(path)
        host = self.to_host()
        check_content(
            shape=host.shape,
            nnz=host.nnz,
            max_tile_words=host.max_tile_words,
            words=host.words,
            tile_offsets=host.tile_offsets,
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

    def to_device(self) -> TiledCSL:
        """The same weight on the current CUDA device (itself when it is there already).

        Raises ``MissingDependencyError`` without a usable GPU, ``DeviceMemoryError``.
        """
        from flashllm.device import current_device, gpu_problem, memory_errors

        if (problem := gpu_problem()) is not None:
            raise MissingDependencyError(f"to_device: {problem}; see `flashllm doctor`")
        import cupy

        if self.is_device and int(self.words.device.id) == current_device():
            return self
        with memory_errors("weight", self.nbytes):
            return self._with(cupy.asarray(self.words), cupy.asarray(self.tile_offsets))

    def to_host(self) -> TiledCSL:
        """The same weight with NumPy buffers (itself when they are)."""
        if not self.is_device:
            return self
        return self._with(self.words.get(), self.tile_offsets.get())

    def _with(self, words: Any, tile_offsets: Any) -> TiledCSL:
        return TiledCSL(
            shape=self.shape,
            dtype=self.dtype,
            nnz=self.nnz,
            words=words,
            tile_offsets=tile_offsets,
            order=self.order,
            max_tile_words=self.max_tile_words,
        )

    def save(self, path: str | Path, *, name: str = "weight") -> None:
        """Write a safetensors file that holds this weight under ``name``; see ``flashllm.io.container``."""
        from flashllm.io.container import save_weights

        save_weights(path, {name: self})

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None, validate: bool = True) -> TiledCSL:
        """Read a Tiled-CSL weight from a file of ``save``; see ``flashllm.io.container.load_weight``."""
        from flashllm.io.container import load_weight

        weight = load_weight(path, name=name, validate=validate)
        if not isinstance(weight, cls):
            raise FormatError(field="format", expected=FORMAT_NAME, got=weight.format, path=str(path))
        return weight
