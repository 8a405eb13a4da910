# SPDX-License-Identifier: Apache-2.0
"""cuSPARSE's product of a CSR matrix, fp16 with fp32 sums: the generic SpMM, in every layout and algorithm it has."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flashllm.baselines import cusparse_api as api
from flashllm.baselines.baseline import Way
from flashllm.baselines.csr import compress
from flashllm.baselines.cublas_api import Descriptor

if TYPE_CHECKING:
    from typing_extensions import Self

_Order = Literal["row", "column"]
_FP16_SUMS = 256.0
"""Error limit, times the bound: algorithms 1 and 2 add pieces of rows in fp16, whatever compute type is set."""
_CSR = (api.INDEX_32, api.INDEX_32, api.BASE_ZERO, api.R_16F)
# (algorithm of CSR, order of x and y as cuSPARSE sees them, [K, N] and [M, N]). The Flash-LLM paper's harness ran the
# first two; the third is newer.
_TRIED: tuple[tuple[int, _Order], ...] = ((1, "column"), (2, "row"), (3, "row"))


@dataclass(frozen=True, kw_only=True)
class CusparseCsr:
    """W[M, K] as 32-bit row offsets and columns and 16-bit values, on the current GPU."""

    SYSTEM: ClassVar[str] = "cusparse"
    FORMAT: ClassVar[str] = "csr"

    shape: tuple[int, int]
    offsets: Any
    columns: Any
    values: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.offsets.nbytes + self.columns.nbytes + self.values.nbytes)

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Compress a float16 CuPy array [M, K]; see :func:`flashllm.baselines.csr.compress`."""
        offsets, columns, values = compress(dense)
        return cls(shape=dense.shape, offsets=offsets, columns=columns, values=values)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        arrays = {name: getattr(self, name).copy() for name in ("offsets", "columns", "values")}
        return replace(self, **arrays)

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """The algorithms for CSR that this cuSPARSE knows."""
        library = api.library()
        handle = ctypes.c_void_p()
        library.call("cusparseCreate", ctypes.byref(handle))
        call = _Calls(library, handle)
        found = []
        for algorithm, order in _TRIED:
            try:
                found.append(call.way(weights, x, api.CSR_ALGORITHMS[algorithm], algorithm, order, stream))
            except api.CusparseError:  # this release does not have it for these types
                continue
        return found


class _Calls:
    """A cuSPARSE handle and the calls made with it; the handle is destroyed with the last way that uses it."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        weakref.finalize(self, library.status, "cusparseDestroy", handle)

    def _dense(self, array: Any, rows: int, columns: int, order: _Order) -> Any:
        """A descriptor of ``array`` as a matrix [rows, columns] in ``order``."""
        in_rows = order == "row"
        leading = columns if in_rows else rows
        kind = (api.R_16F, api.ORDER_ROW if in_rows else api.ORDER_COLUMN)
        arguments = (rows, columns, leading, array.data.ptr, *kind)
        return Descriptor(self._library, "cusparseCreateDnMat", "cusparseDestroyDnMat", arguments, array)

    def way(self, weights: Sequence[CusparseCsr], x: Any, code: int, number: int, order: _Order, stream: Any) -> Way:
        """Algorithm ``code``, with a first product already run. Raises :class:`cusparse_api.CusparseError`."""
        import cupy

        (m, k), n = weights[0].shape, x.shape[0]
        in_rows = order == "row"
        x = cupy.ascontiguousarray(x.T) if in_rows else x  # x as [N, K] is [K, N] in column order
        y = cupy.empty((m, n) if in_rows else (n, m), dtype=cupy.float16)
        right, out = self._dense(x, k, n, order), self._dense(y, m, n, order)
        lefts = [
            Descriptor(
                self._library,
                "cusparseCreateCsr",
                "cusparseDestroySpMat",
                (m, k, w.values.size, *(a.data.ptr for a in (w.offsets, w.columns, w.values)), *_CSR),
                w,
            )
            for w in weights
        ]

        def arguments(copy: int) -> tuple[Any, ...]:
            return (
                *(self._handle, api.NO_TRANSPOSE, api.NO_TRANSPOSE),
                *(ctypes.addressof(self._one), lefts[copy].at, right.at, ctypes.addressof(self._zero), out.at),
                *(api.R_32F, code),
            )

        needed = ctypes.c_size_t()
        self._library.call("cusparseSpMM_bufferSize", *arguments(0), ctypes.byref(needed))
        # A buffer for each weight: cuSPARSE may keep in it what it has found out about the matrix.
        buffers = [cupy.empty(max(16, needed.value), dtype=cupy.uint8) for _ in weights]

        def launch(copy: int, stream: Any) -> None:
            self._library.call("cusparseSetStream", self._handle, int(stream.ptr))
            self._library.call("cusparseSpMM", *arguments(copy), buffers[copy].data.ptr)

        launch(0, stream)
        return Way(
            label=f"cusparseSpMM CSR_ALG{number} {'row' if in_rows else 'column'} order",
            deterministic=None,
            copies=len(weights),
            launch=launch,
            buffer=lambda: y,
            output=lambda: y.T if in_rows else y,
            error_limit=Way.error_limit if number == 3 else _FP16_SUMS,
        )
