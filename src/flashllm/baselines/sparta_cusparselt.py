# SPDX-License-Identifier: Apache-2.0
"""SparTA's split with the libraries of the Flash-LLM paper's harness: the 2:4 part by cuSPARSELt, through PyTorch.

Our own Sputnik multiplies the residual, as in :mod:`flashllm.baselines.sparta`. PyTorch's call cannot add to y,
although cuSPARSELt itself can, so a third launch adds the two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flashllm.baselines import cusparselt, sparta
from flashllm.baselines.baseline import Step, Way, run
from flashllm.baselines.cusparselt import CusparseLt24
from flashllm.baselines.sputnik import Sputnik
from flashllm.baselines.torch_calls import as_tensor, way

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, eq=False)
class SparTACusparseLt:
    """fp16 W[M, K], M and K multiples of 32, as the sum of a 2:4 matrix and a sparser one, on the current GPU."""

    SYSTEM: ClassVar[str] = "sparta-cusparselt"
    FORMAT: ClassVar[str] = sparta.SparTA.FORMAT

    structured: CusparseLt24
    residual: Sputnik

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.structured.nbytes + self.residual.nbytes

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 CuPy array [M, K]. Raises :class:`flashllm.errors.ArgumentError`."""
        rest = sparta.residual_of(dense)
        residual = Sputnik.from_dense(rest)
        rest = rest.view(np.uint16)
        rest ^= dense.view(np.uint16)  # what the residual has becomes 0, the rest comes back
        return cls(structured=CusparseLt24.from_dense(rest.view(np.float16)), residual=residual)

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return type(self)(structured=self.structured.copy(), residual=self.residual.copy())

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        """One with each of cuSPARSELt's products for this x, with y as [M, N]; none for an N that it refuses."""
        import cupy

        from flashllm.device import device_facts

        parts = cusparselt.products([w.structured for w in weights], x, stream)
        if not parts:
            return []
        first, columns = weights[0].residual, cupy.ascontiguousarray(x.T)
        (n, _), (m, _) = x.shape, first.shape
        choice = first.choices(n, sm_count=device_facts().sm_count)[0]
        workspace = cupy.empty(max(1, first.workspace_bytes(n, choice)), dtype=cupy.uint8)
        y = cupy.empty((m, n), dtype=cupy.float16)
        steps = [w.residual.steps(columns, y, workspace, choice) for w in weights]
        return [
            way(
                f"{choice.label} + {label}",
                len(weights),
                _sum(steps, as_tensor(y), multiply),
                transposed=True,
                error_limit=sparta.SparTA.ERROR_LIMIT,
            )
            for label, multiply in parts
        ]


def _sum(steps: Sequence[tuple[Step, ...]], y: Any, multiply: Callable[[int], Any]) -> Callable[[int], Any]:
    """A function of the copy: its ``steps`` write y, a tensor, to which its 2:4 product is then added."""

    def both(copy: int) -> Any:
        run(steps[copy])
        return y.add_(multiply(copy))

    return both
