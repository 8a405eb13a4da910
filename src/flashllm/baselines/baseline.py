# SPDX-License-Identifier: Apache-2.0
"""What the systems we compare with have in common, where their kernels are our own code (``cuda/baselines/``).

A class of weights for each: the matrix as that system stores it, on the host (NumPy) or the GPU (CuPy). It says which
instances of its kernel come into question for N columns of x, and what has to be launched for a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from flashllm.jit.spec import KernelSpec

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel launch of a product; ``args`` are arrays of the side the weight is on, and NumPy scalars."""

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
    """How x and y lie: ``row``: x [N, K], y [N, M], as everywhere in this package; ``column``: x [K, N], y [M, N]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight: all arrays."""

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side it is on. M, K >= 1, any number.

        Raises :class:`flashllm.errors.ArgumentError` for another type or shape, or one that the format cannot hold.
        """

    def copy(self) -> Self:
        """The same weight in buffers of its own."""

    def choices(self, n: int, *, sm_count: int) -> Sequence[Choice]:
        """What to try for ``n`` columns of x (any number >= 1) on a GPU with so many multiprocessors; never empty."""

    def workspace_bytes(self, n: int, choice: Any) -> int:
        """Bytes of device memory, with anything in them, that the steps of a product need beside x and y."""

    def steps(self, x: Any, y: Any, workspace: Any, choice: Any) -> tuple[Step, ...]:
        """The launches of one product, in order.

        ``x`` and ``y``: C-contiguous float16, as :attr:`LAYOUT` says, addresses multiples of 16 bytes; ``workspace``:
        uint8. Every element of y is written.
        """


def run(steps: Sequence[Step], *, stream: Any = None) -> None:
    """Queue ``steps`` on the GPU. Allocates nothing once each kernel has been launched, so graphs can capture it."""
    from flashllm.backends import cuda

    for step in steps:
        cuda.launch(step.spec, step.grid, step.args, stream=stream)
