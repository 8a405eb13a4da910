# SPDX-License-Identifier: Apache-2.0
"""Kernels whose threads need none of one another's columns: host side of cuda/flashllm/rows.cuh."""

from __future__ import annotations

from functools import cache

from flashllm.formats.bits import check_dtype
from flashllm.jit.spec import KernelSpec
from flashllm.matmul.tensor_cores import CXX_TYPE

VECTOR = 8
"""Elements of 16 bits that a thread loads or stores at once."""
THREADS = 128
"""Threads of a block."""


def width_of(columns: int) -> int:
    """Columns per thread: a vector, or one column where rows may start at any address."""
    return VECTOR if columns % VECTOR == 0 else 1


@cache
def row_spec(name: str, source: str, dtype: str, width: int) -> KernelSpec:
    """The instance of the kernel ``flashllm::NAME`` whose threads have ``width`` columns."""
    return KernelSpec(
        name=name,
        source=f"decoder/{source}.cu",
        function=f"flashllm::{name}",
        template=(("T", CXX_TYPE[check_dtype(dtype)]), ("kWidth", str(width))),
        threads=THREADS,
    )


def row_grid(rows: int, columns: int, width: int) -> tuple[int, int]:
    """Blocks for ``rows`` rows of ``columns`` columns, of which a thread has ``width``."""
    return rows, -(-columns // (THREADS * width))
