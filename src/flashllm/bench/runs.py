# SPDX-License-Identifier: Apache-2.0
"""One system on one case: launched once into a poisoned output, compared, and turned into a row's content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashllm.baselines.baseline import Way
from flashllm.bench import check, systems, timing
from flashllm.bench.cases import Group
from flashllm.bench.data import to_float64
from flashllm.bench.rows import Measured


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A matrix at one sparsity and, per N, what the output must be."""

    sparsity: float | None
    sparsity_real: float
    largest: float
    """Largest absolute value of the weights."""
    references: dict[int, check.Reference]
    """By N: float64 results of some rows of W."""
    outputs: dict[int, Any]
    """By N: cuBLAS's product of the dense matrix, whole."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The matrix of one of the systems we compare with, in rotating copies, and what multiplying it must give."""

    group: Group
    item: Prepared
    weights: list[Any]
    inputs: dict[int, Any]
    """x by N, as the system multiplies it."""
    given: dict[int, Any]
    """x by N, float16, as the system takes it."""


@dataclass(kw_only=True)
class Run:
    """One system of one case, with the outcome of its checks so far."""

    group: Group
    """The case as its row describes it."""
    x: Any
    """x as it is multiplied."""
    name: str
    format: str
    kernel: str
    choice: str
    deterministic: bool | None
    system: Any
    """A :class:`flashllm.bench.timing.System`."""
    output: Callable[[], Any]
    """The last output as [N, M]."""
    buffer: Callable[[], Any]
    """Where the output is written."""
    item: Prepared
    weight_bytes: int
    overlaps: bool = False
    """Its launches may overlap each other."""
    limit: float = 1.0
    """The system passes up to this many times the error bound."""
    ratio: float = 0.0
    whole_ratio: float = 0.0

    @classmethod
    def of_ours(cls, system: systems.FlashLLM, item: Prepared, group: Group, *, ablation: str | None = None) -> Run:
        """Our kernel, or with ``ablation``, the name of one of its ideas, our kernel without that idea."""
        plan, weight = system.plan, system.weights[0]
        variant = "-pdl" if system.overlaps else "" if ablation is None else "-ablation"
        return cls(
            group=group,
            x=system.x,
            name=f"flashllm{variant}",
            format=weight.format,
            kernel=plan.label if ablation is None else f"{ablation}: {plan.label}",
            choice=system.choice if ablation is not None else group.choice(system.choice),
            deterministic=plan.spec.deterministic,
            system=system,
            output=lambda: system.y,
            buffer=lambda: system.y,
            item=item,
            weight_bytes=weight.nbytes,
            overlaps=system.overlaps,
            limit=1.0 if plan.expansion is None else check.BASELINE_LIMIT,
        )

    @classmethod
    def of_cublas(
        cls, system: systems.CublasSystem, item: Prepared, group: Group, x: Any, *, name: str = "cublas"
    ) -> Run:
        """The best cuBLAS candidate; ``item`` is what its dense weights hold."""
        return cls(
            group=group,
            x=x,
            name=name,
            format="dense",
            kernel=system.candidate.label,
            choice="tuned",
            deterministic=None,
            system=system,
            output=lambda: system.output(x.shape[0], group.m),
            buffer=lambda: system.y,
            item=item,
            weight_bytes=group.dense_bytes,
            limit=check.BASELINE_LIMIT,
        )

    @classmethod
    def of_cupy(cls, system: systems.CupyMatmul, item: Prepared, group: Group, x: Any) -> Run:
        """``cupy.matmul`` in its better order; ``item`` is what its dense weights hold."""
        return cls(
            group=group,
            x=x,
            name="cupy-matmul",
            format="dense",
            kernel=system.label,
            choice="auto",
            deterministic=None,
            system=system,
            output=system.output,
            buffer=lambda: system.y,
            item=item,
            weight_bytes=group.dense_bytes,
            limit=check.BASELINE_LIMIT,
        )

    @classmethod
    def of_baseline(cls, way: Way, compared: Compared, x: Any) -> Run:
        """The best way of another system."""
        first = compared.weights[0]
        return cls(
            group=compared.group,
            x=x,
            name=first.SYSTEM,
            format=first.FORMAT,
            kernel=way.label,
            choice="tuned",
            deterministic=way.deterministic,
            system=way,
            output=way.output,
            buffer=way.buffer,
            item=compared.item,
            weight_bytes=first.nbytes,
            limit=way.error_limit,
        )

    def check(self, copy: int, stream: Any) -> None:
        """Launch once on weight copy ``copy`` and :meth:`compare`."""
        check.poison(self.buffer(), self.group.dtype)
        self.system.launch(copy, stream)
        self.compare()

    def compare(self) -> None:
        """Compare the output of the last launch with both references and keep the worst ratios."""
        x, dtype = self.x, self.group.dtype
        n, item = x.shape[0], self.item
        y64 = to_float64(self.output(), dtype)
        self.ratio = max(self.ratio, check.error_over_bound(y64, item.references[n]))
        other, x64 = to_float64(item.outputs[n], dtype), to_float64(x, dtype)
        whole = check.whole_error_over_bound(y64, other, x64, item.largest, dtype)
        self.whole_ratio = max(self.whole_ratio, whole)

    def measured(self, result: timing.Timing, cublas_us: float) -> Measured:
        """What the row says about this run."""
        rows = len(next(iter(self.item.references.values())).rows)
        return Measured(
            system=self.name,
            format=self.format,
            kernel=self.kernel,
            choice=self.choice,
            deterministic=self.deterministic,
            sparsity=self.item.sparsity,
            sparsity_real=self.item.sparsity_real,
            weight_bytes=self.weight_bytes,
            copies=self.system.copies,
            ratio=self.ratio,
            passed=self.ratio <= self.limit and self.whole_ratio <= max(1.0, self.limit / check.BASELINE_LIMIT),
            reference=f"float64 on {rows} rows, cublas on all",
            timing=result,
            cublas_us=None if self.overlaps else cublas_us,  # cuBLAS's launches do not overlap
            overlaps=self.overlaps,
        )
