# SPDX-License-Identifier: Apache-2.0
"""The Sputnik baseline's kernel on the CPU: exact on integers, for every instance, any shape and any mask."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.baselines import sputnik
from flashllm.baselines.sputnik import Choice, Sputnik
from flashllm.bench.check import error_over_bound, make_reference
from flashllm.io.files import locked
from products import assert_exact, exact, integers, weight
from weight_cases import PATTERNS

ODD_SHAPES = ((1, 1), (7, 72), (129, 65), (200, 456), (384, 203))
WIDTHS = (1, 5, 8, 16, 17, 18, 32, 40, 64, 70)
GUARD = 256  # elements before and after an operand
NAN_BITS = 0x7FDA  # a NaN that no conversion gives
# Each instance of the kernel with an N: the largest up to 128 that leaves some columns of its tiles empty, if any does.
ORDER = sorted(range(1, 129), key=lambda n: (n % 8 != 0, n % 32 != 0, n))
INSTANCES = tuple({choice.spec: (choice, n) for n in ORDER for choice in sputnik.choices(n)}.values())


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    # Another worker may compile the same ones: then all come from the cache.
    with (Path(os.environ["FLASHLLM_TESTS_SCRATCH"]) / "sputnik.lock").open("w") as lock, locked(lock.fileno()):
        for arch in ("80", "90a"):
            emulator.preload(sputnik.specs(), build=emulator.BuildOptions(arch=arch))


def fenced(shape: tuple[int, int], content: NDArray[Any] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """An fp16 array among NaNs, at an address divisible by 16, and all the memory including the NaNs as bits."""
    count = shape[0] * shape[1]
    memory = np.full(count + 2 * GUARD + 8, NAN_BITS, np.uint16)
    start = GUARD + (-(memory.ctypes.data + 2 * GUARD) % 16) // 2
    inner = memory[start : start + count].view(np.float16).reshape(shape)
    if content is not None:
        inner[...] = content
    return inner, memory


def product(
    x: NDArray[Any], packed: Sputnik, choice: Choice, *, arch: str = "90a", seed: int = 0
) -> tuple[NDArray[Any], emulator.Counts]:
    """y[N, M] for x[N, K]; fails when anything outside y is written."""
    n, rows = x.shape[0], packed.shape[0]
    inner, around_x = fenced((x.shape[1], n), x.T)
    y, around_y = fenced((rows, n))
    before = around_x.copy()
    (step,) = packed.steps(inner, y, None, choice)
    for argument in step.args[1:5]:
        assert argument.ctypes.data % 16 == 0
        argument.setflags(write=False)
    counts = emulator.launch(step.spec, step.grid, step.args, arch=arch, seed=seed)
    np.testing.assert_array_equal(around_x, before)
    outside = np.ones(around_y.size, bool)
    first = (y.ctypes.data - around_y.ctypes.data) // 2
    outside[first : first + y.size] = False
    assert (around_y[outside] == NAN_BITS).all(), "wrote outside y"
    return np.ascontiguousarray(y.T), counts


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_exact_for_odd_shapes(shape: tuple[int, int], arch: str) -> None:
    rng = np.random.default_rng(1)
    w = weight("uniform", shape, 0.4, "fp16")
    packed = Sputnik.from_dense(w)
    for n in WIDTHS:
        x = integers(rng, (n, shape[1]), "fp16")
        for choice in sputnik.choices(n):
            got, _ = product(x, packed, choice, arch=arch, seed=n)
            assert_exact(got, exact(x, w, "fp16"))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("choice", "n"), INSTANCES, ids=lambda value: getattr(value, "label", str(value)))
def test_exact_for_every_instance_and_mask(choice: Choice, n: int, pattern: str) -> None:
    for seed, density in enumerate((0.02, 0.3, 0.9)):
        w = weight(pattern, (70, 331), density, "fp16", seed)
        x = integers(np.random.default_rng(3), (n, 331), "fp16")
        got, _ = product(x, Sputnik.from_dense(w, swizzle=seed == 1), choice, seed=seed)
        assert_exact(got, exact(x, w, "fp16"))


def rows_of_every_length(longest: int) -> NDArray[Any]:
    """Small integers; the rows have every number of elements from 0 to ``longest``, in random order."""
    rng = np.random.default_rng(7)
    w = integers(rng, (longest + 1, longest + 20), "fp16")
    rank = np.argsort(np.argsort(rng.random(w.shape), axis=1), axis=1)
    w[rank >= rng.permutation(longest + 1)[:, None]] = 0
    return w


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("swizzle", [False, True])
def test_exact_for_rows_of_every_length(swizzle: bool, seed: int) -> None:
    """Zero, one or two whole steps, and every remainder; rows that begin inside a vector, and rows that do not."""
    w = rows_of_every_length(200)
    packed = Sputnik.from_dense(w, swizzle=swizzle)
    assert set((packed.row_offsets[:-1] % 8).tolist()) == {0, 4}
    for choice, n in INSTANCES[seed % 2 :: 2]:
        x = integers(np.random.default_rng(seed), (n, w.shape[1]), "fp16")
        got, _ = product(x, packed, choice, arch=("80", "90a")[seed % 2], seed=100 + seed)
        assert_exact(got, exact(x, w, "fp16"))


def test_computes_the_rows_that_the_order_names() -> None:
    """Any order gives the same y, so one that repeats a row and omits the others shows that the order is obeyed."""
    w = weight("uniform", (9, 50), 0.5, "fp16")
    packed = replace(Sputnik.from_dense(w), row_indices=np.full(9, 4, np.int32))
    x = integers(np.random.default_rng(4), (16, 50), "fp16")
    for choice in sputnik.choices(16):
        got, _ = product(x, packed, choice)
        assert_exact(got[:, 4].copy(), exact(x, w[4:5], "fp16")[:, 0])
        assert (np.delete(got, 4, axis=1).view(np.uint16) == NAN_BITS).all()


def test_exact_for_columns_of_sixteen_bits() -> None:
    """Also those above 32767, where signed ones wrap."""
    rng = np.random.default_rng(8)
    w = np.zeros((9, 65535), np.float16)
    w[:, rng.permutation(65535)[:600]] = integers(rng, (9, 600), "fp16")
    w[:, [32767, 32768, 65534]] = 1, 2, 3
    packed = Sputnik.from_dense(w)
    for n in (3, 8):
        x = integers(rng, (n, 65535), "fp16")
        for choice in sputnik.choices(n):
            got, _ = product(x, packed, choice)
            assert_exact(got, exact(x, w, "fp16"))


@pytest.mark.parametrize(("choice", "n"), INSTANCES, ids=lambda value: getattr(value, "label", str(value)))
def test_only_stored_elements_are_multiplied(choice: Choice, n: int) -> None:
    """NaN and infinities of x where W has zeros, padding or another row's element do not reach y; others do."""
    w = rows_of_every_length(150)
    rng = np.random.default_rng(9)
    odd = rng.choice(w.shape[1] - 1, 6, replace=False)
    w[:, odd] *= rng.random((len(w), 6)) < 0.1  # so that most rows have no elements in these columns
    w[:, -1] = 1  # all padding is in this column
    w[5, 20], w[120, 3], w[77, 60] = np.nan, np.inf, -np.inf
    x = integers(rng, (n, w.shape[1]), "fp16")
    x[:, odd] = rng.choice([np.inf, -np.inf, np.nan], (n, 6))
    x[::2, -1] = np.inf
    x[0, 3] = 0  # times the infinity of w: NaN
    with np.errstate(invalid="ignore", over="ignore"):
        terms = x.astype(np.float64)[:, None] * w.astype(np.float64)
        want = np.where(w != 0, terms, 0).sum(axis=-1).astype(np.float16)
    got, _ = product(x, Sputnik.from_dense(w), choice)
    np.testing.assert_array_equal(got, want)
    assert np.isnan(want).any()
    assert np.isinf(want).any()
    assert np.isfinite(want).any()


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_random_values_stay_within_the_bound(n: int) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((64, 2048)).astype(np.float16)
    w[rng.random(w.shape) >= 0.3] = 0
    x = rng.standard_normal((n, 2048)).astype(np.float16)
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(64), "fp16")
    packed = Sputnik.from_dense(w)
    for choice in sputnik.choices(n):
        first, second = (product(x, packed, choice, seed=seed)[0] for seed in (1, 2))
        assert error_over_bound(first.astype(np.float64), reference) <= 1.0
        np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


def test_reads_what_is_stored_and_no_more() -> None:
    """Bytes read if rows end with a step of one group of four, and every second row begins inside a vector."""
    w = np.ones((8, 4 * 64 + 4), np.float16)
    packed = Sputnik.from_dense(w)
    x = integers(np.random.default_rng(2), (16, w.shape[1]), "fp16")
    got, counts = product(x, packed, sputnik.choices(16)[0])
    assert_exact(got, exact(x, w, "fp16"))
    assert counts.blocks == 2
    gathered = 8 * w.shape[1] * 16 * 2
    stored = 8 * 5 * 64 * 4  # threads past a row's end read its last vector again
    rows = 8 * 8 * 3 * 4  # a number and two offsets by each thread
    assert counts.global_read_bytes == gathered + stored + rows
