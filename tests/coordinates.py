# SPDX-License-Identifier: Apache-2.0
"""A second weight format for tests, with its kernel's host module: a list of (row, column, value).

Shows everything that a format needs, and that the rest of the package knows no format by name. Its kernel, for the
emulator, is ``tests/emulator/coordinates.cu``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from flashllm import registry
from flashllm.errors import FormatError
from flashllm.formats.base import DType, ReportCallback
from flashllm.formats.bits import MAGNITUDE, numpy_dtype, to_bits, widen
from flashllm.formats.weight import SparseWeight
from flashllm.jit.spec import KernelSpec

NAME = "coordinates"
THREADS = 64


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it one of the package's formats, as a line in the registry would."""
    here = registry.FormatEntry(weight="coordinates:Coordinates", kernel="coordinates")
    monkeypatch.setitem(registry.FORMATS, NAME, here)


@dataclass(frozen=True, kw_only=True, eq=False)
class Coordinates(SparseWeight):
    """``rows`` and ``columns`` are int32 [nnz], ``values`` uint16 bits; ``by`` is the order: rows or columns."""

    FORMAT: ClassVar[str] = NAME
    BUFFERS: ClassVar[tuple[str, ...]] = ("rows", "columns", "values")
    ENCODINGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "by-column": {"by": "column"}}
    MULTIPLIES_ZEROS: ClassVar[bool] = False

    rows: Any = field(repr=False)
    columns: Any = field(repr=False)
    values: Any = field(repr=False)
    by: str

    @classmethod
    def check_structure(cls, fields: Mapping[str, Any], arrays: Mapping[str, Any], *, path: str | None) -> None:
        for name, array in arrays.items():
            if array.shape != (fields["nnz"],):
                raise FormatError(field=name, expected=f"{fields['nnz']} entries", got=str(array.shape), path=path)

    def check_content(self, *, path: str | None) -> None:
        for name, size in (("rows", self.shape[0]), ("columns", self.shape[1])):
            wrong = np.flatnonzero((getattr(self, name) < 0) | (getattr(self, name) >= size))
            if wrong.size:
                raise FormatError(field=name, index=int(wrong[0]), expected=f"0..{size - 1}", got="more", path=path)

    @classmethod
    def estimated_bytes(cls, shape: tuple[int, int], density: float) -> int:
        return int(10 * density * shape[0] * shape[1])

    @classmethod
    def from_dense(
        cls, a: Any, *, dtype: str | None = None, by: str = "row", report: ReportCallback | None = None
    ) -> Coordinates:
        kind: DType = "bf16" if dtype == "bf16" or (dtype is None and a.dtype != np.float16) else "fp16"
        bits = a if a.dtype == np.uint16 else to_bits(np.asarray(a), kind).view(type(a))
        stored = (bits & MAGNITUDE) != 0
        rows, columns = np.nonzero(stored) if by == "row" else np.nonzero(stored.T)[::-1]
        buffers = {"rows": rows.astype(np.int32), "columns": columns.astype(np.int32), "values": bits[rows, columns]}
        buffers = {name: array.view(type(a)) for name, array in buffers.items()}
        return cls(shape=a.shape, dtype=kind, nnz=int(rows.size), by=by, **buffers)

    @classmethod
    def from_scipy(cls, s: Any, *, dtype: str = "fp16", report: ReportCallback | None = None) -> Coordinates:
        return cls.from_dense(s.toarray(), dtype=dtype, report=report)

    def to_dense(self) -> Any:
        out = np.zeros(self.shape, np.uint16)
        out[self.rows, self.columns] = self.values
        return out.view(numpy_dtype(self.dtype))

    def to_scipy(self) -> Any:
        import scipy.sparse

        parts = (widen(self.values, self.dtype), (self.rows, self.columns))
        return scipy.sparse.csr_array(scipy.sparse.coo_array(parts, shape=self.shape))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``repeat`` has no effect; it is there to be tuned."""

    dtype: str
    n_block: int = 8
    aligned: bool = True
    repeat: int = 1

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec(
            name="coordinates",
            source="coordinates.cu",
            function="coordinates::spmm",
            template=(("T", "__half" if self.dtype == "fp16" else "__nv_bfloat16"), ("kRepeat", str(self.repeat))),
            threads=THREADS,
        )


@dataclass(frozen=True, kw_only=True)
class OnePerRow:
    """A thread for every row of W, a row of blocks for every row of x."""

    grid: tuple[int, int]
    workspace_bytes: int = 0
    scratch_bytes: int = 0


def default_choice(w: Coordinates, n: int, *, arch: str) -> Choice:
    return Choice(dtype=w.dtype)


def split_for(w: Coordinates, n: int, choice: Choice, *, sm_count: int) -> OnePerRow:
    return OnePerRow(grid=(-(-w.shape[0] // THREADS), n))


def reason(w: Coordinates, choice: Choice, split: OnePerRow, *, sm_count: int) -> str:
    return f"{w.nnz} coordinates, {choice.repeat} times"


def arguments(w: Coordinates, split: OnePerRow, x: Any, out: Any, workspace: Any, scratch: Any) -> tuple[Any, ...]:
    return (x, w.rows, w.columns, w.values, out, *map(np.int32, (w.nnz, *w.shape)))


def candidates(w: Coordinates, n: int, *, arch: str) -> Iterator[Choice]:
    yield from (replace(default_choice(w, n, arch=arch), repeat=repeat) for repeat in (1, 2))


def tune_key(w: Coordinates, n: int) -> str:
    return f"n{n}"


def usable(choice: Choice) -> bool:
    return choice.repeat in (1, 2)


def instances() -> tuple[Choice, ...]:
    return tuple(Choice(dtype=dtype, repeat=repeat) for dtype in ("fp16", "bf16") for repeat in (1, 2))


def typical(arch: str) -> tuple[Choice, ...]:
    return tuple(choice for choice in instances() if choice.repeat == 1)


def ablation(choice: Choice) -> dict[str, Choice]:
    return {"twice": replace(choice, repeat=2)}


def specs() -> tuple[KernelSpec, ...]:
    return tuple(choice.spec for choice in instances())
