# SPDX-License-Identifier: Apache-2.0
"""Products of TCA-BME weights on the CPU: exact on integers for every instance, split and odd shape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.backends.emulator_counts import Counts
from flashllm.baselines import tca_bme
from flashllm.baselines.tca_bme import CAPACITIES, SPLITS, Choice, TcaBme
from flashllm.bench.check import BASELINE_LIMIT, error_over_bound, make_reference
from flashllm.io.files import locked
from flashllm.matmul.tensor_cores import N_BLOCKS
from products import assert_exact, exact, integers, special, weight
from weight_cases import PATTERNS

ARCHS = ("80", "90a")
SHAPES = ((1, 1), (7, 72), (64, 64), (129, 65), (200, 456), (384, 203), (130, 640))
COLUMNS = (1, 5, 8, 16, 17, 32, 40, 64, 70)
GUARD = 256  # elements, a multiple of 8
NAN = 0x7FDA


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """All instances, built together; another worker that needs them takes them from the cache."""
    with (Path(os.environ["FLASHLLM_TESTS_SCRATCH"]) / "tca_bme.lock").open("w") as lock, locked(lock.fileno()):
        for arch in ARCHS:
            emulator.preload(tca_bme.specs(), build=emulator.BuildOptions(arch=arch))


class Fenced:
    """A copy of an array, with NaNs before and after it, at an address that is a multiple of 16."""

    def __init__(self, inner: NDArray[Any]) -> None:
        room = np.full(inner.nbytes // 2 + 2 * GUARD + 8, NAN, np.uint16)
        start = GUARD + -room.ctypes.data % 16 // 2
        self._before, self._after = room[:start], room[start + inner.nbytes // 2 :]
        self.inner = room[start : start + inner.nbytes // 2].view(inner.dtype).reshape(inner.shape)
        self.inner[...] = inner

    def check(self) -> None:
        assert (self._before == NAN).all(), "written before the array"
        assert (self._after == NAN).all(), "written behind the array"


def multiply(
    w: TcaBme, x: NDArray[Any], choice: Choice, *, arch: str = "90a", seed: int = 0
) -> tuple[NDArray[Any], Sequence[Counts]]:
    """x[N, K] @ W^T and the counts of the launches; y and the workspace are filled with NaN beforehand."""
    n = len(x)
    inputs = Fenced(x)
    outputs = Fenced(np.full((n, w.shape[0]), NAN, np.uint16).view(np.float16))
    workspace = Fenced(np.full(w.workspace_bytes(n, choice), 0xFF, np.uint8))
    inputs.inner.flags.writeable = False
    counts = [
        emulator.launch(step.spec, step.grid, step.args, arch=arch, seed=seed)
        for step in w.steps(inputs.inner, outputs.inner, workspace.inner, choice)
    ]
    for fenced in (inputs, outputs, workspace):
        fenced.check()
    assert (inputs.inner.view(np.uint16) == x.view(np.uint16)).all()
    return outputs.inner, counts


def check(w: NDArray[Any], n: int, choice: Choice | int, *, arch: str, seed: int) -> None:
    """The product with n columns of integers is exact, for ``choice`` or the choice of that number."""
    x = integers(np.random.default_rng(n + seed), (n, w.shape[1]), "fp16")
    encoded = TcaBme.from_dense(w)
    if isinstance(choice, int):
        choices = encoded.choices(n, sm_count=4)
        choice = choices[choice % len(choices)]
    got, _ = multiply(encoded, x, choice, arch=arch, seed=seed)
    assert_exact(got, exact(x, w, "fp16"))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("width", N_BLOCKS)
def test_exact_for_every_instance_and_split(width: int, capacity: int) -> None:
    masks = (("uniform", 0.3), ("uniform", 0.5), ("skewed", 0.4), ("empty", 0.0))
    if capacity == CAPACITIES[-1]:
        masks = (("uniform", 0.6), ("full", 1.0), ("skewed", 0.9), ("empty-tiles", 0.95))
    for seed, (pattern, density) in enumerate(masks):
        w = weight(pattern, (100, 712), density, "fp16", seed)
        n = width - seed % 3
        choices = TcaBme.from_dense(w).choices(n, sm_count=4)
        assert [choice.split for choice in choices] == list(SPLITS)
        for choice in choices:
            assert (choice.n_block, choice.capacity) == (width, capacity)
            check(w, n, choice, arch=ARCHS[seed % 2], seed=seed)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_for_odd_shapes(shape: tuple[int, int], arch: str) -> None:
    for seed, n in enumerate(COLUMNS):
        check(weight("uniform", shape, 0.45, "fp16", seed), n, seed, arch=arch, seed=seed)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_for_every_pattern(pattern: str, arch: str) -> None:
    for seed, density in enumerate((0.02, 0.3, 0.7, 1.0)):
        w = weight(pattern, (200, 456), density, "fp16", seed)
        check(w, COLUMNS[seed * 2 + 1], seed, arch=arch, seed=seed)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1024, 2304, 2305, 4088, 4089, 4096])
def test_exact_around_the_room_for_values(count: int) -> None:
    """Numbers of values around what there is room for, up to full tiles, next to empty tiles and to each other."""
    rng = np.random.default_rng(count)
    w = np.zeros((64, 64 * 5), np.float16)
    for tile in (0, 2, 3):
        part = np.zeros(64 * 64, np.float16)
        part[rng.permutation(64 * 64)[:count]] = integers(rng, (1, count), "fp16")[0]
        w[:, tile * 64 : tile * 64 + 64] = part.reshape(64, 64)
    for seed, n in enumerate((3, 33)):
        for number in (0, 1, 4):
            check(w, n, number, arch=ARCHS[seed], seed=seed)


@pytest.mark.parametrize("seed", range(12))
def test_exact_for_random_schedules(seed: int) -> None:
    """Blocks, warps and lanes in another order each time, and copies that end early or late."""
    for arch, n in (("80", 12), ("90a", 6), ("90a", 40)):
        w = weight("skewed" if seed % 2 else "empty-tiles", (150, 330), 0.8, "fp16", seed)
        check(w, n, seed, arch=arch, seed=1000 + seed)


def test_every_byte_is_read_once() -> None:
    """W once by each block of columns, x once by each row of tiles; no access has bank conflicts."""
    shape, n = (200, 456), 70
    w = TcaBme.from_dense(weight("uniform", shape, 0.4, "fp16"))
    x = integers(np.random.default_rng(0), (n, shape[1]), "fp16")
    for choice in w.choices(n, sm_count=4):
        _, counts = multiply(w, x, choice)
        product = counts[0]
        assert product.blocks == 2 * 4 * choice.split
        assert product.copy_async_bytes == 2 * (w.values.nbytes + w.bitmaps.nbytes) + 4 * x.nbytes
        assert product.multiply_adds == 2 * 64 * 4 * 64 * 8 * 64  # zeros and all
        assert product.ldmatrix.conflicts == 0
        # Offsets: three for each block and thread, two for every further tile; the first loads are for two tiles.
        offsets = product.global_read_bytes - product.copy_async_bytes
        assert offsets == 128 * 4 * (5 * product.blocks + 2 * (2 * 4 * 8 - product.blocks))
        assert len(counts) == (1 if choice.split == 1 else 2)
        if choice.split > 1:
            assert counts[1].global_read_bytes == choice.split * n * 256 * 4


def test_zeros_multiply_as_in_dense_arithmetic() -> None:
    w, x = special(weight("uniform", (256, 328), 0.25, "fp16"), 40)
    for n in (8, 40):
        for choice in TcaBme.from_dense(w).choices(n, sm_count=4)[:2]:
            got, _ = multiply(TcaBme.from_dense(w), x[:n], choice)
            with np.errstate(invalid="ignore", over="ignore"):
                want = (x[:n].astype(np.float64) @ w.astype(np.float64).T).astype(np.float16)
            assert ((got == want) | (np.isnan(got) & np.isnan(want))).all()
            assert np.isnan(got).any()


def test_sums_of_splits_keep_their_range_and_precision() -> None:
    """Large parts that cancel and would be infinite in fp16, and a small one that fp16 would lose beside them."""
    w = np.zeros((3, 64 * 4), np.float16)
    w[:, 0], w[:, 64], w[:, 128] = 60000, -60000, 3
    x = np.full((2, 64 * 4), 2, np.float16)
    encoded = TcaBme.from_dense(w)
    for choice in encoded.choices(2, sm_count=4):
        got, _ = multiply(encoded, x, choice)
        assert (got == 6).all()
    w[:, 64] = 0
    got, _ = multiply(TcaBme.from_dense(w), x, encoded.choices(2, sm_count=4)[1])
    assert np.isposinf(got).all()


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_random_values_stay_within_the_bound(n: int, number: int) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((64, 2048)).astype(np.float16)
    w[rng.random(w.shape) >= 0.5] = 0
    x = rng.standard_normal((n, 2048)).astype(np.float16)
    encoded = TcaBme.from_dense(w)
    got, _ = multiply(encoded, x, encoded.choices(n, sm_count=4)[number], seed=n)
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(64), "fp16")
    assert error_over_bound(got.astype(np.float64), reference) <= 1.0


def test_longest_chains_stay_within_what_other_systems_are_allowed() -> None:
    """One split has all of K in one chain of truncated sums, as published; the worst case is when nothing cancels."""
    rng = np.random.default_rng(8)
    w = (rng.random((64, 49152)) * (rng.random((64, 49152)) < 0.5)).astype(np.float16)
    x = (rng.random((1, 49152)) / 4).astype(np.float16)
    encoded = TcaBme.from_dense(w)
    got, _ = multiply(encoded, x, encoded.choices(1, sm_count=4)[0])
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(64), "fp16")
    assert error_over_bound(got.astype(np.float64), reference) <= BASELINE_LIMIT


def test_repeats_give_the_same_bits() -> None:
    rng = np.random.default_rng(7)
    w = (rng.standard_normal((130, 1024)) * (rng.random((130, 1024)) < 0.4)).astype(np.float16)
    x = rng.standard_normal((20, 1024)).astype(np.float16)
    encoded = TcaBme.from_dense(w)
    choice = encoded.choices(20, sm_count=4)[-1]
    assert len({multiply(encoded, x, choice, seed=seed)[0].tobytes() for seed in range(5)}) == 1
