# SPDX-License-Identifier: Apache-2.0
"""SparTA's split of an unstructured matrix: a 2:4 part for sparse tensor cores, a CSR part for what does not fit.

Zheng et al., "SparTA", OSDI'22, as the harness of the Flash-LLM paper (VLDB'24) composes it from two libraries: every
group of four neighbours along K gives its first two nonzeros, in order of position, to the 2:4 part and the others to
the residual. Sputnik's product of the residual writes y; the product of the 2:4 part, there by cuSPARSELt, is then
added to y.
Here both are our own kernels, ``cuda/baselines/sputnik.cu`` and ``cuda/baselines/two_four.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from flashllm.baselines import sputnik, two_four
from flashllm.baselines.baseline import Step
from flashllm.baselines.csr import check_dense
from flashllm.baselines.pattern_24 import GROUP, KEPT
from flashllm.baselines.sputnik import Sputnik
from flashllm.baselines.two_four import TwoFour
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How each part is multiplied."""

    residual: sputnik.Choice
    structured: two_four.Choice

    @property
    def label(self) -> str:
        """Both labels, in the order of the launches."""
        return f"{self.residual.label} + {self.structured.label}"


@dataclass(frozen=True, kw_only=True, eq=False)
class SparTA:
    """fp16 W[M, K] as the sum of a 2:4 matrix and a sparser one.

    y is rounded to fp16 between the launches, as in the published composition. A product of integers is exact as long
    as y and the product of the residual alone are fp16 numbers.
    """

    SYSTEM: ClassVar[str] = "sparta"
    FORMAT: ClassVar[str] = "2:4+csr"
    LAYOUT: ClassVar[Literal["row", "column"]] = "column"
    ERROR_LIMIT: ClassVar[float] = 64.0
    """Times the bound: where the parts are much larger than their sum, rounding one is a large error of the sum."""

    structured: TwoFour
    residual: Sputnik

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.structured.shape

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.structured.nbytes + self.residual.nbytes

    @classmethod
    def from_dense(cls, dense: Any) -> Self:
        """Encode a C-contiguous float16 [M, K] array, NumPy or CuPy, on the side it is on; K is at most 65535.

        Raises :class:`ArgumentError` for another type, shape or layout.
        """
        residual = Sputnik.from_dense(residual_of(dense))
        return cls(structured=TwoFour.first_two(dense), residual=residual)

    def to_dense(self) -> Any:
        """The matrix as float16 [M, K], on the side the weight is on; pruned elements are +0."""
        sum_of_parts = self.structured.to_dense()
        bits = sum_of_parts.view(np.uint16)
        bits |= self.residual.to_dense().view(np.uint16)  # where one part has an element the other has +0
        return sum_of_parts

    def copy(self) -> Self:
        """The same weight in buffers of its own."""
        return type(self)(structured=self.structured.copy(), residual=self.residual.copy())

    def choices(self, n: int, *, sm_count: int) -> tuple[Choice, ...]:
        """For ``n`` columns of x: all choices of the 2:4 part, each with Sputnik's published configuration."""
        residual = self.residual.choices(n, sm_count=sm_count)[0]
        structured = self.structured.choices_as(n, sm_count=sm_count, column=True, add=True)
        return tuple(Choice(residual=residual, structured=choice) for choice in structured)

    def workspace_bytes(self, n: int, choice: Choice) -> int:
        """What the larger part needs: they are multiplied one after the other, in the same memory."""
        return max(
            self.residual.workspace_bytes(n, choice.residual), self.structured.workspace_bytes(n, choice.structured)
        )

    def steps(self, x: Any, y: Any, workspace: Any, choice: Choice) -> tuple[Step, ...]:
        """y[M, N] = the residual's product with x[K, N], then y += that of the 2:4 part."""
        if not (choice.structured.column and choice.structured.add):
            raise ArgumentError("choice", expected="a 2:4 part in column layout that adds to y", got=choice.label)
        return (
            *self.residual.steps(x, y, workspace, choice.residual),
            *self.structured.steps(x, y, workspace, choice.structured),
        )


def residual_of(dense: Any) -> Any:
    """What :meth:`TwoFour.first_two` leaves out of a float16 [M, K] array: the third and fourth nonzeros of groups."""
    xp = check_dense(dense)
    rows, columns = dense.shape
    out = xp.empty((rows, columns), np.uint16)
    for start, groups in two_four.strips(dense):
        before = xp.zeros(groups.shape[:2], np.uint8)  # nonzeros of a group before this place
        for place in range(GROUP):
            element = groups[..., place].copy()
            groups[..., place] = xp.where(before < KEPT, np.uint16(0), element)
            before += element != 0
        out[start : start + len(groups)] = groups.reshape(len(groups), -1)[: rows - start, :columns]
    return out.view(np.float16)


def specs() -> tuple[KernelSpec, ...]:
    """Every kernel that :meth:`SparTA.choices` can name."""
    return (*two_four.specs_as(column=True, add=True), *sputnik.specs())
