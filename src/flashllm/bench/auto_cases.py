# SPDX-License-Identifier: Apache-2.0
"""Which format each case of a group takes when none is named."""

from __future__ import annotations

from dataclasses import replace

from flashllm.bench.cases import Group
from flashllm.bench.data import random_matrix
from flashllm.bench.sources import Source
from flashllm.gpus import Gpu
from flashllm.matmul import auto
from flashllm.matmul.sample import Contents, estimated, representative, sampled

_PART = (1024, 8192)
"""Rows and columns, at most, of the random matrix that stands for one with the same pattern of zeros."""


def choose_formats(group: Group, source: Source, *, gpu: Gpu) -> Group:
    """``group`` with the format for every sparsity and N that takes least time on ``gpu``; each N by itself.

    By density for uniform zeros, by packing a part of the matrix for others and for files.
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
