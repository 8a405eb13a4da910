# SPDX-License-Identifier: Apache-2.0
"""y[R, M] = x[R, K] @ W[M, K]^T inside an engine: packed weights by ``spmm``, dense ones by cuBLAS.

Each product is prepared once for its number of rows: a plan or cuBLAS's fastest algorithm is chosen and memory is
allocated. After that a product allocates nothing and can be captured. Memory may be reserved earlier: only packed
weights need any, so no algorithm is timed for numbers of rows that may never occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from flashllm.baselines.cublas_api import LT_ALIGNMENT
from flashllm.engine.arrays import rounded, widened
from flashllm.errors import ArgumentError
from flashllm.formats.weight import SparseWeight

_TIMED_WEIGHTS = 8
"""A candidate is timed on at most this many matrices of a shape in turn, so that they do not stay in the L2."""
_REPEATS = 3


class Products(Protocol):
    """How an engine multiplies. A matrix W is a ``SparseWeight`` or a dense [M, K] array on the engine's device."""

    def reserve(self, matrices: Sequence[Any], rows: Sequence[int]) -> None:
        """Allocate the memory that products with these matrices need for each of these numbers of rows. Raises
        ``DeviceMemoryError``.
        """

    def prepare(self, matrices: Sequence[Any], rows: int, *, out: str | None = None, timed: bool = True) -> None:
        """Choose how products of ``rows`` rows with these matrices are computed, and reserve their memory.

        ``out="fp32"``: y is fp32, for dense matrices; otherwise y has the type of x. Dense matrices that are given
        together should be those that a pass multiplies by, since candidates are timed on them. Without ``timed`` cuBLAS
        chooses; it chooses alike on equal GPUs, which then compute the same bits.
        """

    def multiply(self, x: Any, w: Any, y: Any) -> None:
        """y = x @ W^T. x and y are C-contiguous."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes allocated in addition to the operands."""

    def label(self, w: Any, rows: int) -> str:
        """The name, for tables, of what computes a prepared product."""

    def close(self) -> None:
        """Release memory and handles."""


class HostProducts:
    """Products on the CPU: packed weights by the emulator or NumPy, dense ones by NumPy with sums in fp32."""

    workspace_bytes = 0

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def reserve(self, matrices: Sequence[Any], rows: Sequence[int]) -> None:
        """Nothing to reserve."""

    def prepare(self, matrices: Sequence[Any], rows: int, *, out: str | None = None, timed: bool = True) -> None:
        """Nothing to prepare."""

    def multiply(self, x: Any, w: Any, y: Any) -> None:
        """As :class:`Products` says."""
        with np.errstate(over="ignore", invalid="ignore"):  # rows that pad a pass may hold anything
            self._multiply(x, w, y)

    def _multiply(self, x: Any, w: Any, y: Any) -> None:
        from flashllm.matmul import spmm

        if isinstance(w, SparseWeight):
            spmm(x, w, out=y, backend=self._backend)
            return
        y[...] = rounded(widened(x) @ widened(w).T, y.dtype)

    def label(self, w: Any, rows: int) -> str:
        """As :class:`Products` says."""
        return self._backend if isinstance(w, SparseWeight) else "numpy"

    def close(self) -> None:
        """Nothing is held."""


class GpuProducts:
    """Products on the current GPU, on one stream; ``overlap`` as for ``GpuRuntime``."""

    def __init__(self, stream: Any, *, overlap: bool) -> None:
        from flashllm.baselines.cublas import Cublas

        self._stream, self._overlap = stream, overlap
        self._cublas = Cublas()
        self._dense: dict[tuple[Any, ...], Any] = {}
        self._plans: dict[tuple[int, int], tuple[SparseWeight, Any]] = {}
        """By id of the weight and number of rows. The weight is kept so that no other object can have its id."""
        self._memory: dict[str, Any] = {}
        self._outgrown: list[Any] = []
        """Replaced memory that graphs captured earlier still use."""

    def reserve(self, matrices: Sequence[Any], rows: Sequence[int]) -> None:
        """As :class:`Products` says."""
        from flashllm import matmul

        plans: dict[tuple[int, int], tuple[SparseWeight, Any]] = {}
        for count in rows:
            for w in matrices:
                if isinstance(w, SparseWeight) and (id(w), count) not in self._plans:
                    plans[id(w), count] = (w, matmul.plan(w, count))
        needed: dict[str, int] = {}
        for _, plan in plans.values():
            for name, size in ((_workspace_of(plan), plan.workspace_bytes), ("scratch", plan.scratch_bytes)):
                needed[name] = max(needed.get(name, 0), size)
        for name, size in needed.items():
            self._reserve(name, size)
        self._plans |= plans  # only now, so that every plan kept has its memory

    def prepare(self, matrices: Sequence[Any], rows: int, *, out: str | None = None, timed: bool = True) -> None:
        """As :class:`Products` says."""
        self.reserve(matrices, [rows])
        dense: dict[tuple[Any, ...], list[Any]] = {}
        for w in matrices:
            if not isinstance(w, SparseWeight):
                dense.setdefault(self._key(w, rows, out), []).append(w)
        for key, found in dense.items():
            if key not in self._dense:
                self._dense[key] = self._fastest(key, found[:_TIMED_WEIGHTS]) if timed else self._default(key)

    def multiply(self, x: Any, w: Any, y: Any) -> None:
        """As :class:`Products` says. Raises ``ArgumentError`` for a product that was not prepared."""
        from flashllm import matmul

        rows = x.shape[0]
        if not isinstance(w, SparseWeight):
            found = self._dense.get(self._key(w, rows, "fp32" if y.dtype == np.float32 else None))
            if found is None:
                raise _not_prepared(rows)
            found.launch(w.data.ptr, x.data.ptr, y.data.ptr, self._stream.ptr)
            return
        _, plan = self._plans.get((id(w), rows), (None, None))
        if plan is None:
            raise _not_prepared(rows)
        matmul.spmm(
            x,
            w,
            out=y,
            plan=plan,
            workspace=self._memory.get(_workspace_of(plan)),
            scratch=self._memory.get("scratch"),
            stream=self._stream,
            overlap_previous=self._overlap and plan.expansion is None,
        )

    @property
    def workspace_bytes(self) -> int:
        """As :class:`Products` says."""
        from flashllm.baselines.cublas import WORKSPACE_BYTES

        return WORKSPACE_BYTES + sum(int(one.nbytes) for one in (*self._memory.values(), *self._outgrown))

    def label(self, w: Any, rows: int) -> str:
        """As :class:`Products` says."""
        if isinstance(w, SparseWeight):
            return str(self._plans[id(w), rows][1].label)
        return str(self._dense[self._key(w, rows, None)].label)

    def close(self) -> None:
        """As :class:`Products` says."""
        from flashllm.matmul import expand

        expand.release_stream(int(self._stream.ptr))
        self._cublas.close()
        for held in (self._dense, self._plans, self._memory, self._outgrown):
            held.clear()

    def _key(self, w: Any, rows: int, out: str | None) -> tuple[Any, ...]:
        return (*w.shape, rows, "fp16" if w.dtype == np.float16 else "bf16", out)

    def _reserve(self, name: str, needed: int) -> None:
        """Allocate zeroed memory under ``name`` unless it has at least ``needed`` bytes."""
        import cupy

        from flashllm.device import memory_errors

        held = self._memory.get(name)
        if needed <= (0 if held is None else held.nbytes):
            return
        if held is not None:
            self._outgrown.append(held)
        with memory_errors(f"workspace of products ({name})", needed), self._stream:
            self._memory[name] = cupy.zeros(needed, np.uint8)

    def _default(self, key: tuple[Any, ...]) -> Any:
        from flashllm.baselines.cublas import Layout

        m, k, rows, dtype, out = key
        return self._cublas.gemm_ex(Layout(), m=m, k=k, n=rows, dtype=dtype, out=out)

    def _fastest(self, key: tuple[Any, ...], weights: Sequence[Any]) -> Any:
        """cuBLAS's fastest candidate, each timed in a graph over the given weights."""
        import cupy

        from flashllm import graphs
        from flashllm.baselines.cublas import Layout

        m, k, rows, dtype, out = key
        sizes: dict[str, Any] = {"m": m, "k": k, "n": rows, "dtype": dtype, "out": out}
        candidates = [self._cublas.gemm_ex(Layout(), **sizes)]
        if all(w.data.ptr % LT_ALIGNMENT == 0 for w in weights):
            candidates += self._cublas.lt_candidates(Layout(), **sizes)
        with self._stream:
            x = cupy.zeros((rows, k), weights[0].dtype)
            y = cupy.empty((rows, m), np.float32 if out == "fp32" else weights[0].dtype)
        best: tuple[float, Any] | None = None
        for candidate in candidates:

            def launches(candidate: Any = candidate) -> None:
                for w in weights:
                    candidate.launch(w.data.ptr, x.data.ptr, y.data.ptr, self._stream.ptr)

            launches()  # the library loads its kernels when they are first used
            graph = graphs.capture(launches, self._stream)
            us = min(graphs.replay_us(graph, self._stream, len(weights)) for _ in range(_REPEATS))
            if best is None or us < best[0]:
                best = us, candidate
        assert best is not None
        return best[1]


def _workspace_of(plan: Any) -> str:
    """Name of the workspace. Kernels need theirs zeroed, and an expansion leaves its matrix there: they share none."""
    return "kernels" if plan.expansion is None else "expanded"


def _not_prepared(rows: int) -> ArgumentError:
    return ArgumentError("x", expected="a number of rows that was prepared", got=str(rows))
