# SPDX-License-Identifier: Apache-2.0
"""Runs cases without a GPU: packs the weights, multiplies in NumPy, checks. Claims no times."""

from __future__ import annotations

from collections.abc import Iterable

from flashllm.bench import check
from flashllm.bench.cases import Group
from flashllm.bench.data import make_inputs, to_float64
from flashllm.bench.environment import Environment
from flashllm.bench.rows import Measured, make_row
from flashllm.bench.runner_types import Advance, Emit, Wanted
from flashllm.bench.sources import Source


def run_reference(
    groups: Iterable[Group],
    environment: Environment,
    source: Source,
    *,
    check_rows: int,
    emit: Emit,
    wanted: Wanted,
    advance: Advance,
) -> None:
    """Check every ``wanted`` case: the packed weight's product against float64 of the dense one."""
    from flashllm.backends.reference import spmm
    from flashllm.formats.tiled_csl import TiledCSL

    for group in groups:
        for sparsity in group.sparsities:
            batches = [n for n in group.batches if wanted(group, sparsity, n)]
            if not batches:
                continue
            dense = source.dense(group, sparsity, device=False)
            weight = TiledCSL.from_dense(dense, dtype=group.dtype)
            rows = check.sample_rows(group.m, check_rows, group.seed)
            sampled = to_float64(dense[rows], group.dtype)
            for n in batches:
                x = make_inputs(group, n, device=False)
                reference = check.make_reference(to_float64(x, group.dtype), sampled, rows, group.dtype)
                ratio = check.error_over_bound(to_float64(spmm(x, weight), group.dtype), reference)
                measured = Measured(
                    system="flashllm",
                    format=weight.format,
                    kernel="numpy",
                    choice="auto",
                    deterministic=True,
                    sparsity=sparsity,
                    sparsity_real=1.0 - weight.nnz / (group.m * group.k),
                    weight_bytes=weight.nbytes,
                    copies=1,
                    ratio=ratio,
                    passed=ratio <= 1.0,
                    reference=f"float64 on {len(rows)} rows",
                )
                emit(make_row(environment, group, n, measured))
                advance(group.title, 1)
