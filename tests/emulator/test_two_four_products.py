# SPDX-License-Identifier: Apache-2.0
"""Products of 2:4 matrices on the CPU: exact on integers for every instance, split, layout and odd shape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fence import NAN, Fence
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.backends.emulator_counts import Counts
from flashllm.baselines import two_four
from flashllm.baselines.two_four import Choice, TwoFour
from flashllm.io.files import locked
from products import assert_exact, every_pair, exact, integers, weight
from weight_cases import PATTERNS

LAYOUTS = ({"column": False, "add": False}, {"column": True, "add": True})
SPECS = (*two_four.specs_as(**LAYOUTS[0]), *two_four.specs_as(**LAYOUTS[1]))
ARCHS = ("80", "90a")
SHAPES = ((1, 1), (7, 72), (31, 76), (129, 65), (200, 456), (384, 203), (513, 130))
COLUMNS = (1, 5, 8, 12, 16, 17, 32, 40, 64, 70)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """All instances, built together; another worker that needs them takes them from the cache."""
    with (Path(os.environ["FLASHLLM_TESTS_SCRATCH"]) / "two_four.lock").open("w") as lock, locked(lock.fileno()):
        for arch in ARCHS:
            emulator.preload(SPECS, build=emulator.BuildOptions(arch=arch))


def multiply(
    w: TwoFour, x: NDArray[Any], choice: Choice, *, y: NDArray[Any] | None = None, arch: str = "90a", seed: int = 0
) -> tuple[NDArray[Any], Sequence[Counts]]:
    """x[N, K] @ W^T, with the launches' counts; added to ``y`` [N, M] if the choice adds, else ``y`` is poisoned."""
    n = len(x)
    before = np.full((n, w.shape[0]), NAN, np.uint16).view(np.float16) if y is None else y
    turned = [np.ascontiguousarray(a.T) if choice.column else a for a in (x, before)]
    inputs, outputs = Fence(turned[0]), Fence(turned[1])
    workspace = Fence(np.full(w.workspace_bytes(n, choice), 0xFF, np.uint8))
    counts = [
        emulator.launch(step.spec, step.grid, step.args, arch=arch, seed=seed)
        for step in w.steps(inputs.inner, outputs.inner, workspace.inner, choice)
    ]
    for fence in (inputs, outputs, workspace):
        fence.check()
    assert (inputs.inner.view(np.uint16) == turned[0].view(np.uint16)).all()
    return (np.ascontiguousarray(outputs.inner.T) if choice.column else outputs.inner), counts


def two_of_four(pattern: str, shape: tuple[int, int], density: float, seed: int = 0) -> NDArray[Any]:
    """Integers: of what ``pattern`` keeps, the first two nonzeros of every group."""
    return np.asarray(TwoFour.first_two(weight(pattern, shape, density, "fp16", seed)).to_dense())


def check(w: NDArray[Any], n: int, choice: Choice, *, arch: str, seed: int) -> None:
    """The product with n columns of integers is exact; added to integers where the choice adds."""
    rng = np.random.default_rng(n + seed)
    x = integers(rng, (n, w.shape[1]), "fp16")
    y = rng.integers(-50, 50, (n, w.shape[0])).astype(np.float16) if choice.add else None
    got, _ = multiply(TwoFour.from_dense(w), x, choice, y=y, arch=arch, seed=seed)
    product = x.astype(np.float64) @ w.astype(np.float64).T
    assert_exact(got, (product + (y if y is not None else 0)).astype(np.float16))


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name == "two_four"], ids=lambda spec: spec.label)
def test_exact_for_every_instance_and_split(spec: Any) -> None:
    options = next(o for o in LAYOUTS if spec in two_four.specs_as(**o))
    width = int(dict(spec.template)["kN"])
    for seed, (pattern, density) in enumerate((("uniform", 0.3), ("full", 1.0), ("skewed", 0.5), ("empty-tiles", 0.9))):
        w = two_of_four(pattern, (300, 456), density, seed)
        n = width - seed % 3
        choices = [c for c in TwoFour.from_dense(w).choices_as(n, sm_count=4, **options) if c.spec == spec]
        assert {c.splits for c in choices} == set(two_four.SPLITS)
        for choice in choices[seed // 2 % 2 :: 2]:  # each split for two of the patterns, on both paths
            check(w, n, choice, arch=ARCHS[seed % 2], seed=seed)


@every_pair("shape, layout, arch", SHAPES, ("row", "column"), ARCHS)
def test_exact_for_odd_shapes(shape: tuple[int, int], layout: str, arch: str) -> None:
    options = LAYOUTS[layout == "column"]
    for seed, n in enumerate(COLUMNS):
        w = two_of_four("uniform", shape, 0.5, seed)
        choices = TwoFour.from_dense(w).choices_as(n, sm_count=4, **options)
        # The best one, and another that depends on the seed, so that all have their turn.
        for choice in dict.fromkeys((choices[0], choices[-1 - seed % len(choices)])):
            check(w, n, choice, arch=arch, seed=seed)


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_for_every_pattern(pattern: str, options: dict[str, bool]) -> None:
    for seed, (n, density) in enumerate(((9, 0.1), (33, 0.6), (16, 1.0))):
        w = two_of_four(pattern, (260, 330), density, seed)
        for splits in (1, 3):
            choices = TwoFour.from_dense(w).choices_as(n, sm_count=4, **options)
            check(w, n, next(c for c in choices if c.splits == splits), arch=ARCHS[seed % 2], seed=seed)


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
@pytest.mark.parametrize("seed", range(12))
def test_exact_for_random_schedules(seed: int, options: dict[str, bool]) -> None:
    """Blocks, warps and lanes in another order each time, and copies that end early or late."""
    w = two_of_four("uniform", (200, 64 * 11), 0.6, seed)
    for n in (7, 16, 32, 64):
        for choice in TwoFour.from_dense(w).choices_as(n, sm_count=4, **options):
            if choice.splits == 1 + seed % 2:
                check(w, n, choice, arch=ARCHS[seed // 2 % 2], seed=100 + seed)


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
def test_sums_are_fp32_and_rounded_once(options: dict[str, bool]) -> None:
    """Partial sums, and the product before it is added, have more bits than fp16."""
    w = np.zeros((130, 512), np.float16)
    w[:, 0], w[:, 63], w[:, 511] = 2048, 1, -2048
    x = np.ones((9, 512), np.float16)
    made = TwoFour.from_dense(w)
    for choice in made.choices_as(9, sm_count=4, **options):
        got, _ = multiply(made, x, choice, y=np.zeros((9, 130), np.float16) if choice.add else None)
        assert (got == 1).all()
    if options["add"]:
        w[:, 511] = 0
        made = TwoFour.from_dense(w)
        for choice in made.choices_as(9, sm_count=4, **options):
            got, _ = multiply(made, x, choice, y=np.full((9, 130), -2048, np.float16))
            assert (got == 1).all()


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
def test_nan_and_infinity(options: dict[str, bool]) -> None:
    """Those of W multiply as in dense arithmetic. Those of x meet what is stored of W, and affect no other row of x."""
    w = two_of_four("uniform", (200, 130), 0.5, 3)
    w[3, 4:8], w[150, 128:130] = (0, np.nan, 0, 0), (np.inf, -np.inf)
    x = integers(np.random.default_rng(4), (9, 130), "fp16")
    x[5, 129], x[7, 9], x[8, 0] = 0, np.inf, np.nan
    y = np.zeros((9, 200), np.float16)
    with np.errstate(invalid="ignore"):
        dense = (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float16)
    made = TwoFour.from_dense(w)
    for choice in made.choices_as(9, sm_count=4, **options):
        got, _ = multiply(made, x, choice, y=y if choice.add else None)
        np.testing.assert_array_equal(got[:7], dense[:7])
        assert np.isnan(got[5, 150])
        assert np.isnan(got[:, 3]).all()
        # A stored zero times an infinity is NaN, as in a dense product; one that is not stored does nothing.
        assert not np.isfinite(got[7, w[:, 9] != 0]).any()
        assert np.isnan(got[8, w[:, 0] != 0]).all()


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
def test_padding_of_w_meets_zeros(options: dict[str, bool]) -> None:
    """Not what lies after x, nor its first elements, which are the address of copies that read nothing."""
    w = two_of_four("uniform", (130, 72), 0.5, 3)
    x = integers(np.random.default_rng(4), (16, 72), "fp16")
    x[0] = np.nan
    made = TwoFour.from_dense(w)
    for choice in made.choices_as(16, sm_count=4, **options):
        got, _ = multiply(made, x, choice, y=np.zeros((16, 130), np.float16))
        assert_exact(got[1:], exact(x[1:], w, "fp16"))
        assert np.isnan(got[0, w.any(axis=1)]).all()


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
def test_overflow_rounds_to_infinity(options: dict[str, bool]) -> None:
    w = np.zeros((130, 64), np.float16)
    w[:, ::2] = 60000
    made = TwoFour.from_dense(w)
    choice = made.choices_as(1, sm_count=4, **options)[0]
    got, _ = multiply(made, np.ones((1, 64), np.float16), choice, y=np.zeros((1, 130), np.float16))
    assert np.isposinf(got).all()


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
def test_repeats_give_the_same_bits(options: dict[str, bool]) -> None:
    rng = np.random.default_rng(7)
    w = TwoFour.first_two(rng.standard_normal((260, 1024)).astype(np.float16))
    x = rng.standard_normal((40, 1024)).astype(np.float16)
    y = rng.standard_normal((40, 260)).astype(np.float16)
    for choice in w.choices_as(40, sm_count=4, **options)[:3]:
        results = [multiply(w, x, choice, y=y, seed=seed)[0].tobytes() for seed in range(4)]
        assert len(set(results)) == 1


@pytest.mark.parametrize("options", LAYOUTS, ids=["row", "column"])
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
def test_reads_w_once_and_has_no_bank_conflicts(n: int, options: dict[str, bool]) -> None:
    rows, columns = 512, 64 * 16
    w = TwoFour.from_dense(two_of_four("uniform", (rows, columns), 0.5))
    x = integers(np.random.default_rng(1), (n, columns), "fp16")
    for choice in w.choices_as(n, sm_count=4, **options):
        _, (counts, *_) = multiply(w, x, choice, y=np.zeros((n, rows), np.float16))
        column_blocks, row_blocks = -(-n // choice.n_block), rows // 128 // choice.row_tiles
        assert counts.blocks == column_blocks * row_blocks * choice.splits
        # Tiles of W as often as there are blocks of columns, x as often as there are blocks of rows.
        assert counts.copy_async_bytes == column_blocks * w.nbytes + row_blocks * x.nbytes
        assert counts.multiply_adds == rows * columns // 2 * column_blocks * choice.n_block
        assert counts.ldmatrix.conflicts == 0
        assert counts.ldmatrix.requests == row_blocks * 4 * columns // 32 * column_blocks * choice.n_block // 8


def test_unaligned_stores_have_no_bank_conflicts() -> None:
    w = TwoFour.from_dense(two_of_four("uniform", (128, 63 + 64), 0.5))
    x = integers(np.random.default_rng(1), (16, 127), "fp16")
    choice = next(c for c in w.choices(16, sm_count=4) if c.splits == 1)
    _, (counts,) = multiply(w, x, choice)
    assert counts.store16.requests > 0
    assert counts.store16.conflicts == 0


def test_rows_of_x_longer_than_one_chain_may_be() -> None:
    """K is so large that no choice has one split, and results are still exact."""
    w = two_of_four("uniform", (3, 12288 + 64), 0.02)
    made = TwoFour.from_dense(w)
    choices = made.choices(2, sm_count=4)
    assert {c.splits for c in choices} == {2, 3, 4, 6, 8}
    x = integers(np.random.default_rng(2), (2, w.shape[1]), "fp16")
    for choice in choices[:2]:
        assert_exact(multiply(made, x, choice)[0], exact(x, w, "fp16"))
