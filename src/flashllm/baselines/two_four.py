# SPDX-License-Identifier: Apache-2.0
"""A 2:4 matrix on sparse tensor cores by our own kernel, ``cuda/baselines/two_four.cu``.

It stands for what cuSPARSELt computes in SparTA (Zheng et al., OSDI'22) as the Flash-LLM paper composes it.

Format: of every four neighbours along K two are stored, whatever their values, as 16 bits each and a place of 2 bits,
as ``mma.sp`` needs them (PTX ISA, "Warp-level matrix instructions", sparse matrix storage): 9/16 of the dense bytes. A
group with fewer nonzeros stores zeros at the lowest of its other places, and the places of a group increase. M and K
are padded to tiles of 128 x 64, and tiles are stored row by row. A tile is 4096 values and then 512 words of metadata,
each in the order in which the lanes of the four warps, 32 rows each, load them:

* values [warp][step of 32 columns][16 rows][lane 4 g + t][8]: the A fragment of ``mma.sp.m16n8k32``, where the value
  4 j + 2 h + e of a lane is element e of group 4 j + t, row g + 8 h;
* metadata [warp][lane 4 g + 2 i + j][step][h]: the places in groups 4 j to 4 j + 3 of row g + 8 h of the i-th 16
  rows. One word (two h) serves both fragments of 16 rows, since ``mma.sp`` lets a selector say which lanes' metadata
  count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from flashllm.baselines.baseline import Step
from flashllm.baselines.csr import check_dense
from flashllm.baselines.pattern_24 import GROUP, KEPT
from flashllm.errors import ArgumentError
from flashllm.formats.bits import MAGNITUDE
from flashllm.formats.sources import array_module
from flashllm.formats.tiles import TILE_K, TILE_M, tile_grid
from flashllm.jit.spec import KernelSpec
from flashllm.matmul.tensor_cores import N_BLOCKS, cxx_bool, n_block_for

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS = (1, 2, 3, 4, 6, 8)
"""Splits of K to try."""
THREADS = 128
REDUCE_THREADS = 256
TILE_VALUES = TILE_M * TILE_K // 2
TILE_METADATA = TILE_M * TILE_K // 16
"""Words of 16 bits, each with the places in four groups."""
TILE_BYTES = 2 * (TILE_VALUES + TILE_METADATA)

# Tensor cores truncate every fp32 sum towards zero; from about 400 steps of 32 columns on the drift is visible beside
# the rounding of the result. Longer rows are split.
_MAX_CHAIN_TILES = 384 * 32 // TILE_K
# By n_block: tiles of rows per block, stages, blocks that share an SM. Two tiles of rows halve what x costs, which with
# 64 columns is nearly as much L2 traffic as W; a block stays below the 99 KiB of shared memory that sm_86 has.
_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    8: ((1, 5, 4),),
    16: ((1, 5, 4),),
    32: ((1, 4, 4), (2, 4, 2)),
    64: ((2, 3, 2),),
}
_STRIP_ELEMENTS = 1 << 24


def _places(mask: int) -> int:
    """Places of the two stored elements of a group whose nonzeros are ``mask``: the first in bits 0 and 1."""
    nonzero = [place for place in range(GROUP) if mask >> place & 1][:KEPT]
    others = [place for place in range(GROUP) if not mask >> place & 1]
    low, high = sorted((nonzero + others)[:KEPT])
    return low | high << 2


_PLACES = np.array([_places(mask) for mask in range(1 << GROUP)], np.uint8)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel and how many blocks share K."""

    n_block: int
    """Columns of the product that one block computes."""
    row_tiles: int
    """Tiles of 128 rows that one block computes."""
    splits: int
    column: bool = False
    """x [K, N] and y [M, N] instead of x [N, K] and y [N, M]."""
    add: bool = False
    """Add to y instead of writing it."""

    @property
    def label(self) -> str:
        """Rows (M) and columns of the product (N) of a block, split-K (S)."""
        return f"two_four<M={self.row_tiles * TILE_M},N={self.n_block},S={self.splits}>"

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance of this choice."""
        return _product_spec(self.n_block, self.row_tiles, self.column, self.add)


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoFour:
    """An fp16 matrix that has at most two nonzeros in every group of four columns."""

    SYSTEM: ClassVar[str] = "mma-2:4"
    FORMAT: ClassVar[str] = "2:4"
    LAYOUT: ClassVar[Literal["row", "column"]] = "row"

    shape: tuple[int, int]
    tiles: Any
    """uint16 [tiles along M, tiles along K, 4096 values and 512 words of metadata]."""

    @property
    def nbytes(self) -> int:
        """9/16 of the dense bytes of the padded matrix."""
        return int(self.tiles.nbytes)

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side it is on.

        Raises :class:`ArgumentError` for another type, and where a group has more than two nonzeros.
        """
        return cls._encode(dense, refuse=True)

    @classmethod
    def first_two(cls, dense: Any) -> Self:
        """The 2:4 part of any matrix: the first two nonzeros, in order of position, of every group of four."""
        return cls._encode(dense, refuse=False)

    @classmethod
    def _encode(cls, dense: Any, *, refuse: bool) -> Self:
        xp = check_dense(dense)
        shape = (int(dense.shape[0]), int(dense.shape[1]))
        tiles_m, tiles_k = tile_grid(shape)
        tiles = xp.empty((tiles_m, tiles_k, TILE_VALUES + TILE_METADATA), np.uint16)
        places_of = xp.asarray(_PLACES)
        for start, groups in strips(dense):
            nonzero = (groups != 0).view(np.uint8)
            if refuse:
                _refuse_crowded(nonzero, start)
            mask = nonzero[..., 0] | nonzero[..., 1] << 1 | nonzero[..., 2] << 2 | nonzero[..., 3] << 3
            places = places_of[mask]
            strip = tiles[start // TILE_M : (start + len(groups)) // TILE_M]
            strip[..., :TILE_VALUES] = _values_in_lane_order(groups, places)
            strip[..., TILE_VALUES:] = _metadata_in_lane_order(places)
        return cls(shape=shape, tiles=tiles)

    def to_dense(self) -> Any:
        """The float16 [M, K] matrix, on the side this weight is on; pruned elements are +0."""
        rows, columns = self.shape
        xp = array_module(self.tiles)
        dense = xp.empty(self.shape, np.uint16)
        for start, count in _strip_bounds(self.shape):
            strip = self.tiles[start // TILE_M : (start + count) // TILE_M]
            stop = min(start + count, rows)
            dense[start:stop] = _groups_of(xp, strip).reshape(count, -1)[: stop - start, :columns]
        return dense.view(np.float16)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return type(self)(shape=self.shape, tiles=self.tiles.copy())

    def choices(self, n: int, *, sm_count: int) -> tuple[Choice, ...]:
        """What to try for ``n`` columns of x, the most promising first."""
        return self.choices_as(n, sm_count=sm_count)

    def choices_as(self, n: int, *, sm_count: int, column: bool = False, add: bool = False) -> tuple[Choice, ...]:
        """The same for the ``column`` layout, or to add to y."""
        if n < 1 or sm_count < 1:
            raise ArgumentError("n, sm_count", expected="numbers >= 1", got=f"{n}, {sm_count}")
        tiles_m, tiles_k = tile_grid(self.shape)
        n_block = n_block_for(n)
        fewest = -(-tiles_k // _MAX_CHAIN_TILES)
        splits = [s for s in SPLITS if fewest <= s <= tiles_k] or [fewest]

        def cost(choice: Choice) -> int:
            """Tiles the busiest multiprocessor reads, plus two per row of tiles to fill pipelines and pass on sums."""
            blocks = -(-n // n_block) * -(-tiles_m // choice.row_tiles) * choice.splits
            return -(-blocks // sm_count) * (-(-tiles_k // choice.splits) + 2) * choice.row_tiles

        found = [
            Choice(n_block=n_block, row_tiles=row_tiles, splits=s, column=column, add=add)
            for row_tiles, _, _ in _SHAPES[n_block]
            for s in splits
        ]
        return tuple(sorted(found, key=cost))

    def workspace_bytes(self, n: int, choice: Choice) -> int:
        """With split-K, fp32 partial sums of every split."""
        return 16 * _vectors(self.shape[0] * n) * choice.splits if choice.splits > 1 else 0

    def steps(self, x: Any, y: Any, workspace: Any, choice: Choice) -> tuple[Step, ...]:
        """The product, and with split-K the sum over the splits. ``x`` and ``y`` are laid out as ``choice`` says."""
        rows, columns = self.shape
        n = int(x.shape[1 if choice.column else 0])
        wanted = ((columns, n), (rows, n)) if choice.column else ((n, columns), (n, rows))
        if (tuple(x.shape), tuple(y.shape)) != wanted:
            raise ArgumentError("x, y", expected=f"shapes {wanted}", got=f"{tuple(x.shape)}, {tuple(y.shape)}")
        if workspace.nbytes < (needed := self.workspace_bytes(n, choice)):
            raise ArgumentError("workspace", expected=f"at least {needed} bytes", got=f"{workspace.nbytes} bytes")
        blocks = -(-n // choice.n_block) * -(-self.tiles.shape[0] // choice.row_tiles) * choice.splits
        numbers = map(np.int32, (rows, n, columns, choice.splits))
        product = Step(spec=choice.spec, grid=(blocks,), args=(x, self.tiles, y, workspace, *numbers))
        if choice.splits == 1:
            return (product,)
        elements = rows * n
        reduction = Step(
            spec=_reduce_spec(choice.add),
            grid=(-(-_vectors(elements) // REDUCE_THREADS),),
            args=(workspace, y, np.int64(elements), np.int32(choice.splits)),
        )
        return product, reduction


def specs() -> tuple[KernelSpec, ...]:
    """Every kernel that :meth:`TwoFour.choices` can name."""
    return specs_as()


def specs_as(*, column: bool = False, add: bool = False) -> tuple[KernelSpec, ...]:
    """The same for :meth:`TwoFour.choices_as`."""
    products = [
        _product_spec(n_block, row_tiles, column, add) for n_block in N_BLOCKS for row_tiles, _, _ in _SHAPES[n_block]
    ]
    return (*products, _reduce_spec(add))


def strips(dense: Any) -> Iterator[tuple[int, Any]]:
    """(first row, uint16 [rows, groups, 4]) for strips of whole tiles of rows: padded, and every zero is +0."""
    columns = dense.shape[1]
    xp = array_module(dense)
    width = tile_grid(dense.shape)[1] * TILE_K
    for start, count in _strip_bounds(dense.shape):
        bits = dense[start : start + count].view(np.uint16)
        strip = xp.zeros((count, width), np.uint16)
        strip[: len(bits), :columns] = xp.where(bits & MAGNITUDE, bits, np.uint16(0))
        yield start, strip.reshape(count, -1, GROUP)


def _strip_bounds(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of strips of whole tiles of rows, few enough that temporaries stay small."""
    tiles_m, tiles_k = tile_grid(shape)
    most = max(1, _STRIP_ELEMENTS // (TILE_M * TILE_K * tiles_k))
    for tile in range(0, tiles_m, most):
        yield tile * TILE_M, min(most, tiles_m - tile) * TILE_M


def _refuse_crowded(nonzero: Any, start: int) -> None:
    crowded = nonzero.sum(axis=-1, dtype=np.uint8) > KEPT
    if crowded.any():
        row, group = divmod(int(crowded.argmax()), crowded.shape[1])
        first = group * GROUP
        raise ArgumentError(
            "dense",
            expected="at most two nonzeros in every four neighbours along K",
            got=f"{int(nonzero[row, group].sum())} in row {start + row}, columns {first} to {first + GROUP - 1}",
        )


def _values_in_lane_order(groups: Any, places: Any) -> Any:
    """uint16 [tiles along M, tiles along K, 4096] of the elements that ``places`` names."""
    chosen = [_select(groups, places >> shift & 3) for shift in (0, 2)]
    xp = array_module(groups)
    stored = xp.stack(chosen, axis=-1)
    # tile, warp, i, h, g; tile, step, j, t; e -> tiles, warp, step, i, lane (g, t), register (j, h), e
    axes = stored.reshape(-1, 4, 2, 2, 8, groups.shape[1] // 16, 2, 2, 4, 2)
    ordered = axes.transpose(0, 5, 1, 6, 2, 4, 8, 7, 3, 9)
    return ordered.reshape(*ordered.shape[:2], TILE_VALUES)


def _select(groups: Any, place: Any) -> Any:
    """Element ``place`` of every group."""
    xp = array_module(groups)
    chosen = groups[..., 0]
    for p in range(1, GROUP):
        chosen = xp.where(place == p, groups[..., p], chosen)
    return chosen


def _metadata_in_lane_order(places: Any) -> Any:
    """uint16 [tiles along M, tiles along K, 512]: four groups per word, the first in the lowest bits."""
    four = places.reshape(len(places), -1, 4).astype(np.uint16)
    words = four[..., 0] | four[..., 1] << 4 | four[..., 2] << 8 | four[..., 3] << 12
    # tile, warp, i, h, g; tile, step, j -> tiles, warp, lane (g, i, j), step, h
    axes = words.reshape(-1, 4, 2, 2, 8, places.shape[1] // 16, 2, 2)
    ordered = axes.transpose(0, 5, 1, 4, 2, 7, 6, 3)
    return ordered.reshape(*ordered.shape[:2], TILE_METADATA)


def _groups_of(xp: Any, tiles: Any) -> Any:
    """uint16 [rows, groups, 4] of whole rows of tiles: the two orders above, undone."""
    tiles_m, tiles_k = tiles.shape[:2]
    rows, groups = tiles_m * TILE_M, tiles_k * TILE_K // GROUP
    values = tiles[..., :TILE_VALUES].reshape(tiles_m, tiles_k, 4, 2, 2, 8, 4, 2, 2, 2)
    stored = values.transpose(0, 2, 4, 8, 5, 1, 3, 7, 6, 9).reshape(rows, groups, 2)
    metadata = tiles[..., TILE_VALUES:].reshape(tiles_m, tiles_k, 4, 8, 2, 2, 2, 2)
    words = metadata.transpose(0, 2, 4, 7, 3, 1, 6, 5).reshape(rows, groups // 4)
    places = xp.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], axis=-1).reshape(rows, groups)
    dense = xp.zeros((rows, groups, GROUP), np.uint16)
    for slot in (0, 1):
        for place in range(GROUP):
            dense[..., place] |= xp.where((places >> 2 * slot & 3) == place, stored[..., slot], np.uint16(0))
    return dense


def _vectors(elements: int) -> int:
    """Groups of four fp32 partial sums."""
    return -(-elements // 4)


@cache
def _product_spec(n_block: int, row_tiles: int, column: bool, add: bool) -> KernelSpec:
    stages, resident_blocks = next((s, b) for r, s, b in _SHAPES[n_block] if r == row_tiles)
    return KernelSpec(
        name="two_four",
        source="baselines/two_four.cu",
        function="flashllm::spmm_two_four",
        template=(
            ("kN", str(n_block)),
            ("kTiles", str(row_tiles)),
            ("kStages", str(stages)),
            ("kMinBlocks", str(resident_blocks)),
            ("kColumn", cxx_bool(column)),
            ("kAdd", cxx_bool(add)),
        ),
        threads=THREADS,
        shared_bytes=stages * (row_tiles * TILE_BYTES + n_block * TILE_K * 2),
    )


@cache
def _reduce_spec(add: bool) -> KernelSpec:
    return KernelSpec(
        name="two_four_reduce",
        source="baselines/two_four.cu",
        function="flashllm::reduce_two_four",
        template=(("kAdd", cxx_bool(add)),),
        threads=REDUCE_THREADS,
    )
