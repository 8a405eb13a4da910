# SPDX-License-Identifier: Apache-2.0
"""cuSPARSELt's product of a 2:4 matrix, through PyTorch, with its algorithm searched: the default one is slower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from flashllm.baselines.baseline import Way
from flashllm.baselines.csr import check_dense
from flashllm.baselines.pattern_24 import is_two_of_four
from flashllm.baselines.torch_calls import as_tensor, torch, way
from flashllm.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from typing_extensions import Self

_MULTIPLE = 32  # of M and K, for 16-bit types
_X_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class CusparseLt24:
    """A 2:4 matrix W[M, K] compressed by cuSPARSELt, on the current GPU."""

    SYSTEM: ClassVar[str] = "cusparselt-2:4"
    FORMAT: ClassVar[str] = "2:4"

    shape: tuple[int, int]
    packed: Any
    """A tensor: values and positions."""

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return int(self.packed.numel() * self.packed.element_size())

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Compress a float16 CuPy array [M, K] with at most two values in every group of four of a row."""
        check_dense(dense)
        package = torch()
        if not package.backends.cusparselt.is_available():
            raise MissingDependencyError(f"PyTorch {package.__version__} was built without cuSPARSELt")
        if dense.shape[0] % _MULTIPLE or dense.shape[1] % _MULTIPLE:
            got = f"shape {list(dense.shape)}"
            raise ArgumentError("dense", expected=f"M and K that are multiples of {_MULTIPLE}, for cuSPARSELt", got=got)
        if not is_two_of_four(dense):
            raise ArgumentError("dense", expected="at most 2 values in every 4 columns", got="a row with more")
        return cls(shape=dense.shape, packed=package._cslt_compress(as_tensor(dense)))

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return replace(self, packed=self.packed.clone())

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """What :func:`products` finds, with y as [M, N]."""
        return [way(label, len(weights), multiply, transposed=True) for label, multiply in products(weights, x, stream)]


def products(weights: Sequence[CusparseLt24], x: Any, stream: Any) -> list[tuple[str, Callable[[int], Any]]]:
    """Labels and functions ``multiply(copy)``, which return a new tensor y[M, N] on PyTorch's current stream.

    x: float16 CuPy array [N, K]. There is one for each layout of x, with the algorithm that cuSPARSELt's own search
    finds, and none for an N that it refuses. With y as [N, M] the search ends in an illegal instruction (PyTorch 2.11,
    an H200).
    """
    import cupy

    if x.shape[0] % _X_MULTIPLE:
        return []
    package = torch()
    by_rows, by_columns = as_tensor(x).t(), as_tensor(cupy.ascontiguousarray(x.T))
    found = []
    for right, name in ((by_rows, "x[N,K]"), (by_columns, "x[K,N]")):
        with package.cuda.stream(package.cuda.ExternalStream(int(stream.ptr))):
            algorithm, split_k, mode, _ = package._C._cusparselt.mm_search(
                weights[0].packed, right, None, None, None, False
            )
        options = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": mode}
        label = f"cuSPARSELt {name} algorithm {algorithm}" + (f" split {split_k}" if split_k > 1 else "")
        found.append((label, _product(weights, right, options)))
    return found


def _product(weights: Sequence[CusparseLt24], x: Any, options: dict[str, int]) -> Callable[[int], Any]:
    package = torch()

    def multiply(copy: int) -> Any:
        return package._cslt_sparse_mm(weights[copy].packed, x, **options)

    return multiply
