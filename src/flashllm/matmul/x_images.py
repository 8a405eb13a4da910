# SPDX-License-Identifier: Apache-2.0
"""Host side of ``cuda/flashllm/x_images.cuh``: x laid out once per launch, in scratch memory."""

from __future__ import annotations

from dataclasses import replace

from flashllm.matmul.stream_k import StreamK

_COUNTER_BYTES = 32
_LINE_COUNTERS = 4


def with_images(split: StreamK, *, images: int, image_bytes: int, group: int) -> StreamK:
    """``split`` with room for ``images`` images of x per column block, of ``image_bytes`` each, counted in groups."""
    counters = -(-images // group) * split.column_blocks + 1
    return replace(
        split,
        counter_bytes=-(-counters // _LINE_COUNTERS) * _LINE_COUNTERS * _COUNTER_BYTES,
        scratch_bytes=split.column_blocks * images * image_bytes,
    )
