# SPDX-License-Identifier: Apache-2.0
"""Embeddings of tokens and positions: host side of cuda/decoder/embed.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.decoder.arrays import check, check_optional
from flashllm.decoder.launcher import Launch
from flashllm.decoder.rows import VECTOR, row_grid, row_spec, width_of
from flashllm.formats.base import DTYPES
from flashllm.jit.spec import KernelSpec


def embed(
    launch: Launch,
    *,
    dtype: str,
    tokens: Any,
    positions: Any,
    table: Any,
    residual: Any,
    position_table: Any = None,
    position_offset: int = 0,
) -> None:
    """residual [R, hidden] (fp32) = table[token] + position_table[position + position_offset], the latter if given.

    ``tokens`` and ``positions`` are int32 [R], ``table`` [vocab, hidden] and ``position_table`` [positions, hidden] of
    ``dtype``. A row whose token or position has no row in a table becomes NaN. Raises ``ArgumentError``.
    """
    (rows,) = check("tokens", tokens, ("rows",), "int32")
    check("positions", positions, (rows,), "int32")
    vocab, hidden = check("table", table, ("vocab", "hidden"), dtype)
    learned = check_optional("position_table", position_table, ("positions", hidden), dtype)
    check("residual", residual, (rows, hidden), "fp32")
    width = width_of(hidden)
    sizes = (vocab, 0 if position_table is None else position_table.shape[0], position_offset, hidden)
    args = (tokens, positions, table, learned, *(np.int32(size) for size in sizes), residual)
    launch(row_spec("embed", "embed", dtype, width), row_grid(rows, hidden, width), args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [row_spec("embed", "embed", dtype, width) for dtype in DTYPES for width in (VECTOR, 1)]
