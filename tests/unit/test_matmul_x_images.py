# SPDX-License-Identifier: Apache-2.0
"""Memory for images of x: as much as the device code uses, with which the host shares constants."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_matmul import A100, H100

from flashllm import plan
from flashllm.formats.bitmap import Bitmap
from flashllm.jit.sources import cuda_root
from flashllm.matmul import slot24
from flashllm.matmul.kernel import Split
from flashllm.matmul.stream_k import StreamK
from flashllm.matmul.x_images import with_images
from products import packed, weight

LINE_BYTES = 128


def text(path: str) -> str:
    return (cuda_root() / path).read_text(encoding="utf-8")


def found(pattern: str, path: str) -> int:
    (number,) = re.findall(pattern, text(path))
    return int(number)


def counter_bytes(images: int, group: int, column_blocks: int) -> int:
    """The value of ``XImages::counter_bytes``, evaluated from its source text."""
    (formula,) = re.findall(r"counter_bytes\(int images\) {\n        return (.*?);", text("flashllm/x_images.cuh"))
    groups = -(-images // group)
    names = {"groups": lambda _: groups, "images": images, "column_blocks": column_blocks}
    names["kCounterWords"] = found(r"kCounterWords = (\d+);", "flashllm/x_images.cuh")
    python = formula.replace("gridDim.y", "column_blocks").replace(" / ", " // ")
    return int(eval(python, {"__builtins__": {}}, names))


@pytest.mark.parametrize("column_blocks", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 8])
def test_counters_take_what_the_device_says(group: int, column_blocks: int) -> None:
    for images in (*range(1, 40), 400):
        split = StreamK(tiles_m=3, tiles_k=images, blocks=2, n_block=8, column_blocks=column_blocks)
        wider = with_images(split, images=images, image_bytes=96, group=group)
        assert wider.counter_bytes == counter_bytes(images, group, column_blocks)
        assert wider.counter_bytes % LINE_BYTES == 0
        assert wider.counter_bytes >= 32 * (-(-images // group) * column_blocks + 1)
        assert wider.workspace_bytes == split.workspace_bytes + wider.counter_bytes > wider.counter_bytes
        assert (split.scratch_bytes, wider.scratch_bytes) == (0, column_blocks * images * 96)


def test_splits_without_pieces_have_counters_alone() -> None:
    split = StreamK(tiles_m=4, tiles_k=5, blocks=2, n_block=8)
    assert split.workspace_bytes == 0
    assert with_images(split, images=5, image_bytes=96, group=1).workspace_bytes == 256


def _split(w: Any, n: int, device: Any) -> Split:
    chosen = plan(w, n, device=device)
    assert chosen.scratch_bytes == chosen.split.scratch_bytes
    return chosen.split


@pytest.mark.parametrize(("device", "widest"), [(H100, 64), (A100, 32)], ids=["H100", "A100"])
@pytest.mark.parametrize(("n", "block"), [(1, 8), (16, 16), (17, 32), (40, 64), (70, 64)])
def test_slot24_has_an_image_of_every_window(n: int, block: int, device: Any, widest: int) -> None:
    w = packed("slot24", weight("uniform", (300, 1001), 0.05, "fp16"))
    block = min(block, widest)
    column_bytes = {8: 16, 16: 32, 32: 80, 64: 128}[block]
    windows, blocks = w.tiles[1] // slot24.TILES, -(-n // block)
    split: Any = _split(w, n, device)
    assert split.column_blocks == blocks
    assert split.scratch_bytes == blocks * windows * 256 * column_bytes
    assert split.counter_bytes == counter_bytes(windows, 1, blocks)
    assert found(r"XImages<Window, 1, (\d+), S::kBlockWarps>", "spmm/slot24.cu") == 1
    window = text("flashllm/x_window.cuh")
    assert "kColumnBytes = kSwaps ? 32 : (kUnits | 1) * 16;" in window
    assert "kSwaps = kN == 16 || kN == 64;" in window


def test_wide_blocks_have_larger_images() -> None:
    w = packed("slot24", weight("uniform", (300, 1001), 0.05, "fp16"))
    chosen = plan(w, 100, device=H100)
    windows = w.tiles[1] // slot24.TILES
    assert chosen.scratch_bytes == 2 * windows * 256 * 128
    assert "kBytes = kN == 64 ? 4 * kPlaneBytes : kPlaneBytes;" in text("flashllm/x_window.cuh")


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize(("n", "block"), [(1, 8), (16, 16), (17, 32), (32, 32), (40, 64), (64, 64), (70, 64)])
def test_bitmap_has_an_image_of_every_tile_of_many_columns(n: int, block: int, device: Any) -> None:
    """Where it multiplies with wgmma."""
    least = found(r"kImages = kWarpgroup && kN >= (\d+);", "spmm/bitmap.cu")
    w = Bitmap.from_dense(weight("uniform", (300, 1001), 0.3, "fp16"))
    split: Any = _split(w, n, device)
    assert split.n_block == block
    if block < least or device is A100:
        assert (split.counter_bytes, split.scratch_bytes) == (0, 0)
        return
    blocks = -(-n // block)
    assert split.scratch_bytes == blocks * w.tiles[1] * block * 128
    group = found(r"XImages<Tile, kStages, (\d+)>", "spmm/bitmap.cu")
    assert split.counter_bytes == counter_bytes(w.tiles[1], group, blocks)


def test_other_products_have_none() -> None:
    w = packed("tiled-csl", weight("uniform", (300, 1001), 0.3, "fp16"))
    assert plan(w, 16, device=H100).scratch_bytes == 0
    expanded = plan(Bitmap.from_dense(weight("uniform", (256, 512), 0.3, "fp16")), 4096, device=H100, expand=True)
    assert expanded.expansion is not None
    assert expanded.scratch_bytes == 0
