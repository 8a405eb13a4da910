# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: columns of x per block, tensor-core steps, C++ names of the value types."""

from __future__ import annotations

from collections.abc import Sequence

K_STEP = 16
"""Columns of one tensor-core step."""
MAX_CHAIN_STEPS = 384
"""Most tensor-core accumulations in a row; bounds the sum of their truncation errors."""
N_BLOCKS = (8, 16, 32, 64)
"""Columns of x one block computes; wider x takes several blocks of the last."""
MAX_BLOCKS_PER_SM = 64
"""Choices from a file that launch more blocks per SM than this are refused."""
CXX_TYPE = {"fp16": "__half", "bf16": "__nv_bfloat16"}
"""Value types by dtype."""


def n_block_for(n: int, widths: Sequence[int] = N_BLOCKS) -> int:
    """The narrowest column block of the ascending ``widths`` that holds ``n`` columns, or the widest if none does."""
    return next((width for width in widths if width >= n), widths[-1])


def cxx_bool(value: bool) -> str:
    """``"true"`` or ``"false"``."""
    return "true" if value else "false"
