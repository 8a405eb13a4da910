# SPDX-License-Identifier: Apache-2.0
"""TCA-BME, the bitmap format of SpInfer (Fan et al., EuroSys'25), and its product: cuda/baselines/tca_bme.cu.

Written anew after the paper, with its tile sizes, order of values, decoding, pipeline and split-K. What differs: sums
of splits are kept in fp32, not fp16; splits are of equal length, so none runs out of tiles; shared memory is sized by
the fullest tile, so any density works; offsets are not read past their end; any M, N and K work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from flashllm.baselines.baseline import Step
from flashllm.baselines.csr import check_dense
from flashllm.errors import ArgumentError
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.sources import array_module
from flashllm.jit.spec import KernelSpec
from flashllm.matmul.tensor_cores import N_BLOCKS, n_block_for

if TYPE_CHECKING:
    from typing_extensions import Self

TILE = 64
"""Rows and columns of a GroupTile, which one block decodes at a time."""
MEDIANS = 4
"""Median tiles of a GroupTile, 16 x 64, one per warp."""
BITMAPS = 64
"""BitmapTiles of a GroupTile, 8 x 8."""
VECTOR = 8
"""Values in 16 bytes; a GroupTile stores a multiple of these."""
SPLITS = (1, 2, 3, 4, 5, 6, 7, 9)
"""Splits of K: those of the published tables for SpInfer and Flash-LLM."""
CAPACITIES = (2304, 4096)
"""Values that fit in shared memory: as in the published kernel (56 % of a GroupTile), or a whole GroupTile."""
MAX_VALUES = 2**31 - 1
"""Offsets are int32."""

_THREADS = 128
_HELPER_THREADS = 256
_TILE_VALUES = TILE * TILE
_STRIP_ELEMENTS = 1 << 24  # of W, encoded at once; temporaries take some 16 bytes each
_SOURCE = "baselines/tca_bme.cu"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel and the split of K."""

    n_block: int
    """Columns of x one block computes."""
    split: int
    """Blocks that share the GroupTiles of one row; from 2 on a second kernel adds their sums."""
    capacity: int
    """Values there is room for."""

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance."""
        return _spec(self.n_block, self.capacity)

    @property
    def label(self) -> str:
        """E.g. ``tca_bme<kN=16> split 4``."""
        return f"{self.spec.label} split {self.split}"


@cache
def _spec(n_block: int, capacity: int) -> KernelSpec:
    return KernelSpec(
        name="tca_bme",
        source=_SOURCE,
        function="flashllm::spmm_tca_bme",
        template=(("kN", str(n_block)),),
        threads=_THREADS,
        shared_bytes=2 * n_block * TILE * 2 + BITMAPS * 8 + capacity * 2,
    )


_SUM = KernelSpec(name="tca_bme_sum", source=_SOURCE, function="flashllm::sum_tca_bme", threads=_HELPER_THREADS)
_PAD = KernelSpec(name="tca_bme_pad", source=_SOURCE, function="flashllm::pad_tca_bme", threads=_HELPER_THREADS)


@cache
def specs() -> tuple[KernelSpec, ...]:
    """Every kernel that the steps of a product can name."""
    return (*(_spec(n_block, capacity) for n_block in N_BLOCKS for capacity in CAPACITIES), _SUM, _PAD)


@dataclass(frozen=True, kw_only=True, eq=False)
class TcaBme:
    """fp16 W[M, K] in TCA-BME.

    GroupTiles are stored row by row. Each has its median tiles from top to bottom, these their TCTiles of 16 x 16 from
    left to right, and these their BitmapTiles in the order top left, bottom left, top right, bottom right: registers 0
    to 3 of an mma fragment.
    """

    SYSTEM: ClassVar[str] = "tca-bme"
    FORMAT: ClassVar[str] = "tca-bme"
    LAYOUT: ClassVar[Literal["row", "column"]] = "row"

    shape: tuple[int, int]
    nnz: int
    fullest: int
    """Values of the fullest GroupTile, padding included."""
    values: Any
    """uint16, fp16 bits of what is not zero, in the order of the bits of all bitmaps; each GroupTile's values are
    padded with zeros to a multiple of 8."""
    bitmaps: Any
    """uint64 [tiles * 64]: bit 8 i + j of a BitmapTile says that row i, column j is stored."""
    tile_offsets: Any
    """int32 [tiles + 1]: where the values of each GroupTile begin, and where the last one's end."""
    median_offsets: Any
    """int32 [tiles * 4]: where the values of each median tile begin, counted from its GroupTile's first."""

    @property
    def tiles(self) -> tuple[int, int]:
        """GroupTiles along M and along K."""
        return -(-self.shape[0] // TILE), -(-self.shape[1] // TILE)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    @property
    def capacity(self) -> int:
        """The smallest of :data:`CAPACITIES` that holds the values of any GroupTile."""
        return next(capacity for capacity in CAPACITIES if capacity >= self.fullest)

    def arrays(self) -> dict[str, Any]:
        """The arrays by name, in the order of the kernel's parameters."""
        return {name: getattr(self, name) for name in ("values", "bitmaps", "tile_offsets", "median_offsets")}

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side it is on.

        Raises :class:`ArgumentError` for another type, shape or layout, and for more than 2^31 - 1 stored values.
        """
        xp = check_dense(dense)
        rows, columns = dense.shape
        bits = dense.view(np.uint16)
        parts = [_encode(xp, _tiles_of(xp, bits[strip])) for strip in _strips(rows, columns)]
        values, bitmaps, counts = (xp.concatenate(arrays) for arrays in zip(*parts, strict=True))
        stored = _padded(counts.sum(axis=1))
        ends = xp.cumsum(stored)
        _check_total(int(ends[-1]))
        tile_offsets = xp.zeros(ends.size + 1, xp.int32)
        tile_offsets[1:] = ends
        return cls(
            shape=(rows, columns),
            nnz=int(counts.sum()),
            fullest=int(stored.max()),
            values=values,
            bitmaps=bitmaps,
            tile_offsets=tile_offsets,
            median_offsets=(xp.cumsum(counts, axis=1) - counts).astype(xp.int32).reshape(-1),
        )

    def to_dense(self) -> Any:
        """The matrix as float16 [M, K], on the side the weight is on; pruned elements are +0.0."""
        xp = array_module(self.values)
        rows, columns = self.shape
        out = xp.zeros(self.shape, xp.uint16)
        for strip in _strips(rows, columns):
            height = min(strip.stop, rows) - strip.start
            first, last = (-(-row // TILE) * self.tiles[1] for row in (strip.start, strip.start + height))
            octets = self.bitmaps[first * BITMAPS : last * BITMAPS].view(np.uint8)
            kept = xp.unpackbits(octets, bitorder="little").view(np.bool_).reshape(-1, _TILE_VALUES)
            tiles = xp.zeros((last - first, _TILE_VALUES + VECTOR), xp.uint16)
            begin, end = int(self.tile_offsets[first]), int(self.tile_offsets[last])
            tiles.reshape(-1)[xp.flatnonzero(_with_padding(xp, kept, kept.sum(axis=1)))] = self.values[begin:end]
            split = tiles[:, :_TILE_VALUES].reshape(-1, self.tiles[1], MEDIANS, 4, 2, 2, 8, 8)
            whole = split.transpose(0, 2, 5, 6, 1, 3, 4, 7).reshape(-1, self.tiles[1] * TILE)
            out[strip] = whole[:height, :columns]
        return out.view(xp.float16)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return replace(self, **{name: array.copy() for name, array in self.arrays().items()})

    def choices(self, n: int, *, sm_count: int) -> tuple[Choice, ...]:
        """Every split of :data:`SPLITS` that has a GroupTile for each of its blocks."""
        if n < 1:
            raise ArgumentError("n", expected="at least one column of x", got=str(n))
        n_block = n_block_for(n)
        return tuple(
            Choice(n_block=n_block, split=split, capacity=self.capacity) for split in SPLITS if split <= self.tiles[1]
        )

    def workspace_bytes(self, n: int, choice: Choice) -> int:
        """fp32 sums of every split if there are several, and x again if its rows must be padded."""
        return self._partial_bytes(n, choice) + (n * self._row_length * 2 if self._pads else 0)

    def steps(self, x: Any, y: Any, workspace: Any, choice: Choice) -> tuple[Step, ...]:
        """One to three launches that write all of y[N, M] from x[N, K].

        Rows of x are padded first where K is no multiple of 8; where K is split, the sums are added last.
        """
        rows, columns = self.shape
        n = self._check(x, y, workspace, choice)
        sums = self._partial_bytes(n, choice)
        partial, length = workspace[:sums], np.int32(self._row_length)
        launches = []
        if self._pads:
            padded = workspace[sums : self.workspace_bytes(n, choice)]
            grid = (-(-n * self._row_length // _HELPER_THREADS),)
            launches.append(Step(spec=_PAD, grid=grid, args=(x, padded, np.int32(n), np.int32(columns), length)))
            x = padded
        grid = (-(-n // choice.n_block) * self.tiles[0] * choice.split,)
        numbers = (np.int32(rows), np.int32(n))
        pointers = (x, *self.arrays().values(), y, partial)
        args = (*pointers, *numbers, length, np.int32(choice.split))
        launches.append(Step(spec=choice.spec, grid=grid, args=args))
        if choice.split > 1:
            grid = (-(-n * self.tiles[0] * TILE // 4 // _HELPER_THREADS),)
            launches.append(Step(spec=_SUM, grid=grid, args=(partial, y, *numbers, np.int32(choice.split))))
        return tuple(launches)

    @property
    def _row_length(self) -> int:
        """Elements of a row of x as the kernel reads it."""
        return -(-self.shape[1] // VECTOR) * VECTOR

    @property
    def _pads(self) -> bool:
        return self._row_length != self.shape[1]

    def _partial_bytes(self, n: int, choice: Choice) -> int:
        return choice.split * n * self.tiles[0] * TILE * 4 if choice.split > 1 else 0

    def _check(self, x: Any, y: Any, workspace: Any, choice: Choice) -> int:
        """Columns of x, or :class:`ArgumentError` for what the kernels would read or write out of bounds."""
        rows, columns = self.shape
        if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] != columns or x.dtype != np.float16:
            got = f"{x.dtype} {list(x.shape)}"
            raise ArgumentError("x", expected=f"float16 of shape [N >= 1, K = {columns}]", got=got)
        n = int(x.shape[0])
        if y.shape != (n, rows) or y.dtype != np.float16:
            raise ArgumentError("y", expected=f"float16 of shape {[n, rows]}", got=f"{y.dtype} {list(y.shape)}")
        for name, array in (("x", x), ("y", y)):
            if not array.flags.c_contiguous:
                raise ArgumentError(name, expected="a C-contiguous array", got=f"strides {array.strides}")
        if not 1 <= choice.split <= self.tiles[1]:
            raise ArgumentError("choice", expected=f"a split of 1..{self.tiles[1]}", got=str(choice.split))
        if choice.capacity < self.fullest:
            raise ArgumentError("choice", expected=f"room for {self.fullest} values", got=str(choice.capacity))
        needed = self.workspace_bytes(n, choice)
        if workspace.dtype != np.uint8 or workspace.ndim != 1 or workspace.size < needed:
            got = f"{workspace.dtype} {list(workspace.shape)}"
            raise ArgumentError("workspace", expected=f"uint8, at least {needed} bytes", got=got)
        return n


def _padded(count: Any) -> Any:
    return (count + VECTOR - 1) // VECTOR * VECTOR


def _check_total(values: int) -> None:
    if values > MAX_VALUES:
        raise ArgumentError("dense", expected=f"at most {MAX_VALUES} stored values", got=str(values))


def _strips(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows, in whole GroupTiles, with up to about :data:`_STRIP_ELEMENTS` elements."""
    height = max(1, _STRIP_ELEMENTS // (_padded_to_tiles(columns) * TILE)) * TILE
    for first in range(0, rows, height):
        yield slice(first, first + height)


def _padded_to_tiles(extent: int) -> int:
    return -(-extent // TILE) * TILE


def _tiles_of(xp: Any, strip: Any) -> Any:
    """[tiles, 4096]: the GroupTiles of a strip, each in the order of its bitmaps; zeros beyond the edges."""
    rows, columns = strip.shape
    height, width = _padded_to_tiles(rows), _padded_to_tiles(columns)
    if (height, width) != (rows, columns):
        whole = xp.zeros((height, width), xp.uint16)
        whole[:rows, :columns] = strip
        strip = whole
    # row: GroupTile, median tile, half of the TCTile, row; column: GroupTile, TCTile, half of it, column
    split = strip.reshape(height // TILE, MEDIANS, 2, 8, width // TILE, 4, 2, 8)
    return split.transpose(0, 4, 1, 5, 6, 2, 3, 7).reshape(-1, _TILE_VALUES)


def _with_padding(xp: Any, kept: Any, counts: Any) -> Any:
    """``kept`` [tiles, 4096] and 8 more places per tile, of which enough are kept to make the count a multiple of 8."""
    out = xp.empty((kept.shape[0], _TILE_VALUES + VECTOR), xp.bool_)
    out[:, :_TILE_VALUES] = kept
    out[:, _TILE_VALUES:] = xp.arange(VECTOR) < (_padded(counts) - counts)[:, None]
    return out


def _encode(xp: Any, tiles: Any) -> tuple[Any, Any, Any]:
    """Values with padding, bitmaps, and value counts of median tiles [tiles, 4], of GroupTiles [tiles, 4096]."""
    kept = (tiles & MAGNITUDE) != 0
    counts = kept.reshape(-1, MEDIANS, _TILE_VALUES // MEDIANS).sum(axis=2, dtype=xp.int64)
    longer = xp.zeros((tiles.shape[0], _TILE_VALUES + VECTOR), xp.uint16)
    longer[:, :_TILE_VALUES] = tiles
    values = longer[_with_padding(xp, kept, counts.sum(axis=1))]
    return values, xp.packbits(kept.reshape(-1), bitorder="little").view(np.uint64), counts
