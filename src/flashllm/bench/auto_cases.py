# SPDX-License-Identifier: Apache-2.0
"""Chooses the format for each case of a group when none is named."""

from __future__ import annotations

from dataclasses import replace

from flashllm.bench.cases import Group
from flashllm.bench.data import random_matrix
from flashllm.bench.sources import Source
from flashllm.gpus import Gpu
from flashllm.matmul import auto
from flashllm.matmul.sample import Contents, estimated, representative, sampled

_PART = (1024, 8192)
"""Largest number of rows and columns of the random matrix that stands in for one with the same pattern of zeros."""


def choose_formats(group: Group, source: Source, *, gpu: Gpu) -> Group:
    """``group`` with the format that takes the least time on ``gpu`` for every sparsity and, separately, every N.

    Packed sizes are estimated from the density for uniform zeros; for other patterns and for files, a part of the
    matrix is packed.
    """
    names = auto.usable_formats(None, gpu)
    chosen = []
    for sparsity in group.sparsities:
        contents = _contents(group, sparsity, source, names)
        chosen += [(sparsity, n, auto.rank(contents, n, gpu=gpu).best.format) for n in group.batches]
    used = {name for _, _, name in chosen}
    return replace(group, formats=tuple(name for name in names if name in used), chosen=tuple(chosen))


def _contents(group: Group, sparsity: float | None, source: Source, names: list[str]) -> Contents:
    shape, density = (group.m, group.k), source.density(sparsity)
    if sparsity is None:
        return sampled(source.dense(group, None, device=False), names, dtype=group.dtype)
    if group.pattern == "uniform":
        return estimated(shape, density, names, dtype=group.dtype)
    m, k = (min(size, most) for size, most in zip(shape, _PART, strict=True))
    part = random_matrix(m, k, density=density, pattern=group.pattern, seed=group.seed, dtype=group.dtype)
    return representative(shape, part, names, dtype=group.dtype)
