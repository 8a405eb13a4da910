# SPDX-License-Identifier: Apache-2.0
"""The product kernels on the CPU: exact on integers, within the bound on random values, for every instance."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import plan, registry
from flashllm.backends import emulator
from flashllm.bench.check import error_over_bound, make_reference
from flashllm.formats.tiles import TILE_K, TILE_M
from products import (
    NUMPY_DTYPE,
    arch_of,
    assert_exact,
    assert_special,
    choice_of,
    exact,
    format_of,
    integers,
    layout_of,
    packed,
    packed_as,
    packed_weight,
    special,
    weight,
)

pytestmark = pytest.mark.usefixtures("kernels")
SPECS = tuple(dict.fromkeys(spec for name in registry.FORMATS for spec in registry.kernel(name).specs()))
every_format = pytest.mark.parametrize("name", registry.FORMATS)
ODD_SHAPES = ((1, 1), (7, 9), (127, 65), (128, 64), (129, 63), (130, 520), (300, 457))
# Nearly empty, usual, uneven, more than the registers of the Tiled-CSL kernel hold, whole tiles empty or nearly full.
MASKS = (("uniform", 0.02), ("uniform", 0.15), ("skewed", 0.3), ("full", 1.0), ("empty-tiles", 0.9), ("empty", 0.0))


@cache
def operands(
    name: str, layout: tuple[tuple[str, int], ...], mask: int, shape: tuple[int, int], dtype: str
) -> tuple[NDArray[Any], Any]:
    """Operands for all instances of a layout."""
    pattern, density = MASKS[mask]
    return packed_as(name, dict(layout), weight(pattern, shape, density, dtype))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{arch_of(spec)}-{spec.label}")
def test_exact_for_every_instance(spec: Any) -> None:
    choice, name, layout = choice_of(spec), format_of(spec), tuple(layout_of(spec).items())
    shape = (200, 456) if choice.aligned else (200, 455)
    for seed in range(len(MASKS)):
        w, sparse = operands(name, layout, seed, shape, choice.dtype)
        x = integers(np.random.default_rng(3), (choice.n_block - seed % 3, shape[1]), choice.dtype)
        got, counts = emulator.spmm(x, sparse, choice=choice, arch=arch_of(spec), seed=seed)
        assert_exact(got, exact(x, w, choice.dtype))
        tiles_m, tiles_k = sparse.tiles
        assert counts.multiply_adds == tiles_m * TILE_M * tiles_k * TILE_K * choice.n_block  # zeros and all


@every_format
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_exact_for_odd_shapes(shape: tuple[int, int], arch: str, name: str) -> None:
    rng = np.random.default_rng(1)
    w, sparse = packed_weight(name, "uniform", shape, 0.25)
    for seed, n in enumerate((1, 9, 16, 33, 65)):
        x = integers(rng, (n, shape[1]), "fp16")
        got, _ = emulator.spmm(x, sparse, arch=arch, seed=seed)
        assert_exact(got, exact(x, w, "fp16"))


@every_format
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 12])
def test_exact_for_every_split(blocks: int, arch: str, name: str) -> None:
    """Rows of tiles that many blocks share, that two share, and blocks that span many rows."""
    rng = np.random.default_rng(4)
    for seed, (shape, n) in enumerate((((128, 64 * 13), 9), ((128 * 12, 64), 33), ((128 * 4, 64 * 5), 17))):
        w, sparse = packed_weight(name, "uniform", shape, 0.1, "bf16")
        x = integers(rng, (n, shape[1]), "bf16")
        split: Any = plan(sparse, n, device=emulator.emulated_device(arch)).split
        given = min(blocks, split.tiles)  # slot24 has fewer than the others
        got, counts = emulator.spmm(x, sparse, arch=arch, seed=seed, blocks=given)
        assert counts.blocks == given * split.column_blocks
        assert_exact(got, exact(x, w, "bf16"))


@every_format
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("blocks", "row_cost"), [(2, 1), (3, 4), (5, 2), (7, 3)])
def test_exact_where_ends_of_rows_are_weighed(blocks: int, row_cost: int, arch: str, name: str) -> None:
    rng = np.random.default_rng(14)
    w, sparse = packed_weight(name, "uniform", (128 * 3, 64 * 27), 0.1)
    for seed, n in enumerate((8, 17, 64)):
        x = integers(rng, (n, 64 * 27), "fp16")
        got, _ = emulator.spmm(x, sparse, arch=arch, seed=seed, blocks=blocks, row_cost=row_cost)
        assert_exact(got, exact(x, w, "fp16"))


@every_format
@pytest.mark.parametrize(("n", "arch"), [(9, "80"), (33, "90a")])
def test_exact_for_several_chains(n: int, arch: str, name: str) -> None:
    """Rows so long that a block ends a chain of accumulations inside them, alone or with others."""
    rng = np.random.default_rng(12)
    shape = (256, 64 * 420)
    w, sparse = packed_weight(name, "uniform", shape, 0.01)
    x = integers(rng, (n, shape[1]), "fp16")
    for blocks in (1, 3):
        got, _ = emulator.spmm(x, sparse, arch=arch, blocks=blocks, seed=blocks)
        assert_exact(got, exact(x, w, "fp16"))


@every_format
@pytest.mark.parametrize("seed", range(24))
def test_exact_for_random_schedules(seed: int, name: str) -> None:
    """Blocks, warps and lanes in another order each time, and copies that end early or late."""
    rng = np.random.default_rng(seed)
    # Four weights for all seeds: only the schedules have to differ.
    (w, sparse), (full_w, full) = (
        packed_weight(name, "skewed", (384, 330), 0.3, seed=seed % 4),
        packed_weight(name, "full", (200, 328), 1.0, seed=seed % 4),
    )
    for arch, n, blocks in (("80", 12, 5), ("90a", 12, 7), ("90a", 40, 3)):
        x = integers(rng, (n, 330), "fp16")
        got, _ = emulator.spmm(x, sparse, arch=arch, seed=1000 + seed, blocks=blocks)
        assert_exact(got, exact(x, w, "fp16"))
        x = integers(rng, (n, 328), "fp16")
        got, _ = emulator.spmm(x, full, arch=arch, seed=2000 + seed)
        assert_exact(got, exact(x, full_w, "fp16"))


@every_format
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_random_values_stay_within_the_bound(arch: str, n: int, dtype: str, name: str) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((256, 2048)).astype(NUMPY_DTYPE[dtype])
    w[rng.random(w.shape) >= 0.2] = 0
    x = rng.standard_normal((n, 2048)).astype(NUMPY_DTYPE[dtype])
    got, _ = emulator.spmm(x, packed(name, w), arch=arch, seed=n)
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(256), dtype)
    assert error_over_bound(got.astype(np.float64), reference) <= 1.0


@every_format
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nan_and_infinity_multiply_as_in_dense_arithmetic(arch: str, name: str) -> None:
    """Except for zeros of W that the format leaves out: see ``SparseWeight.MULTIPLIES_ZEROS``."""
    w, x = special(weight("uniform", (256, 328), 0.25, "fp16"), 40)
    sparse = packed(name, w)
    for n in (8, 40):
        got, _ = emulator.spmm(x[:n], sparse, arch=arch)
        assert_special(name, got, x[:n], w)


@every_format
def test_overflow_rounds_to_infinity(name: str) -> None:
    w = np.full((128, 64), 60000, np.float16)
    got, _ = emulator.spmm(np.ones((1, 64), np.float16), packed(name, w))
    assert np.isposinf(got).all()


@every_format
def test_repeats_give_the_same_bits(name: str) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((300, 1024)).astype(np.float16)
    w[rng.random(w.shape) >= 0.3] = 0
    x = rng.standard_normal((40, 1024)).astype(np.float16)
    sparse = packed(name, w)
    results = [emulator.spmm(x, sparse, seed=seed)[0].tobytes() for seed in range(6)]
    assert len(set(results)) == 1
