# SPDX-License-Identifier: Apache-2.0
"""A fake GPU: enough of CuPy, cuBLAS and the launcher, in NumPy, to run the benchmark's own logic on a CPU.

The fake cuBLAS takes exactly the arguments of the C functions and reads and writes through the addresses in them.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flashllm import registry
from flashllm.baselines import cublas_api
from flashllm.jit.spec import KernelSpec
from flashllm.matmul.expand import LABEL

ITEM_BYTES = 2


class Array(np.ndarray[Any, Any]):
    """A NumPy array that gives its address as a CuPy array does."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> Any:
        return np.asarray(self)

    def set(self, array: Any, stream: Any = None) -> None:
        self[...] = array


class Event:
    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    def __init__(self, stream: Stream) -> None:
        self._stream, self._calls = stream, list(stream.captured or [])

    def upload(self, stream: Any) -> None:
        pass

    def launch(self, stream: Any) -> None:
        for call in self._calls:
            call()


class Stream:
    ptr = 77

    def __init__(self, non_blocking: bool = False) -> None:
        self.captured: list[Any] | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> Graph:
        graph, self.captured = Graph(self), None
        return graph

    def synchronize(self) -> None:
        pass

    def do(self, call: Any) -> None:
        """Run ``call`` now, or in every launch of the graph being captured."""
        if self.captured is None:
            call()
        else:
            self.captured.append(call)


class Blas:
    """cuBLAS or cublasLt: records calls; ``cublasGemmEx`` and ``cublasLtMatmul`` compute."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.computed: list[int] = []
        self.stream: Any = None
        self.workspace = 0
        self._ids = itertools.count(1)
        self.things: dict[int, dict[str, Any]] = {}

    def call(self, name: str, *a: Any) -> None:
        status = self.status(name, *a)
        if status:
            raise cublas_api.CublasError(name, status)

    def status(self, name: str, *a: Any) -> int:
        self.calls.append(name)
        method = getattr(self, name, None)
        if method is not None:
            return int(method(*a) or 0)
        if "Create" in name:
            a[0]._obj.value = next(self._ids)
            self.things[a[0]._obj.value] = {"create": a[1:]}
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: int) -> None:
        self.workspace = 0  # as the real one does

    def cublasSetWorkspace_v2(self, handle: Any, at: int, size: Any) -> None:
        self.workspace = size.value

    def cublasGemmEx(
        self, handle: Any, ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int, b: int,
        b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algo: int,
    ) -> None:  # fmt: skip
        assert ctypes.c_float.from_address(alpha).value == 1.0
        assert ctypes.c_float.from_address(beta).value == 0.0
        assert (a_type, b_type, c_type, algo) == (2, 2, 2, -1)
        self.computed.append(compute)
        assert self.workspace == 32 * 2**20
        _gemm(ta, tb, m, n, k, a, lda, b, ldb, c, ldc)

    def cublasLtMatmulDescSetAttribute(self, at: Any, attribute: int, value: Any, size: int) -> None:
        assert size == 4
        self.things[at.value][str(attribute)] = value._obj.value

    def cublasLtMatmulAlgoGetHeuristic(self, *a: Any) -> None:
        requested, results, found = a[7:]
        for i in range(3):
            results[i].state, results[i].workspace_bytes = (15 if i == 1 else 0), 1024
        found._obj.value = min(3, requested)

    def cublasLtMatmul(self, handle: Any, op: Any, alpha: int, *rest: Any) -> None:
        a, a_desc, b, b_desc, _beta, c, _c_desc, d, d_desc, _algo, _workspace, size, _stream = rest
        assert (c, size) == (d, 32 * 2**20)
        ta, tb = self.things[op.value]["3"], self.things[op.value]["4"]
        (a_type, a_rows, a_columns, lda), (_, b_rows, b_columns, ldb) = (
            self.things[desc.value]["create"] for desc in (a_desc, b_desc)
        )
        _, m, n, ldc = self.things[d_desc.value]["create"]
        k = a_rows if ta else a_columns
        assert (a_type, a_rows, a_columns) == ((2, k, m) if ta else (2, m, k))
        assert (b_rows, b_columns) == ((n, k) if tb else (k, n))
        _gemm(ta, tb, m, n, k, a, lda, b, ldb, d, ldc)


def _column_major(at: int, rows: int, columns: int, leading: int) -> Any:
    """View of a column-major fp16 matrix in memory."""
    assert leading >= rows
    count = leading * (columns - 1) + rows
    flat = np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_uint16)), (count,)).view(np.float16)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (ITEM_BYTES, ITEM_BYTES * leading))


def _gemm(
    ta: int, tb: int, m: int, n: int, k: int, a: int, lda: int, b: int, ldb: int, c: int, ldc: int
) -> None:  # fmt: skip
    op_a = _column_major(a, k, m, lda).T if ta else _column_major(a, m, k, lda)
    op_b = _column_major(b, n, k, ldb).T if tb else _column_major(b, k, n, ldb)
    _column_major(c, m, n, ldc)[...] = op_a.astype(np.float32) @ op_b.astype(np.float32)


@dataclass
class Plan:
    spec: KernelSpec
    choice: Any = None
    workspace_bytes: int = 0
    scratch_bytes: int = 0
    source: str = "auto"
    expansion: Any = None

    @property
    def label(self) -> str:
        return self.spec.label if self.expansion is None else LABEL


def install(
    monkeypatch: pytest.MonkeyPatch, *, wrong_column: int | None = None, only_overlapping: bool = False
) -> Blas:
    """Put the fake GPU in place of the real packages.

    ``wrong_column`` of every sparse product is corrupted, or only where launches may overlap in a graph.
    """
    blas = Blas()
    stream_now: list[Stream] = []
    cupy: Any = types.ModuleType("cupy")
    for name in (
        "uint8",
        "uint16",
        "uint32",
        "float16",
        "where",
        "isnan",
        "copysign",
        "full_like",
        "minimum",
        "count_nonzero",
    ):
        setattr(cupy, name, getattr(np, name))
    cupy.empty = lambda shape, dtype: np.full(shape, 77, dtype=dtype).view(Array)
    cupy.zeros = lambda shape, dtype: np.zeros(shape, dtype=dtype).view(Array)
    cupy.asarray = lambda array: np.asarray(array).view(Array)
    cupy.ascontiguousarray = lambda array: np.ascontiguousarray(array).view(Array)
    cupy.matmul = lambda a, b, out: np.matmul(a.astype(np.float32), b.astype(np.float32), out=out, casting="unsafe")
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)

    def make_stream(non_blocking: bool = False) -> Stream:
        stream_now.append(Stream())
        return stream_now[-1]

    cupy.cuda = types.SimpleNamespace(
        Stream=make_stream,
        Event=Event,
        memory=types.SimpleNamespace(OutOfMemoryError=MemoryError),
        Device=lambda index: types.SimpleNamespace(use=lambda: None),
        get_current_stream=lambda: stream_now[-1] if stream_now else Stream(),
        runtime=types.SimpleNamespace(runtimeGetVersion=lambda: 13000, getDeviceCount=lambda: 1),
        get_elapsed_time=lambda start, stop: 1.0,  # ms: every batch takes the same time, so medians are firm
    )
    cupy.__version__ = "14.2.0"
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cupyx: Any = types.ModuleType("cupyx")
    cupyx.empty_pinned = np.empty
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    monkeypatch.setattr(cublas_api, "version", lambda: "13.1.0")
    monkeypatch.setattr(cublas_api, "libraries", lambda: (blas, blas))
    monkeypatch.setattr(cublas_api, "status_text", lambda status: "fake")

    spec = KernelSpec(name="fake", source="spmm/fake.cu", function="fake", threads=32)

    def plan(w: Any, n: int, *, choice: Any = None) -> Plan:
        if choice is not None:
            return Plan(choice.spec, choice, source="forced")
        return Plan(spec, registry.kernel(w.format).default_choice(w, n, arch="90a"))

    monkeypatch.setattr("flashllm.matmul.plan", plan)

    products: dict[tuple[int, bytes], tuple[Any, Any]] = {}

    def product(
        x: Any,
        w: Any,
        *,
        out: Any,
        workspace: Any,
        scratch: Any,
        stream: Stream,
        plan: Plan,
        overlap_previous: bool = False,
    ) -> Any:
        from flashllm.backends.reference import spmm as reference

        overlaps = overlap_previous and stream.captured is not None
        spoilt = wrong_column is not None and (overlaps or not only_overlapping)

        def run() -> None:
            operands = id(w), np.asarray(x).tobytes()
            if operands not in products:  # a graph launches the same ones many times
                products[operands] = w, reference(np.asarray(x), w)  # with w, so that its id is not reused
            out[...] = products[operands][1]
            if spoilt:
                out[:, wrong_column] += 1

        stream.do(run)
        return out

    monkeypatch.setattr("flashllm.matmul.spmm", product)

    from flashllm import backends
    from flashllm.bench import data, runner, telemetry

    monkeypatch.setattr(data, "_on_device", lambda *a: data._on_host(*a).view(Array))
    monkeypatch.setattr(telemetry, "read", lambda: telemetry.Reading(sm_mhz=1980, temp_c=40, power_w=500.0))
    monkeypatch.setattr(telemetry, "driver_version", lambda: "580.1")
    monkeypatch.setattr(backends, "select", lambda name=None: backends.Selection("cuda", "pretended"))
    monkeypatch.setattr(runner, "read_gbps", lambda stream: 3000.0)
    facts = types.SimpleNamespace(
        name="NVIDIA Pretend",
        cc=(9, 0),
        arch="90a",
        sm_count=132,
        clock_mhz=1980.0,
        l2_bytes=1000,
        driver=13000,
    )
    monkeypatch.setattr("flashllm.device.device_facts", lambda index=None: facts)
    monkeypatch.setattr("flashllm.device.free_memory", lambda: 80 * 10**9)
    return blas
