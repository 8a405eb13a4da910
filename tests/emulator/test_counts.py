# SPDX-License-Identifier: Apache-2.0
"""What the emulator counts: exact numbers where the kernel's work is known, and bank conflicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashllm import TiledCSL
from flashllm.backends import emulator
from flashllm.matmul import tiled_csl
from flashllm.registry import FORMATS, kernel
from products import integers, packed, weight

SHAPE = (256, 512)


def counts(order: str = "bank", *, arch: str = "80", n: int = 16, **change: object) -> emulator.Counts:
    w = TiledCSL.from_dense(weight("uniform", SHAPE, 0.2, "fp16"), order=order)
    choice = replace(tiled_csl.default_choice(w, n, arch=arch), **change)
    x = integers(np.random.default_rng(0), (n, SHAPE[1]), "fp16")
    return emulator.spmm(x, w, choice=choice, arch=arch, blocks=4)[1]


@pytest.mark.parametrize("undo", [True, False])
def test_bank_order_scatters_with_fewer_conflicts_than_row_order(undo: bool) -> None:
    bank, row = counts("bank", undo=undo), counts("row", undo=undo)
    assert bank.scatter.requests == row.scatter.requests
    assert bank.scatter.conflicts * 4 < row.scatter.conflicts
    # Random places conflict about 3.5 deep in a bank; ours hardly ever conflict.
    assert row.scatter.wavefronts > 1.5 * row.scatter.requests
    assert bank.scatter.wavefronts < 1.35 * bank.scatter.requests


def test_undo_scatters_twice_and_clears_little() -> None:
    undo, clear = counts(undo=True), counts(undo=False)
    assert undo.scatter.requests > 1.5 * clear.scatter.requests
    assert clear.store16.requests > 2 * undo.store16.requests


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_swizzled_images_are_read_without_conflicts(arch: str) -> None:
    seen = counts(arch=arch, n=16)
    assert seen.ldmatrix.requests > 0
    assert seen.ldmatrix.conflicts == 0
    assert seen.store16.conflicts == 0


def test_tensor_core_work_and_bytes() -> None:
    w = TiledCSL.from_dense(weight("uniform", SHAPE, 0.2, "fp16"))
    tiles = w.tiles[0] * w.tiles[1]
    seen = counts(n=16)
    assert seen.mma == {"m16n8k16": tiles * 8 * 4 * 2}
    assert seen.blocks == 4
    # Each block copies the stages of its tiles, plus what it prefetches.
    assert tiles * 16 * 64 * 2 <= seen.copy_async_bytes <= (tiles + 4) * 16 * 64 * 2
    assert seen.copy_async_zeros == 0
    assert seen.global_read_bytes >= w.words.nbytes
    wide = counts(arch="90a", n=64)
    assert wide.mma == {"m64n64k16": tiles * 2 * 4}
    assert wide.prefetch_bytes > 0
    assert counts(n=13).copy_async_zeros >= tiles * 3 * 64 * 2


def test_counts_do_not_depend_on_the_schedule() -> None:
    w = TiledCSL.from_dense(weight("skewed", SHAPE, 0.2, "fp16"))
    x = integers(np.random.default_rng(0), (16, SHAPE[1]), "fp16")
    seen = [emulator.spmm(x, w, arch="80", seed=seed)[1] for seed in range(4)]
    assert len({(c.barriers, tuple(c.mma.items()), c.global_read_bytes, c.scatter, c.store16) for c in seen}) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_rows_longer_than_a_chain_pass_through_the_workspace(name: str) -> None:
    """Tensor cores truncate, which exact values do not show; here it reveals how long a chain is."""
    module, n, k = kernel(name), 8, 1024
    small = packed(name, weight("uniform", (128, k), 0.01, "fp16"))
    longest = module.split_for(small, n, module.default_choice(small, n, arch="80"), sm_count=1).max_chain
    for chains in (1, 2, 3):
        w = packed(name, weight("uniform", (128, chains * longest * k // small.tiles[1]), 0.01, "fp16"))
        x = integers(np.random.default_rng(0), (n, w.shape[1]), "fp16")
        written = emulator.spmm(x, w, arch="80", blocks=1)[1].global_write_bytes
        assert written == 2 * (chains - 1) * n * 128 * 4, "put aside and, once taken back, overwritten with zeros"
