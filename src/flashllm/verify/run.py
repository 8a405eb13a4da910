# SPDX-License-Identifier: Apache-2.0
"""Runs cases on a backend and reports the first wrong element."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashllm.bench import check
from flashllm.bench.data import to_float64
from flashllm.errors import ArgumentError, FlashLLMError, MissingDependencyError
from flashllm.verify.cases import Case
from flashllm.verify.operands import Problem, make_problem
from flashllm.verify.products import Multiplier


@dataclass(frozen=True, kw_only=True)
class WrongElement:
    """The first wrong element of y in row-major order."""

    n: int
    m: int
    got: float
    expected: float
    bound: float
    """How far from ``expected`` it may be; 0 where the result is exact."""
    wrong: int
    """Wrong elements in all."""
    elements: int

    def __str__(self) -> str:
        return (
            f"y[{self.n}, {self.m}]: got {self.got:.9g}, expected {self.expected:.9g}, bound {self.bound:.3g} "
            f"({self.wrong:,} of {self.elements:,} elements are wrong)"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a case."""

    case: Case
    error_over_bound: float | None = None
    """Largest error in units of the bound, where one applies."""
    wrong: WrongElement | None = None
    misbehaved: str | None = None
    """What the kernel did that no kernel may, when it gave no result."""

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be."""
        return self.wrong is None and self.misbehaved is None

    @property
    def text(self) -> str:
        """One line on what is wrong."""
        return f"{self.case.text}: {self.wrong or self.misbehaved or 'ok'}"


def run_cases(
    cases: Sequence[Case], made: Multiplier, *, say: Callable[[str, int], None] = lambda text, done: None
) -> Iterator[Outcome]:
    """Outcomes in the order of ``cases``, the last one being the first that failed.

    ``say`` is told what is being done and how many cases have been finished since the last call. Raises
    ``CompileError`` if a kernel does not compile, and an error if this machine cannot use the backend.
    """
    made.prepare(cases, lambda text: say(text, 0))
    for case in cases:
        say(case.data.text, 0)
        outcome = run_case(case, made)
        yield outcome
        say(case.data.text, 1)
        if not outcome.passed:
            return


def run_case(case: Case, made: Multiplier) -> Outcome:
    """Multiply and check one case."""
    problem = make_problem(case.data)
    try:
        y = made.multiply(case, problem)
    except (ArgumentError, MissingDependencyError):
        raise
    except FlashLLMError as error:
        return Outcome(case=case, misbehaved=str(error))
    wanted = (case.data.n, case.data.m)
    if y.shape != wanted or y.dtype != problem.x.dtype:
        return Outcome(case=case, misbehaved=f"y is {y.shape} of {y.dtype}, expected {wanted} of {problem.x.dtype}")
    return _compare(case, problem, to_float64(y, case.data.dtype))


def _compare(case: Case, problem: Problem, y: NDArray[np.float64]) -> Outcome:
    expected, ratio = problem.expected, None
    if problem.reference is None:
        # Either sign of a zero is right, any NaN is a NaN.
        wrong = _differs(y, expected)
        if problem.without_zeros is not None:
            wrong &= _differs(y, problem.without_zeros)
        bounds = np.zeros(expected.shape)
    else:
        ratios = check.error_ratios(y, problem.reference)
        wrong, bounds = ratios > 1.0, check.bounds(problem.reference)
        ratio = float(ratios.max(initial=0.0))
    return Outcome(case=case, error_over_bound=ratio, wrong=_first(wrong, y, expected, bounds))


def _differs(y: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    differs: NDArray[np.bool_] = (y != expected) & ~(np.isnan(y) & np.isnan(expected))
    return differs


def _first(
    wrong: NDArray[np.bool_], y: NDArray[np.float64], expected: NDArray[np.float64], bounds: NDArray[np.float64]
) -> WrongElement | None:
    where: Iterable[NDArray[np.int64]] = np.argwhere(wrong)[:1]
    for n, m in where:
        return WrongElement(
            n=int(n),
            m=int(m),
            got=float(y[n, m]),
            expected=float(expected[n, m]),
            bound=float(bounds[n, m]),
            wrong=int(np.count_nonzero(wrong)),
            elements=int(y.size),
        )
    return None
