# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoding step on tensor cores, for heads that share keys: cuda/decoder/grouped_attention.cu.

:func:`flashllm.decoder.attention.attention` launches it where a group has enough heads.
"""

from __future__ import annotations

from flashllm.jit.spec import KernelSpec
from flashllm.matmul.tensor_cores import CXX_TYPE

MIN_GROUP = 3
"""The fewest query heads sharing a head of keys for which fp32 cannot keep up with the reading."""
MAX_BLOCK_HEADS = 16
"""The most query heads of a group that a block can have."""
_THREADS = 128
_WARPS = 4
_TILE = 16  # positions that a warp takes at a time
_BLOCK_HEADS = (8, MAX_BLOCK_HEADS)
_DIMS = (64, 80, 96, 128, 256)  # elements of a head for which there are kernels; others are padded with zeros


def spec(dtype: str, *, head_dim: int, block_heads: int) -> KernelSpec:
    """The kernel for heads of ``head_dim`` elements, up to 256, and blocks of ``block_heads`` heads, up to 16."""
    dim = next(dim for dim in _DIMS if dim >= head_dim)
    return _spec(dtype, dim, next(heads for heads in _BLOCK_HEADS if heads >= block_heads))


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [_spec(dtype, dim, heads) for dtype in CXX_TYPE for dim in _DIMS for heads in _BLOCK_HEADS]


def _spec(dtype: str, dim: int, heads: int) -> KernelSpec:
    pitch = 2 * dim + 16
    stages = 1 if dim > 128 else 2
    return KernelSpec(
        name="grouped_attention",
        source="decoder/grouped_attention.cu",
        function="flashllm::grouped_attention",
        template=(("T", CXX_TYPE[dtype]), ("kDim", str(dim)), ("kGroup", str(heads))),
        threads=_THREADS,
        shared_bytes=_WARPS * (stages * 2 * _TILE * pitch + 8 * heads) + heads * pitch,
    )
