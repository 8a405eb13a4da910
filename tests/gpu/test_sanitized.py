# SPDX-License-Identifier: Apache-2.0
"""Small cases of every kernel for ``make sanitize``: the same dozen shapes for all, and exact results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashllm import TiledCSL, plan, registry, spmm
from flashllm.backends import cuda
from flashllm.bench import bandwidth, data
from flashllm.encode.tiled_csl import decode
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.slot24 import Slot24
from products import assert_exact, exact, integers, packed, weight
from weight_cases import matrix, pruned

pytestmark = pytest.mark.sanitize

# M x K: less than a tile, one tile, ragged edges (K a multiple of 8 and not), many tiles in a row, many rows of tiles.
SHAPES = (
    (1, 1),
    (7, 72),
    (128, 64),
    (129, 65),
    (127, 640),
    (200, 456),
    (384, 203),
    (256, 1024),
    (130, 2056),
    (1000, 136),
    (1153, 64),
    (520, 776),
)


def forced(chosen: Any, blocks: int, row_cost: int) -> Any:
    """The plan with ``blocks`` blocks, or as many as there is work for."""
    split = replace(chosen.split, blocks=1, row_cost=row_cost)
    most = min(split.tiles, split.cost // (row_cost + 1))
    return replace(chosen, split=replace(split, blocks=min(blocks, most)))


@pytest.mark.parametrize("name", registry.FORMATS)
@pytest.mark.parametrize("n", [5, 16, 32, 65])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(cp: Any, shape: tuple[int, int], n: int, name: str) -> None:
    """At a density that fits the registers of the Tiled-CSL kernel, and at one that exceeds them."""
    x = integers(np.random.default_rng(n), (n, shape[1]), "fp16")
    for density in (0.15, 0.6):
        w = weight("uniform", shape, density, "fp16", seed=n)
        sparse = packed(name, w).to_device()
        assert_exact(spmm(cp.asarray(x), sparse).get(), exact(x, w, "fp16"))


@pytest.mark.parametrize("name", registry.FORMATS)
@pytest.mark.parametrize(("blocks", "row_cost"), [(2, 0), (7, 2), (11, 0)])
def test_products_of_forced_splits(cp: Any, blocks: int, row_cost: int, name: str) -> None:
    """Rows of tiles shared by two blocks and by many, and rows that a block completes within its run."""
    for n in (8, 16, 64):
        w = weight("uniform", (640, 500), 0.2, "fp16", seed=n)
        x = integers(np.random.default_rng(n), (n, 500), "fp16")
        sparse = packed(name, w).to_device()
        chosen = forced(plan(sparse, n), blocks, row_cost)
        assert_exact(spmm(cp.asarray(x), sparse, plan=chosen).get(), exact(x, w, "fp16"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoder_and_decoder(cp: Any, shape: tuple[int, int]) -> None:
    for order in ("bank", "row"):
        a = matrix("uniform", *shape, 0.3, 1, "fp16")
        sparse = TiledCSL.from_dense(cp.asarray(a), order=order)
        np.testing.assert_array_equal(sparse.words.get(), TiledCSL.from_dense(a, order=order).words)
        np.testing.assert_array_equal(decode(sparse).get().view(np.uint16), pruned(a))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitmap_encoder_and_decoder(cp: Any, shape: tuple[int, int]) -> None:
    for density in (0.05, 0.6):
        a = matrix("skewed", *shape, density, 1, "fp16")
        sparse, want = Bitmap.from_dense(cp.asarray(a)), Bitmap.from_dense(a)
        for name, array in want.arrays().items():
            np.testing.assert_array_equal(getattr(sparse, name).get(), array)
        np.testing.assert_array_equal(sparse.to_dense().get().view(np.uint16), pruned(a))


@pytest.mark.parametrize("part_rows", [32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slot24_encoder_and_decoder(cp: Any, shape: tuple[int, int], part_rows: int) -> None:
    """Also where windows are tried that are too large, and where pairs must change."""
    for density in (0.05, 0.22, 0.3):
        a = matrix("uniform", *shape, density, 1, "fp16")
        sparse, want = (Slot24.from_dense(side, part_rows=part_rows) for side in (cp.asarray(a), a))
        for name, array in want.arrays().items():
            np.testing.assert_array_equal(getattr(sparse, name).get(), array)
        np.testing.assert_array_equal(sparse.to_dense().get().view(np.uint16), pruned(a))


@pytest.mark.parametrize("n", [8, 40])
def test_products_while_the_ring_of_values_turns(cp: Any, n: int) -> None:
    """Long runs at densities that keep the ring of the bitmap kernel full; runs that start between stored places."""
    for pattern, shape, blocks in (("full", (128, 2560), 1), ("skewed", (256, 1536), 7), ("column", (130, 1216), 19)):
        w = weight(pattern, shape, 0.5, "fp16", seed=n)
        x = integers(np.random.default_rng(n), (n, shape[1]), "fp16")
        sparse = Bitmap.from_dense(w).to_device()
        chosen = forced(plan(sparse, n), blocks, 0)
        assert_exact(spmm(cp.asarray(x), sparse, plan=chosen).get(), exact(x, w, "fp16"))


@pytest.mark.parametrize("n", [8, 16, 40])
def test_products_while_windows_of_x_turn(cp: Any, n: int) -> None:
    """Runs of many windows, of one tile, and over several rows of tiles; K a multiple of 8 and not."""
    cases = (((128, 3072), 0.15, 1), ((256, 1024), 0.1, 16), ((600, 520), 0.2, 3), ((300, 1021), 0.3, 5))
    for shape, density, blocks in cases:
        w = weight("uniform", shape, density, "fp16", seed=n)
        x = integers(np.random.default_rng(n), (n, shape[1]), "fp16")
        sparse = Slot24.from_dense(w).to_device()
        chosen = forced(plan(sparse, n), blocks, 0)
        assert_exact(spmm(cp.asarray(x), sparse, plan=chosen).get(), exact(x, w, "fp16"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_weights(cp: Any, shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {"density": 0.3, "pattern": "uniform", "seed": 5, "std": 0.02, "dtype": "fp16"}
    host = data.random_matrix(*shape, **options)
    assert (data.random_matrix(*shape, **options, device=True).view(cp.uint16).get() == host.view(np.uint16)).all()


@pytest.mark.parametrize("vectors", [1, 31, 32, 33, 511, 512, 513, 4095, 4096, 4097, 65536, 100_003])
def test_read_bandwidth(cp: Any, vectors: int) -> None:
    words = cp.arange(vectors * 4, dtype=cp.uint32) * cp.uint32(2654435761)
    checksum = cp.zeros(1, cp.uint32)
    cuda.launch(bandwidth.spec(), (8,), (words, np.int64(vectors), checksum))
    assert int(checksum[0]) == int(np.bitwise_xor.reduce(words.get()))
