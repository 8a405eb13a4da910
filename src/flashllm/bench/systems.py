# SPDX-License-Identifier: Apache-2.0
"""The systems that a GPU run times, each with its own copies of the weights, and the search for the best of cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from flashllm import graphs
from flashllm.baselines.cublas import Candidate, Cublas, Layout
from flashllm.bench import timing
from flashllm.formats.weight import SparseWeight

if TYPE_CHECKING:
    from flashllm.matmul.kernel import KernelChoice

LAYOUTS_ROW = (Layout(w="mk", y="nm"), Layout(w="mk", y="mn"))
LAYOUTS_BOTH = (*LAYOUTS_ROW, Layout(w="km", y="nm"), Layout(w="km", y="mn"))
_SEARCH_FINALISTS = 4
_SEARCH_ROUNDS = 3

Weight = TypeVar("Weight", bound=SparseWeight)


def rotation(weight: Weight, copies: int) -> list[Weight]:
    """``weight`` and ``copies - 1`` copies of it."""
    return [weight, *(weight.copy() for _ in range(copies - 1))]


def empty_output(n: int, m: int, dtype: str) -> Any:
    """Device output y[n, m]: float16, or uint16 bits for bf16."""
    import cupy

    return cupy.empty((n, m), dtype=cupy.float16 if dtype == "fp16" else cupy.uint16)


class FlashLLM:
    """Our kernel: one plan, one workspace, rotating weights. ``choice`` forces an instance of the kernel.

    With ``overlaps``, a launch may begin before the previous one has ended, although both use the same workspace and
    output.
    """

    def __init__(
        self,
        weights: Sequence[SparseWeight],
        x: Any,
        dtype: str,
        *,
        choice: KernelChoice | None = None,
        overlaps: bool = False,
    ) -> None:
        import cupy

        from flashllm.matmul import plan

        self.weights, self.x, self.overlaps = weights, x, overlaps
        self.copies = len(weights)
        self.y = empty_output(x.shape[0], weights[0].shape[0], dtype)
        self.plan = plan(weights[0], x.shape[0], choice=choice)
        self.choice: str = self.plan.source
        self._workspace = cupy.zeros(max(1, self.plan.workspace_bytes), dtype=cupy.uint8)
        self._scratch = cupy.empty(max(1, self.plan.scratch_bytes), dtype=cupy.uint8)

    def launch(self, copy: int, stream: Any) -> None:
        """Queue y = x @ W^T with weight copy ``copy``."""
        from flashllm.matmul import spmm

        spmm(
            self.x,
            self.weights[copy],
            out=self.y,
            workspace=self._workspace,
            scratch=self._scratch,
            stream=stream,
            plan=self.plan,
            overlap_previous=self.overlaps,
        )


class CublasSystem:
    """One cuBLAS candidate; ``weights`` are stored as its layout requires."""

    def __init__(self, candidate: Candidate, weights: Sequence[Any], x: Any, y: Any) -> None:
        self.candidate, self.copies, self.y = candidate, len(weights), y
        self._keep = (list(weights), x)
        self._weights = [int(w.data.ptr) for w in weights]
        self._x, self._y = int(x.data.ptr), int(y.data.ptr)

    def launch(self, copy: int, stream: Any) -> None:
        """Queue the product with weight copy ``copy``."""
        self.candidate.launch(self._weights[copy], self._x, self._y, int(stream.ptr))

    def output(self, n: int, m: int) -> Any:
        """What the last launch wrote, as [n, m]."""
        return self.y.reshape(n, m) if self.candidate.layout.y == "nm" else self.y.reshape(m, n).T


class CupyMatmul:
    """``cupy.matmul`` with ``out=``: what a CuPy user gets. It cannot be captured in a graph.

    y [N, M] = x @ W^T, or with ``transposed`` y [M, N] = W @ x^T.
    """

    def __init__(self, weights: Sequence[Any], x: Any, dtype: str, *, transposed: bool) -> None:
        (n, _), (m, _) = x.shape, weights[0].shape
        self._x, self._transposed, self.copies = x, transposed, len(weights)
        self._weights = list(weights) if transposed else [w.T for w in weights]
        self.y = empty_output(m, n, dtype) if transposed else empty_output(n, m, dtype)
        self.label = "cupy.matmul " + ("W @ x.T" if transposed else "x @ W.T")

    def launch(self, copy: int, stream: Any) -> None:
        """Queue the product with weight copy ``copy``; ``stream`` must be CuPy's current one."""
        import cupy

        if self._transposed:
            cupy.matmul(self._weights[copy], self._x.T, out=self.y)
        else:
            cupy.matmul(self._x, self._weights[copy], out=self.y)

    def output(self) -> Any:
        """What the last launch wrote, as [N, M]."""
        return self.y.T if self._transposed else self.y


def best_cupy(weights: Sequence[Any], x: Any, dtype: str, *, stream: Any) -> CupyMatmul:
    """The faster of the two orders, by a short measurement. ``weights``: copies of W [M, K]."""
    orders = [CupyMatmul(weights, x, dtype, transposed=transposed) for transposed in (False, True)]
    look = timing.Method(launch="stream", warmup_ms=1.0, cap_s=0.02)
    times = [result.median_us for result in timing.measure(orders, look, stream=stream)]
    return orders[times.index(min(times))]


def dense_copies(dense: Any, copies: int, layouts: Sequence[Layout]) -> dict[str, list[Any]]:
    """Device copies of ``dense`` [M, K] for every weight layout used: ``{"mk": [...], "km": [...]}``."""
    import cupy

    stored: dict[str, list[Any]] = {}
    for kind in dict.fromkeys(layout.w for layout in layouts):
        first = dense if kind == "mk" else cupy.ascontiguousarray(dense.T)
        stored[kind] = [first, *(first.copy() for _ in range(copies - 1))]
    return stored


def best_cublas(
    cublas: Cublas,
    weights: dict[str, list[Any]],
    x: Any,
    y: Any,
    *,
    layouts: Sequence[Layout],
    dtype: str,
    stream: Any,
    tensor_cores: bool = True,
) -> CublasSystem:
    """The fastest candidate on these buffers: one short measurement of all, then three more of the best four.

    ``weights`` come from :func:`dense_copies`; ``x`` is [N, K], ``y`` holds N * M elements.
    """
    from flashllm.baselines.cublas_api import CublasError

    n, k = x.shape
    first = next(iter(weights.values()))[0]
    m = first.size // k
    timed: list[tuple[float, int, CublasSystem]] = []
    refused: CublasError | None = None
    with stream:
        for candidate in cublas.candidates(layouts, m=m, k=k, n=n, dtype=dtype, tensor_cores=tensor_cores):
            system = CublasSystem(candidate, weights[candidate.layout.w], x, y)
            try:
                timed.append((glance(system, stream), len(timed), system))
            except CublasError as error:  # a heuristic may offer what the library then refuses to run
                refused = error
        if refused is not None and not timed:
            raise refused
        finalists = [system for _, _, system in sorted(timed)[:_SEARCH_FINALISTS]]
        times = [min(glance(system, stream) for _ in range(_SEARCH_ROUNDS)) for system in finalists]
    return finalists[times.index(min(times))]


def glance(system: timing.System, stream: Any) -> float:
    """Microseconds per launch in a graph of one rotation (4 to 64 launches), after one launch to warm up."""
    launches = max(4, min(system.copies, 64))
    system.launch(0, stream)

    def rotate() -> None:
        for i in range(launches):
            system.launch(i % system.copies, stream)

    return graphs.replay_us(graphs.capture(rotate, stream), stream, launches)
