# SPDX-License-Identifier: Apache-2.0
"""Measures the candidate kernels of a weight and remembers the fastest for this kind of GPU."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm import graphs
from flashllm.errors import ArgumentError
from flashllm.formats.bits import numpy_dtype
from flashllm.matmul import expand, tune_cache
from flashllm.matmul.planning import Plan, plan
from flashllm.matmul.product import spmm
from flashllm.registry import kernel

if TYPE_CHECKING:
    from flashllm.formats.weight import SparseWeight

_COLD_BYTES = 500_000_000
_MAX_COPIES = 64  # a tiny weight is launch-bound, cold or not
_MIN_LAUNCHES = 24
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Outcome for one N: medians in us, L2-cold."""

    n: int
    plan: Plan
    median_us: float
    heuristic_us: float
    """Time of what would run without tuning."""
    measured: int
    """Candidates tried."""
    path: Path
    """File that now holds the choice."""


def tune(w: SparseWeight, n_list: Sequence[int]) -> list[TuneResult]:
    """Time every candidate for each N of ``n_list`` on the current GPU and store the best.

    For N beyond the widest block of columns, expanding the weight for cuBLAS is timed too.

    The protocol is a small version of the benchmark's: a CUDA graph of launches over copies of the weight that
    together do not fit the L2. Needs memory for those copies (500 MB or two weights, whichever is more). Raises
    :class:`ArgumentError` for a weight on the host, :class:`DeviceMemoryError`, ``OSError`` when the choice cannot
    be stored.
    """
    import cupy

    from flashllm.device import device_facts

    if not w.is_device:
        raise ArgumentError("w", expected="a weight on the GPU (w.to_device())", got="a weight on the host")
    facts = device_facts()
    copies = _copies(w)
    random = np.random.default_rng(0)  # on the host: CuPy's generator would need cuRAND
    stream = cupy.cuda.Stream(non_blocking=True)
    results = []
    for n in n_list:
        x = cupy.asarray(random.standard_normal((n, w.shape[1]), np.float32).astype(numpy_dtype(w.dtype)))
        timed = []
        for choice in kernel(w.format).candidates(w, n, arch=facts.arch):
            candidate = plan(w, n, device=facts, choice=choice)
            timed.append((_time(candidate, x, copies, stream), candidate))
        best_us, best = min(timed, key=lambda pair: pair[0])
        if n >= expand.LEAST_N and expand.expansion_of(w) is not None:
            expanded = plan(w, n, device=facts, choice=best.choice, expand=True)
            timed.append((_time(expanded, x, copies, stream), expanded))
            best_us, best = min(timed, key=lambda pair: pair[0])
        path = tune_cache.store(w, n, best.choice, median_us=best_us, device=facts, expanded=best.expansion is not None)
        results.append(
            TuneResult(n=n, plan=best, median_us=best_us, heuristic_us=timed[0][0], measured=len(timed), path=path)
        )
    return results


def _copies(w: SparseWeight) -> list[SparseWeight]:
    from flashllm.device import memory_errors

    count = max(2, -(-_COLD_BYTES // max(w.nbytes, 1)))
    count = min(count, _MAX_COPIES)
    with memory_errors("copies of the weight to tune on", (count - 1) * w.nbytes):
        return [w, *(w.copy() for _ in range(count - 1))]


def _time(candidate: Plan, x: Any, copies: Sequence[SparseWeight], stream: Any) -> float:
    import cupy

    from flashllm.device import memory_errors

    out = cupy.empty((candidate.n, candidate.shape[0]), x.dtype)
    with memory_errors("workspace to tune with", candidate.workspace_bytes + candidate.scratch_bytes):
        workspace = cupy.zeros(max(candidate.workspace_bytes, 16), cupy.uint8)
        scratch = cupy.empty(max(candidate.scratch_bytes, 16), cupy.uint8)
    cupy.cuda.Device().synchronize()
    launches = max(_MIN_LAUNCHES, len(copies))  # every copy is used at least once, or the L2 would hold those in use

    def run(index: int) -> None:
        w = copies[index % len(copies)]
        spmm(x, w, out=out, workspace=workspace, scratch=scratch, stream=stream, plan=candidate)

    run(0)
    stream.synchronize()

    def rotate() -> None:
        for index in range(launches):
            run(index)

    graph = graphs.capture(rotate, stream)
    graphs.replay_us(graph, stream, launches)  # warms up
    return statistics.median(graphs.replay_us(graph, stream, launches) for _ in range(_REPEATS))
