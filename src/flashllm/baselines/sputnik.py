# SPDX-License-Identifier: Apache-2.0
"""Sputnik's fp16 SpMM, host side of ``cuda/baselines/sputnik.cu``: CSR with 16-bit columns, no tensor cores.

Gale, Zaharia, Young, Elsen: "Sparse GPU Kernels for Deep Learning", SC'20. Tile sizes are those that its half-precision
dispatch chooses by N; what that refuses (odd N, K above 32767) works here.
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
from flashllm.jit.spec import MAX_GRID_YZ, KernelSpec

if TYPE_CHECKING:
    from typing_extensions import Self

PAD = 4
"""Rows are padded to a multiple of this many elements."""
MAX_COLUMNS = 65535
MAX_STORED = 2**31 - 1
_VECTOR = 8  # elements of the widest load of stored elements: the arrays end with a whole one
_STRIP_ELEMENTS = 1 << 23  # of W encoded or decoded at once: temporaries take at most 50 bytes for each
_WARP = 32
_ROW_STRIDE_BYTES = 272  # of shared memory per row: 64 values, 64 columns and 16 bytes against bank conflicts


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One instance of the kernel: a warp's tile of y, and how many of its threads share a row."""

    columns: int
    width: int
    """Threads per row."""

    @property
    def rows(self) -> int:
        """Rows of y per warp."""
        return _WARP // self.width

    @property
    def vector(self) -> int:
        """Columns per thread, loaded at once; N must be a multiple of this."""
        return self.columns // self.width

    @property
    def label(self) -> str:
        """Rows (Y) and columns (X) of the tile, threads per row (W)."""
        return f"sputnik<Y={self.rows},X={self.columns},W={self.width}>"

    @property
    def spec(self) -> KernelSpec:
        """The compiled instance."""
        return _spec(self)


@cache
def _spec(choice: Choice) -> KernelSpec:
    return KernelSpec(
        name="sputnik",
        source="baselines/sputnik.cu",
        function="flashllm::spmm_sputnik",
        template=(
            ("kRows", str(choice.rows)),
            ("kColumns", str(choice.columns)),
            ("kWidth", str(choice.width)),
        ),
        threads=_WARP,
        shared_bytes=choice.rows * _ROW_STRIDE_BYTES,
    )


def choices(n: int) -> tuple[Choice, ...]:
    """The published configuration for ``n`` columns of x, then a likely better one where N allows it.

    The published configurations are 16 columns in vectors of 2, 32 in vectors of 4, and 64 in vectors of 8 or, where N
    is not a multiple of 64, of 4. Narrower vectors on correspondingly more threads per row, for an N that is not a
    multiple of these, are our addition. So is the second configuration: half as many loads of twice the size or, where
    loads have the largest size already, twice the warps.
    """
    if n < 1:
        raise ArgumentError("n", expected="columns of x >= 1", got=str(n))
    if n <= 16:
        columns, vector = 16, 2
    elif n <= 32:
        columns, vector = 32, 4
    else:
        columns, vector = 64, 4 if n % 64 else 8
    vector = next(v for v in (8, 4, 2, 1) if v <= vector and n % v == 0)
    width = min(_WARP, columns // vector)
    found = [Choice(columns=width * vector, width=width)]
    if n <= 32:
        columns, width = 8 if n <= 8 else columns, 4
    else:
        width = 16 if n % 64 == 0 else 8
    second = Choice(columns=columns, width=width)
    if n % second.vector == 0:
        found.append(second)
    strips = -(-n // found[0].columns)
    if strips > MAX_GRID_YZ:
        raise ArgumentError("n", expected=f"columns of x in at most {MAX_GRID_YZ} strips", got=f"{n} in {strips}")
    return tuple(found)


@cache
def specs() -> tuple[KernelSpec, ...]:
    """Every instance that :func:`choices` names: the N up to 128 include every kind."""
    return tuple(dict.fromkeys(choice.spec for n in range(1, 129) for choice in choices(n)))


@dataclass(frozen=True, kw_only=True)
class Sputnik:
    """fp16 W[M, K] in CSR. Rows are padded to whole groups of 4 with zeros in the column of their last element."""

    SYSTEM: ClassVar[str] = "sputnik"
    FORMAT: ClassVar[str] = "csr"
    LAYOUT: ClassVar[Literal["row", "column"]] = "column"

    shape: tuple[int, int]
    nnz: int
    """Elements that are not padding."""
    values: Any
    """uint16, fp16 bits; only padding is zero. Zeros up to a multiple of 8 follow the last row."""
    columns: Any
    """uint16, as many as ``values``."""
    row_offsets: Any
    """int32 [M + 1]: where each row begins in these, and where the last one ends."""
    row_indices: Any
    """int32 [M]: the order in which rows are computed."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in self._arrays().values())

    @classmethod
    def from_dense(cls, dense: Any, *, swizzle: bool = False) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side it is on; K is at most 65535.

        ``swizzle`` computes long rows first ("row swizzle load balancing"). The Flash-LLM paper's harness did not.
        Raises :class:`ArgumentError` for another type, shape or layout, and for more than 2^31 - 1 stored elements.
        """
        xp = check_dense(dense)
        rows, row_length = dense.shape
        if row_length > MAX_COLUMNS:
            raise ArgumentError("dense", expected=f"at most {MAX_COLUMNS} columns (16 bits)", got=str(row_length))
        bits = dense.view(np.uint16)
        counts = xp.empty(rows, xp.int64)
        for strip in _strips(rows, row_length):
            counts[strip] = xp.count_nonzero(bits[strip] & MAGNITUDE, axis=1)
        padded = (counts + PAD - 1) // PAD * PAD
        ends = xp.cumsum(padded)
        stored = int(ends[-1])
        if stored > MAX_STORED:
            raise ArgumentError("dense", expected=f"at most {MAX_STORED} stored elements", got=str(stored))
        offsets = xp.zeros(rows + 1, xp.int32)
        offsets[1:] = ends
        size = max(1, -(-stored // _VECTOR)) * _VECTOR
        values, columns = xp.zeros(size, xp.uint16), xp.zeros(size, xp.uint16)
        for strip in _strips(rows, row_length):
            _encode(xp, bits[strip], counts[strip], ends[strip] - padded[strip], values, columns)
        order = xp.argsort(-counts, kind="stable") if swizzle else xp.arange(rows)
        return cls(
            shape=(rows, row_length),
            nnz=int(counts.sum()),
            values=values,
            columns=columns,
            row_offsets=offsets,
            row_indices=order.astype(xp.int32),
        )

    def to_dense(self) -> Any:
        """The matrix as float16 [M, K], on the side the weight is on; pruned elements are +0.0."""
        xp = array_module(self.values)
        rows, row_length = self.shape
        out = xp.zeros(self.shape, xp.uint16)
        for strip in _strips(rows, row_length):
            offsets = self.row_offsets[strip.start : strip.stop + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            values, columns = self.values[first:last], self.columns[first:last]
            places = xp.flatnonzero(values)
            row = xp.searchsorted(offsets[1:], first + places, side="right")
            out[strip.start + row, columns[places]] = values[places]
        return out.view(xp.float16)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return replace(self, **{name: array.copy() for name, array in self._arrays().items()})

    def choices(self, n: int, *, sm_count: int) -> tuple[Choice, ...]:
        """See :func:`choices`; the number of multiprocessors does not matter."""
        return choices(n)

    def workspace_bytes(self, n: int, choice: Choice) -> int:
        """None is needed."""
        return 0

    def steps(self, x: Any, y: Any, workspace: Any, choice: Choice) -> tuple[Step, ...]:
        """One launch that writes all of y[M, N], from x[K, N]; both float16, C-contiguous, 16-byte aligned."""
        rows, row_length = self.shape
        n = x.shape[1] if x.ndim == 2 else 0
        if n < 1 or n % choice.vector:
            expected = f"[K, N], N a multiple of {choice.vector} for {choice.label}"
            raise ArgumentError("x", expected=expected, got=str(list(x.shape)))
        for name, array, shape in (("x", x, (row_length, n)), ("y", y, (rows, n))):
            if array.shape != shape or array.dtype != np.float16 or not array.flags.c_contiguous:
                got = f"{list(array.shape)}, {array.dtype}, strides {array.strides}"
                raise ArgumentError(name, expected=f"C-contiguous float16 {list(shape)}", got=got)
        grid = (-(-rows // choice.rows), -(-n // choice.columns))
        stored = (self.values, self.columns, self.row_offsets, self.row_indices)
        return (Step(spec=choice.spec, grid=grid, args=(x, *stored, y, np.int32(rows), np.int32(n))),)

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("values", "columns", "row_offsets", "row_indices")}


def _strips(rows: int, row_length: int) -> Iterator[slice]:
    """Ranges of rows with up to about :data:`_STRIP_ELEMENTS` elements of W."""
    height = max(1, _STRIP_ELEMENTS // row_length)
    for first in range(0, rows, height):
        yield slice(first, min(first + height, rows))


def _encode(xp: Any, bits: Any, counts: Any, begins: Any, values: Any, columns: Any) -> None:
    """Write the elements of rows ``bits``, ``counts`` in each, to ``values`` and ``columns`` from ``begins`` on."""
    kept = (bits & MAGNITUDE) != 0
    row, column = xp.nonzero(kept)  # in row-major order
    ends = xp.cumsum(counts)
    # Maps a place among the elements of these rows to its place with padding.
    places = xp.arange(row.size) + (begins - (ends - counts))[row]
    values[places] = bits[kept]
    columns[places] = column.astype(xp.uint16)
    for i in range(PAD - 1):
        padded = xp.flatnonzero(-counts % PAD > i)
        columns[begins[padded] + counts[padded] + i] = column[ends[padded] - 1].astype(xp.uint16)
