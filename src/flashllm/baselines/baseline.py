# SPDX-License-Identifier: Apache-2.0
"""What the systems we compare with have in common.

Each has a weight class: the matrix as that system stores it. Where the system's kernels are our own code, in
``cuda/baselines/`` (:class:`Baseline`), a weight is on the host (NumPy) or the GPU (CuPy) and says which instances of
its kernel are candidates for N columns of x, and what has to be launched for a product. Where they are another
library's (:class:`LibraryBaseline`), a weight is on the GPU alone and prepares the calls itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from flashllm.jit.spec import KernelSpec

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel launch of a product; ``args`` are arrays on the side where the weight is, and NumPy scalars."""

    spec: KernelSpec
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class Choice(Protocol):
    """One way to compute a product: kernel instance, split-K."""

    @property
    def label(self) -> str:
        """Short text for result rows."""


class Baseline(Protocol):
    """fp16 W[M, K] as a system stores it. Products: y = x @ W^T, sums in fp32, y in fp16."""

    SYSTEM: ClassVar[str]
    """Name of the system in result rows."""
    FORMAT: ClassVar[str]
    """Name of the format in result rows."""
    LAYOUT: ClassVar[Literal["row", "column"]]
    """Layout of x and y: ``row``: x [N, K], y [N, M], as everywhere in this package; ``column``: x [K, N], y [M, N].

    A class may also have an ``ERROR_LIMIT``: see :attr:`Way.error_limit`.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight: all arrays."""

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side where it is; any M, K >= 1.

        Raises :class:`flashllm.errors.ArgumentError` for another type or shape, or one that the format cannot hold.
        """

    def copy(self) -> Self:
        """The same weight in buffers of its own."""

    def choices(self, n: int, *, sm_count: int) -> Sequence[Choice]:
        """What to try for ``n`` columns of x (any number >= 1) on a GPU of ``sm_count`` multiprocessors; not empty."""

    def workspace_bytes(self, n: int, choice: Any) -> int:
        """Bytes of device memory, whatever they hold, that the steps of a product need beside x and y."""

    def steps(self, x: Any, y: Any, workspace: Any, choice: Any) -> tuple[Step, ...]:
        """The launches of one product, in order.

        ``x`` and ``y``: C-contiguous float16, laid out as :attr:`LAYOUT` says, at multiples of 16 bytes; ``workspace``:
        uint8. Every element of y is written.
        """


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute y = x @ W^T on the GPU, with any of the rotating copies of W: what is timed."""

    label: str
    """Kernel or algorithm, for result rows."""
    deterministic: bool | None
    """``None``: not known."""
    copies: int
    launch: Callable[[int, Any], None]
    """``launch(copy, stream)`` queues a product; a graph can capture it. ``stream`` is CuPy's current one."""
    buffer: Callable[[], Any]
    """What the last launch wrote, to be poisoned before the next."""
    output: Callable[[], Any]
    """The same as [N, M]."""
    error_limit: float = 8.0
    """Its error may be this many times the bound that our kernels promise: pieces of a sum may be added in fp16."""


class LibraryBaseline(Protocol):
    """W[M, K] as another library stores it, on the current GPU."""

    SYSTEM: ClassVar[str]
    FORMAT: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 CuPy array [M, K]. Raises :class:`flashllm.errors.ArgumentError`."""

    def copy(self) -> Self:
        """The same weight in buffers of its own."""

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """What to try with x, a float16 CuPy array [N, K]; empty where the library can do none of it.

        Whatever is allocated or searched for is done here, on ``stream``.
        """


def kernel_ways(weights: Sequence[Baseline], x: Any) -> list[Way]:
    """The ways of a system with kernels of our own: all its choices, with one workspace. x is CuPy float16 [N, K]."""
    import cupy

    from flashllm.device import device_facts

    first = weights[0]
    (n, _), (m, _) = x.shape, first.shape
    columns = first.LAYOUT == "column"
    x = cupy.ascontiguousarray(x.T) if columns else x
    y = cupy.empty((m, n) if columns else (n, m), dtype=cupy.float16)
    choices = first.choices(n, sm_count=device_facts().sm_count)
    workspace = cupy.empty(max(1, *(first.workspace_bytes(n, choice) for choice in choices)), dtype=cupy.uint8)

    def way(choice: Choice) -> Way:
        steps = [w.steps(x, y, workspace, choice) for w in weights]
        return Way(
            label=choice.label,
            deterministic=all(step.spec.deterministic for step in steps[0]),
            copies=len(weights),
            launch=lambda copy, stream: run(steps[copy], stream=stream),
            buffer=lambda: y,
            output=lambda: y.T if columns else y,
            error_limit=getattr(first, "ERROR_LIMIT", Way.error_limit),
        )

    return [way(choice) for choice in choices]


def run(steps: Sequence[Step], *, stream: Any = None) -> None:
    """Queue ``steps`` on the GPU. Allocates nothing once each kernel has been launched, so graphs can capture it."""
    from flashllm.backends import cuda

    for step in steps:
        cuda.launch(step.spec, step.grid, step.args, stream=stream)
