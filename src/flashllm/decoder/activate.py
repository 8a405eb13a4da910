# SPDX-License-Identifier: Apache-2.0
"""Activations of the feed-forward layer: host side of cuda/decoder/activate.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.decoder.arrays import check, check_optional
from flashllm.decoder.launcher import Launch
from flashllm.decoder.rows import VECTOR, row_grid, row_spec, width_of
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES
from flashllm.jit.spec import KernelSpec


def relu(launch: Launch, *, dtype: str, y: Any, x: Any, bias: Any = None) -> None:
    """x [R, M] = max(y [R, M] + bias [M], 0), of ``dtype``; ``x`` may be ``y``. NaN stays. Raises ``ArgumentError``."""
    rows, columns = check("y", y, ("rows", "columns"), dtype)
    shift = check_optional("bias", bias, (columns,), dtype)
    check("x", x, (rows, columns), dtype)
    width = width_of(columns)
    launch(row_spec("relu", "activate", dtype, width), row_grid(rows, columns, width), (y, shift, np.int32(columns), x))


def silu_mul(launch: Launch, *, dtype: str, y: Any, x: Any, bias: Any = None) -> None:
    """x [R, F] = silu(gate) * up, where y [R, 2F] + bias [2F] is gate, then up; all of ``dtype``.

    silu(v) is v / (1 + exp(-v)). Raises ``ArgumentError``.
    """
    rows, both = check("y", y, ("rows", "2 x columns"), dtype)
    if both % 2:
        raise ArgumentError("y", expected="an even number of columns, gate and up", got=str(both))
    shift = check_optional("bias", bias, (both,), dtype)
    columns = both // 2
    check("x", x, (rows, columns), dtype)
    width = width_of(columns)
    args = (y, shift, np.int32(columns), x)
    launch(row_spec("silu_mul", "activate", dtype, width), row_grid(rows, columns, width), args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [
        row_spec(name, "activate", dtype, width)
        for name in ("relu", "silu_mul")
        for dtype in DTYPES
        for width in (VECTOR, 1)
    ]
