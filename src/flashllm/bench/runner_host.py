# SPDX-License-Identifier: Apache-2.0
"""Runs cases without a GPU: packs the weights, multiplies on the CPU, checks. Claims no times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flashllm.bench import check
from flashllm.bench.cases import Group
from flashllm.bench.data import make_inputs, to_float64
from flashllm.bench.environment import Environment
from flashllm.bench.results import Row
from flashllm.bench.rows import Measured, make_row
from flashllm.bench.runner_types import Emit, Wanted
from flashllm.bench.sources import Source
from flashllm.formats.weight import SparseWeight
from flashllm.progress import Advance
from flashllm.registry import weight_class

if TYPE_CHECKING:
    from flashllm.backends.emulator_counts import Counts

NoteCounts = Callable[[Row, "Counts"], None]
"""Takes a row and the counts from its emulated kernel."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """y[N, M] and how it was computed."""

    y: Any
    kernel: str
    choice: str
    deterministic: bool
    counts: Counts | None = None


class Multiplier(Protocol):
    """A way to multiply on the CPU."""

    def prepare(self, products: Sequence[tuple[SparseWeight, int]]) -> None:
        """Get ready for these weights and numbers of columns."""

    def multiply(self, x: Any, w: SparseWeight) -> Product:
        """x[N, K] @ W[M, K]^T."""


class ReferenceMultiplier:
    """NumPy, in float64."""

    def prepare(self, products: Sequence[tuple[SparseWeight, int]]) -> None:
        """Nothing to do."""

    def multiply(self, x: Any, w: SparseWeight) -> Product:
        """The product from the packed buffers, rounded once."""
        from flashllm.backends import reference

        return Product(y=reference.spmm(x, w), kernel="numpy", choice="auto", deterministic=True)


class EmulatorMultiplier:
    """The kernel that a GPU of ``arch`` would run, on the CPU."""

    def __init__(self, *, arch: str = "90a", seed: int = 0) -> None:
        from flashllm.backends import emulator

        self._build, self._seed = emulator.BuildOptions(arch=arch), seed
        self._device = emulator.emulated_device(arch)

    def prepare(self, products: Sequence[tuple[SparseWeight, int]]) -> None:
        """Compile all instances at once, which shares their common part."""
        from flashllm.backends import emulator
        from flashllm.matmul import planning

        specs = [planning.plan(w, n, device=self._device, expand=False).spec for w, n in products]
        emulator.preload(dict.fromkeys(specs), build=self._build)

    def multiply(self, x: Any, w: SparseWeight) -> Product:
        """The planned kernel's product; the emulator poisons the output beforehand."""
        from flashllm.backends import emulator
        from flashllm.matmul import planning

        plan = planning.plan(w, int(x.shape[0]), device=self._device, expand=False)
        y, counts = emulator.spmm(x, w, choice=plan.choice, build=self._build, seed=self._seed)
        return Product(
            y=y, kernel=plan.spec.label, choice=plan.source, deterministic=plan.spec.deterministic, counts=counts
        )


def multiplier(backend: str, *, seed: int = 0) -> Multiplier:
    """The multiplier for backend ``"emulator"`` or ``"reference"``; ``seed`` determines the emulated schedule."""
    return EmulatorMultiplier(seed=seed) if backend == "emulator" else ReferenceMultiplier()


@dataclass(frozen=True, kw_only=True)
class _Packed:
    sparsity: float | None
    weight: SparseWeight
    rows: Any
    sampled: Any
    """float64 values of ``rows`` before packing."""
    batches: list[int]


def run_host(
    groups: Iterable[Group],
    environment: Environment,
    source: Source,
    *,
    check_rows: int,
    emit: Emit,
    wanted: Wanted,
    advance: Advance,
    note_counts: NoteCounts,
) -> None:
    """Check every ``wanted`` case on ``environment.backend``: the packed weight's product against float64 of the
    dense one.
    """
    for group in groups:
        made = multiplier(environment.backend, seed=group.seed)
        packed = []
        for sparsity in group.sparsities:
            batches = {
                f: [n for s, n, name in group.cases if (s, name) == (sparsity, f) and wanted(group, s, n, f)]
                for f in group.formats_for(sparsity)
            }
            if any(batches.values()):
                advance(f"{group.title}: packing", 0)
                packed += _pack(group, sparsity, source, check_rows, batches)
        advance(f"{group.title}: compiling", 0)
        made.prepare([(one.weight, n) for one in packed for n in one.batches])
        for one in packed:
            for n in one.batches:
                advance(group.title, 0)
                x = make_inputs(group, n, device=False)
                product = made.multiply(x, one.weight)
                row = make_row(environment, group, n, _measured(group, x, one, product))
                if product.counts is not None:
                    note_counts(row, product.counts)
                emit(row)
                advance(group.title, 1)


def _pack(
    group: Group, sparsity: float | None, source: Source, check_rows: int, batches: dict[str, list[int]]
) -> list[_Packed]:
    """The matrix in every format that ``batches`` has work for."""
    dense = source.dense(group, sparsity, device=False)
    rows = check.sample_rows(group.m, check_rows, group.seed)
    sampled = to_float64(dense[rows], group.dtype)
    packed = []
    for name, wanted in batches.items():
        if wanted:
            weight = weight_class(name).from_dense(dense, dtype=group.dtype)
            packed.append(_Packed(sparsity=sparsity, weight=weight, rows=rows, sampled=sampled, batches=wanted))
    return packed


def _measured(group: Group, x: Any, packed: _Packed, product: Product) -> Measured:
    reference = check.make_reference(to_float64(x, group.dtype), packed.sampled, packed.rows, group.dtype)
    y64 = to_float64(np.asarray(product.y), group.dtype)
    ratio = check.error_over_bound(y64, reference)
    return Measured(
        system="flashllm",
        format=packed.weight.format,
        kernel=product.kernel,
        choice=group.choice(product.choice),
        deterministic=product.deterministic,
        sparsity=packed.sparsity,
        sparsity_real=1.0 - packed.weight.nnz / (group.m * group.k),
        weight_bytes=packed.weight.nbytes,
        copies=1,
        ratio=ratio,
        passed=ratio <= 1.0,
        reference=f"float64 on {len(packed.rows)} rows",
    )
