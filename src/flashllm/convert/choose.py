# SPDX-License-Identifier: Apache-2.0
"""Which format a matrix is stored in, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashllm.convert.matrix import Survey
from flashllm.formats.base import DType
from flashllm.formats.sources import is_cupy
from flashllm.gpus import Gpu
from flashllm.io.manifest import ASKED_FOR, DENSE, Options
from flashllm.matmul import auto
from flashllm.matmul.auto import Ranking
from flashllm.matmul.sample import Contents, estimated, representative, slabs_of


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A format, or ``dense``, and one line on what decided it."""

    format: str
    why: str


def choose(a: Any, found: Survey, options: Options, *, dtype: DType, gpu: Gpu | None) -> Choice:
    """The format for a matrix [M, K] of 16 bits, NumPy or CuPy. ``gpu`` is for ``auto``.

    ``auto`` packs some rows in every format, ranks the formats by the time model, and keeps the matrix dense where that
    is faster or smaller than all of them. Raises ``ArgumentError``.
    """
    if options.format != auto.AUTO:
        return Choice(format=options.format, why=ASKED_FOR)
    gpu = gpu or auto.current_gpu()
    formats = auto.usable_formats(None, gpu)
    if is_cupy(a):
        ranking = auto.rank_formats_of(a, options.n, dtype=dtype, gpu=gpu)
    else:
        ranking = auto.rank(_sampled(a, found, formats, dtype), options.n, gpu=gpu)
    return _decide(ranking)


def _sampled(a: Any, found: Survey, formats: Sequence[str], dtype: DType) -> Contents:
    """Like ``matmul.sample.sampled``, but from existing counts, as that function counts in strips of many rows."""
    rows = slabs_of(found.by_row)
    part = a if rows.size == a.shape[0] else a[rows]
    like = representative(a.shape, part, formats, dtype=dtype)
    density = found.nnz / (a.shape[0] * a.shape[1])
    real = estimated(a.shape, density, formats, dtype=dtype).weight_bytes
    reckoned = estimated(a.shape, like.density, formats, dtype=dtype).weight_bytes
    scaled = {name: round(like.weight_bytes[name] * real[name] / reckoned[name]) for name in formats}
    return replace(like, density=density, weight_bytes=scaled)


def _decide(ranking: Ranking) -> Choice:
    best, dense = ranking.best, ranking.dense
    smallest = min(ranking.candidates, key=lambda candidate: candidate.weight_bytes)
    if best.mean_us >= dense.mean_us:
        slower = best.mean_us / dense.mean_us
        return Choice(format=DENSE, why=f"faster as it is: {best.format} would take {slower:.2f} of its time")
    if smallest.weight_bytes >= dense.weight_bytes:
        larger = smallest.weight_bytes / dense.weight_bytes
        return Choice(format=DENSE, why=f"smaller as it is: {smallest.format} would take {larger:.2f} of its bytes")
    gain = dense.mean_us / best.mean_us
    return Choice(format=best.format, why=f"{gain:.2f} times as fast as dense; {best.reason}")
