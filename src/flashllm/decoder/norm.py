# SPDX-License-Identifier: Apache-2.0
"""Sums of the residual stream with the result of a layer, and their norms: host side of cuda/decoder/norm.cu."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flashllm.decoder.arrays import check, check_epsilon, check_optional
from flashllm.decoder.launcher import Launch
from flashllm.decoder.rows import VECTOR
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES
from flashllm.formats.bits import check_dtype
from flashllm.jit.spec import KernelSpec
from flashllm.matmul.tensor_cores import CXX_TYPE

KINDS = ("rms", "layer")
"""RMSNorm: mean square 1. LayerNorm: mean 0, then variance 1."""
_BLOCKS = ((128, 1), (512, 1), (512, 2), (512, 4))  # threads, vectors per thread; for rows of up to 8 x their product
_ANY_THREADS = 512


def add_norm(
    launch: Launch,
    *,
    dtype: str,
    kind: str,
    residual: Any,
    x: Any,
    weight: Any,
    eps: float,
    bias: Any = None,
    y: Any = None,
    y_bias: Any = None,
) -> None:
    """residual [R, hidden] (fp32) += y + y_bias, where given; x = norm(residual) * weight + bias, rounded once.

    ``y`` [parts, R or more, hidden] stands for the sum of the first R rows of each part, which are added in fp32 in
    their order. ``kind`` is one of :data:`KINDS`; ``x`` is [R, hidden], ``weight``, ``bias`` and ``y_bias`` are
    [hidden], all of ``dtype``; ``x`` may lie in a part of ``y``; ``eps`` is added to the mean square or variance. Rows
    of more than 16384 elements, or whose length is not a multiple of 8, are read from memory several times. Raises
    ``ArgumentError``.
    """
    if kind not in KINDS:
        raise ArgumentError("kind", expected=" or ".join(repr(one) for one in KINDS), got=repr(kind))
    rows, hidden = check("residual", residual, ("rows", "hidden"), "fp32")
    check("x", x, (rows, hidden), dtype)
    check("weight", weight, (hidden,), dtype)
    if y is None and y_bias is not None:
        raise ArgumentError("y_bias", expected="None without y", got="an array")
    parts, part_rows, _ = (0, rows, 0) if y is None else check("y", y, ("parts", "rows", hidden), dtype)
    if part_rows < rows:
        raise ArgumentError("y", expected=f"{rows} rows or more of each part", got=str(part_rows))
    args = (
        residual,
        np.uint64(0) if y is None else y,
        np.int32(parts),
        np.int64(part_rows * hidden),
        check_optional("y_bias", y_bias, (hidden,), dtype),
        weight,
        check_optional("bias", bias, (hidden,), dtype),
        np.int32(hidden),
        check_epsilon(eps),
        x,
    )
    launch(_spec_for(dtype, kind, hidden), (rows,), args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    instances = [(dtype, kind) for dtype in DTYPES for kind in KINDS]
    held = [_spec(dtype, kind, threads, vectors) for dtype, kind in instances for threads, vectors in _BLOCKS]
    return [*held, *(_spec_any(dtype, kind) for dtype, kind in instances)]


def _spec_for(dtype: str, kind: str, hidden: int) -> KernelSpec:
    if hidden % VECTOR == 0:
        for threads, vectors in _BLOCKS:
            if hidden <= threads * vectors * VECTOR:
                return _spec(dtype, kind, threads, vectors)
    return _spec_any(dtype, kind)


@cache
def _spec(dtype: str, kind: str, threads: int, vectors: int) -> KernelSpec:
    template = (*_types(dtype, kind), ("kThreads", str(threads)), ("kVectors", str(vectors)))
    return KernelSpec(
        name="add_norm",
        source="decoder/norm.cu",
        function="flashllm::add_norm",
        template=template,
        threads=threads,
    )


@cache
def _spec_any(dtype: str, kind: str) -> KernelSpec:
    return KernelSpec(
        name="add_norm_any",
        source="decoder/norm.cu",
        function="flashllm::add_norm_any",
        template=(*_types(dtype, kind), ("kThreads", str(_ANY_THREADS))),
        threads=_ANY_THREADS,
    )


def _types(dtype: str, kind: str) -> tuple[tuple[str, str], ...]:
    return ("T", CXX_TYPE[check_dtype(dtype)]), ("kLayer", "true" if kind == "layer" else "false")
