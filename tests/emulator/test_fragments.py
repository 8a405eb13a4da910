# SPDX-License-Identifier: Apache-2.0
"""The fragments of warp-wide instructions against NumPy, and mistakes with them that the emulator has to catch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions, EmulationError
from flashllm.jit.spec import KernelSpec
from products import integers
from weight_cases import NUMPY_DTYPE

SOURCE = Path(__file__).with_name("fragments.cu")
BUILD = BuildOptions(source_root=SOURCE.parent)
SEEDS = range(8)
T = {"fp16": "__half", "bf16": "__nv_bfloat16"}
PAIRS = tuple(combinations(range(4), 2))
"""Places that two elements of a group may have, in order."""
UNORDERED = tuple(pair for pair in product(range(4), repeat=2) if pair not in PAIRS)


def spec(function: str, threads: int, shared_bytes: int, **template: object) -> KernelSpec:
    return KernelSpec(
        name=function,
        source="fragments.cu",
        function=f"fragments::{function}",
        template=tuple((name, str(value)) for name, value in template.items()),
        threads=threads,
        shared_bytes=shared_bytes,
    )


def sparse_spec(dtype: str = "fp16", selector: int = 0, mistake: int = 0) -> KernelSpec:
    return spec("multiply_sparse", 32, 128, T=T[dtype], kSelector=selector, kMistake=mistake)


SPARSE = [sparse_spec(dtype, selector) for dtype in T for selector in (0, 1)]
SPARSE_MISTAKES = [sparse_spec("fp16", mistake % 2, mistake) for mistake in range(6)]
DENSE = {dtype: spec("multiply_dense", 32, 0, T=name) for dtype, name in T.items()}
TRANSPOSE = [spec("transpose", 64, 1024, kMistake=mistake) for mistake in range(6)]
BYTES = spec("bytes", 64, 0)
WORDS = [spec("words", 64, 256, kMistake=mistake) for mistake in range(7)]
PUBLISH = [spec("publish", 128, 1024, kMistake=mistake) for mistake in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    sparse = [*SPARSE, *SPARSE_MISTAKES, *DENSE.values()]
    emulator.preload([*sparse, *TRANSPOSE, *WORDS, *PUBLISH, BYTES], build=BUILD)


def random_places(rng: np.random.Generator) -> NDArray[Any]:
    """[16 rows, 8 groups, 2 slots], a pair for each group of each row."""
    return rng.choice(np.array(PAIRS), (16, 8))


def multiply_sparse(
    kernel: KernelSpec, a: NDArray[Any], b: NDArray[Any], places: NDArray[Any], c: NDArray[Any], seed: int = 0
) -> tuple[NDArray[Any], emulator.Counts]:
    nibbles = places[..., 0] | places[..., 1] << 2
    words = (nibbles.reshape(16, 2, 4) << 4 * np.arange(4)).sum(2).astype(np.uint16)
    y = c.astype(np.float32)
    counts = emulator.launch(kernel, (1,), (a, b, words, y), seed=seed, build=BUILD)
    return y, counts


def sparse_operands(rng: np.random.Generator, dtype: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return integers(rng, (16, 16), dtype), integers(rng, (8, 32), dtype), integers(rng, (16, 8), "fp16")


def sparse_product(a: NDArray[Any], b: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    whole = np.zeros((16, 8, 4))
    np.put_along_axis(whole, places, a.astype(np.float64).reshape(16, 8, 2), axis=2)
    return whole.reshape(16, 32) @ b.astype(np.float64).T


@pytest.mark.parametrize("kernel", SPARSE, ids=lambda kernel: kernel.label)
def test_sparse_product(kernel: KernelSpec) -> None:
    dtype = next(dtype for dtype in T if dict(kernel.template)["T"] == T[dtype])
    rng = np.random.default_rng(0)
    same = [np.broadcast_to(pair, (16, 8, 2)) for pair in PAIRS]
    for seed, places in enumerate([*same, *(random_places(rng) for _ in range(12))]):
        a, b, c = sparse_operands(rng, dtype)
        y, counts = multiply_sparse(kernel, a, b, places, c, seed)
        np.testing.assert_array_equal(y, c + sparse_product(a, b, places))
        assert counts.mma == {"sp.m16n8k32": 1}
        assert counts.multiply_adds == 16 * 8 * 16


@pytest.mark.parametrize("kernel", SPARSE, ids=lambda kernel: kernel.label)
def test_each_place_alone(kernel: KernelSpec) -> None:
    """One element of W and one of b at a time, so that two errors of place cannot cancel unnoticed."""
    dtype = NUMPY_DTYPE[next(dtype for dtype in T if dict(kernel.template)["T"] == T[dtype])]
    rng = np.random.default_rng(1)
    for _ in range(60):
        places = random_places(rng)
        m, slot, n = rng.integers(16), rng.integers(16), rng.integers(8)
        a, b = np.zeros((16, 16), dtype), np.zeros((8, 32), dtype)
        a[m, slot], b[n, slot // 2 * 4 + places[m, slot // 2, slot % 2]] = 3, 5
        want = np.zeros((16, 8), np.float32)
        want[m, n] = 15
        np.testing.assert_array_equal(multiply_sparse(kernel, a, b, places, np.zeros((16, 8)))[0], want)


@pytest.mark.parametrize("dtype", T)
def test_sparse_product_rounds_as_the_dense_one(dtype: str) -> None:
    """If all rows have the same places, it is the dense product of what is selected; the rest of b is not read."""
    rng = np.random.default_rng(2)
    for pairs in rng.choice(np.array(PAIRS), (12, 8)):
        columns = (np.arange(8)[:, None] * 4 + pairs).reshape(-1)
        a, selected = (rng.standard_normal(shape).astype(NUMPY_DTYPE[dtype]) for shape in ((16, 16), (8, 16)))
        b = np.full((8, 32), np.nan, NUMPY_DTYPE[dtype])
        b[:, columns] = selected
        c = rng.standard_normal((16, 8)).astype(np.float32)
        want = c.copy()
        emulator.launch(DENSE[dtype], (1,), (a, selected, want), build=BUILD)
        got, _ = multiply_sparse(sparse_spec(dtype), a, b, np.broadcast_to(pairs, (16, 8, 2)), c)
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_bytes() -> None:
    """Every nibble in every place: the byte that it names or, from 8 on, eight copies of that byte's sign."""
    rng = np.random.default_rng(8)
    low, high, selectors = (rng.integers(0, 1 << 32, 4096, np.uint64).astype(np.uint32) for _ in range(3))
    y = np.zeros((2, 4096), np.uint32)
    emulator.launch(BYTES, (1,), (low, high, selectors, y, np.int32(4096)), build=BUILD)
    pairs = np.stack((low, high), axis=1).view(np.uint8)
    nibbles = selectors[:, None] >> 4 * np.arange(4, dtype=np.uint32) & 15  # the upper half says nothing
    assert all(set(column) == set(range(16)) for column in nibbles.T)
    named = np.take_along_axis(pairs, (nibbles & 7).astype(np.int64), axis=1)
    want = np.where(nibbles < 8, named, np.where(named >= 128, 255, 0)).astype(np.uint8)
    np.testing.assert_array_equal(y[0], np.ascontiguousarray(want).view(np.uint32)[:, 0])
    products = pairs[:, :4].astype(np.int64) * pairs[:, 4:]
    np.testing.assert_array_equal(y[1], (products.sum(1) + selectors).astype(np.uint32))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("selector", [0, 1])
def test_places_out_of_order(selector: int, zeros: bool) -> None:
    rng = np.random.default_rng(3)
    kernel = sparse_spec(selector=selector)
    for pair in UNORDERED:
        places = random_places(rng)
        m, group = int(rng.integers(16)), int(rng.integers(8))
        places[m, group] = pair
        a, b, c = sparse_operands(rng, "fp16")
        lane = m % 8 * 4 + selector * 2 + group // 4
        message = (
            rf"lane {lane}: mma\.sp::ordered_metadata: metadata 0x[0-9a-f]{{8}} places group {group} of row {m} at "
            rf"{pair[0]} and {pair[1]}, expected rising places"
        )
        with pytest.raises(EmulationError, match=message):
            multiply_sparse(kernel, np.zeros_like(a) if zeros else a, b, places, c, seed=m)


def sparse(kernel: KernelSpec, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    a, b, c = sparse_operands(rng, "fp16")
    places = random_places(rng)
    y, _ = multiply_sparse(kernel, a, b, places, c, seed)
    return bool((y == c + sparse_product(a, b, places)).all())


def transpose(kernel: KernelSpec, seed: int) -> bool:
    x = np.random.default_rng(seed).integers(0, 1 << 16, (2, 4, 8, 8)).astype(np.uint16)
    y = np.zeros((2, 4, 32), np.uint32)
    emulator.launch(kernel, (1,), (x, y, np.uint32(16)), seed=seed, build=BUILD)
    got = y.view(np.uint16).reshape(2, 4, 8, 8)  # [warp, matrix, g, 2 t + half]
    return bool((got == x[::-1].swapaxes(2, 3)).all())


def words(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    emulator.launch(kernel, (1,), (x, y, np.uint32(1)), seed=seed, build=BUILD)
    return bool((y == np.roll(x, -1)).all())


def publish(kernel: KernelSpec, seed: int) -> bool:
    b, y = integers(np.random.default_rng(seed), (8, 16), "fp16"), np.zeros((64, 8), np.float32)
    emulator.launch(kernel, (1,), (b, y), seed=seed, build=BUILD)
    return bool((y == b.astype(np.float32).sum(1)).all())


@pytest.mark.parametrize(
    ("run", "kernel"),
    [
        (sparse, SPARSE_MISTAKES[0]),
        (transpose, TRANSPOSE[0]),
        (words, WORDS[0]),
        (publish, PUBLISH[0]),
    ],
    ids=lambda value: value.name if isinstance(value, KernelSpec) else "",
)
def test_no_report_without_a_mistake(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec) -> None:
    assert all(run(kernel, seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("run", "kernel"),
    [(transpose, TRANSPOSE[4]), (words, WORDS[6])],
    ids=lambda value: value.name if isinstance(value, KernelSpec) else "",
)
def test_missing_barrier_gives_a_wrong_result(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec) -> None:
    assert not all(run(kernel, seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("run", "kernel", "message"),
    [
        (sparse, SPARSE_MISTAKES[1], r"ordered_metadata: metadata 0x00000000 places group [04] of row \d at 0 and 0"),
        (sparse, SPARSE_MISTAKES[2], r"ordered_metadata: metadata 0x7fff7fff places group [04] of row \d at 3 and 3"),
        (sparse, SPARSE_MISTAKES[4], r"divergent collective: .*(mma.m16n8k16.*mma.sp|mma.sp.*mma.m16n8k16)"),
        (sparse, SPARSE_MISTAKES[5], r"mma.sp: lanes 0 and 16 give different types or selectors"),
        (transpose, TRANSPOSE[1], r"lane 9: ldmatrix: shared address \d+ is not a multiple of 16"),
        (transpose, TRANSPOSE[2], r"lane 31: ldmatrix: 16 bytes at shared address \d+ \(offset 1024\) of 1024 bytes"),
        (transpose, TRANSPOSE[5], r"divergent collective: .*ldmatrix.x4.trans"),
        (words, WORDS[1], r"lane 9: 4-byte store: shared address \d+ is not a multiple of 4"),
        (words, WORDS[2], r"lane 9: 4-byte store: 4 bytes at shared address \d+ \(offset 292\) of 256 bytes"),
        (words, WORDS[3], r"lane 9: load: shared address \d+ is not a multiple of 4"),
        (words, WORDS[4], r"lane 9: load: 4 bytes at shared address \d+ \(offset 296\) of 256 bytes"),
        (publish, PUBLISH[1], r"missing proxy fence: wgmma.mma_async reads operand b"),
    ],
    ids=lambda value: value.label if isinstance(value, KernelSpec) else "",
)  # fmt: skip
def test_reports(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec, message: str) -> None:
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            run(kernel, seed)


def test_what_nobody_wrote_is_poisoned() -> None:
    rng = np.random.default_rng(4)
    a, b, c = sparse_operands(rng, "fp16")
    y, _ = multiply_sparse(SPARSE_MISTAKES[3], a, b, random_places(rng), c)
    assert np.isnan(y[8:]).all()  # a1 and a3, of which a1 is not there
    assert np.isfinite(y[:8]).all()
    x, fragments = np.ones((2, 4, 8, 8), np.float16), np.zeros((2, 4, 8, 8), np.float16)
    emulator.launch(TRANSPOSE[3], (1,), (x, fragments, np.uint32(16)), build=BUILD)
    assert set(zip(*np.nonzero(np.isnan(fragments)), strict=True)) == {(1, 1, g, 1) for g in range(8)}
    numbers, got = np.ones(64, np.uint32), np.zeros(64, np.uint32)
    emulator.launch(WORDS[5], (1,), (numbers, got, np.uint32(1)), build=BUILD)
    assert np.flatnonzero(got == 0x7FFF7FFF).tolist() == [8]


def test_conflicts_are_counted() -> None:
    x, y = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    for pitch, depth in ((16, 1), (32, 2), (64, 4), (128, 8), (80, 1)):
        kernel = spec("transpose", 64, 64 * pitch, kMistake=0)
        seen = emulator.launch(kernel, (1,), (x, y, np.uint32(pitch)), build=BUILD).ldmatrix
        assert (seen.requests, seen.ideal, seen.wavefronts) == (2, 8, 8 * depth)
    for stride, depth in ((1, 1), (2, 2), (32, 32), (33, 1)):
        kernel = spec("words", 64, 64 * stride * 4, kMistake=0)
        seen = emulator.launch(kernel, (1,), (x[:64], y, np.uint32(stride)), build=BUILD).store4
        assert (seen.requests, seen.ideal, seen.wavefronts) == (2, 2, 2 * depth)
