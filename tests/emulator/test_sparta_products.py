# SPDX-License-Identifier: Apache-2.0
"""SparTA's products on the CPU: Sputnik's kernel writes y, the 2:4 kernel adds to it; exact on integers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fence import NAN, Fence
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.baselines import sparta
from flashllm.baselines.sparta import Choice, SparTA
from flashllm.io.files import locked
from products import assert_exact, exact, integers, weight
from weight_cases import PATTERNS

ARCHS = ("80", "90a")
SHAPES = ((1, 1), (7, 72), (31, 76), (129, 65), (200, 456), (384, 203))
COLUMNS = (1, 5, 8, 12, 16, 17, 32, 40, 64, 70)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """All instances, built together; another worker that needs them takes them from the cache."""
    with (Path(os.environ["FLASHLLM_TESTS_SCRATCH"]) / "sparta.lock").open("w") as lock, locked(lock.fileno()):
        for arch in ARCHS:
            emulator.preload(sparta.specs(), build=emulator.BuildOptions(arch=arch))


def multiply(w: SparTA, x: NDArray[Any], choice: Choice, *, arch: str = "90a", seed: int = 0) -> NDArray[Any]:
    """x[N, K] @ W^T. y is poisoned beforehand; x and y are fenced."""
    n = len(x)
    inputs = Fence(np.ascontiguousarray(x.T))
    outputs = Fence(np.full((w.shape[0], n), NAN, np.uint16).view(np.float16))
    workspace = np.full(w.workspace_bytes(n, choice), 0xFF, np.uint8)
    for step in w.steps(inputs.inner, outputs.inner, workspace, choice):
        emulator.launch(step.spec, step.grid, step.args, arch=arch, seed=seed)
    for fence in (inputs, outputs):
        fence.check()
    assert (inputs.inner.view(np.uint16) == x.T.view(np.uint16)).all(), "x has changed"
    return outputs.inner.T.copy()


def check(w: NDArray[Any], n: int, *, arch: str, seed: int, choices: int = 2) -> None:
    """Exact for the best choices, and for others in turn."""
    x = integers(np.random.default_rng(n + seed), (n, w.shape[1]), "fp16")
    made = SparTA.from_dense(w)
    # The result between the launches has to be an fp16 number, or rounding it would make the sum inexact.
    partial = x.astype(np.float64) @ made.residual.to_dense().astype(np.float64).T
    assert (np.abs(partial) <= 2048).all()
    found = made.choices(n, sm_count=4)
    for choice in dict.fromkeys((*found[: choices - 1], found[-1 - seed % len(found)])):
        assert_exact(multiply(made, x, choice, arch=arch, seed=seed), exact(x, w, "fp16"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_for_odd_shapes(shape: tuple[int, int], arch: str) -> None:
    for seed, n in enumerate(COLUMNS):
        check(weight("uniform", shape, 0.4, "fp16", seed), n, arch=arch, seed=seed)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_for_every_pattern(pattern: str) -> None:
    for seed, (n, density) in enumerate(((9, 0.1), (33, 0.5), (16, 1.0))):
        check(weight(pattern, (260, 330), density, "fp16", seed), n, arch=ARCHS[seed % 2], seed=seed)


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_exact_for_every_choice(n: int) -> None:
    w = weight("uniform", (300, 456), 0.5, "fp16")
    check(w, n, arch="90a", seed=n, choices=100)


@pytest.mark.parametrize("seed", range(8))
def test_exact_for_random_schedules(seed: int) -> None:
    w = weight("skewed", (200, 328), 0.6, "fp16", seed)
    for n in (7, 24, 64):
        check(w, n, arch=ARCHS[seed % 2], seed=1000 + seed, choices=1)


def test_y_is_rounded_between_the_parts() -> None:
    """As in the published composition: the residual's 2048 + 1 is 2048 in fp16, to which the other part adds 2."""
    w = np.zeros((5, 8), np.float16)
    w[:, :4] = 1, 1, 2048, 1
    made = SparTA.from_dense(w)
    assert made.residual.nnz == 10
    for choice in made.choices(4, sm_count=4):
        assert (multiply(made, np.ones((4, 8), np.float16), choice) == 2050).all()
    assert exact(np.ones((4, 8), np.float16), w, "fp16")[0, 0] == 2052  # 2051, rounded once


def test_nan_and_infinity_of_the_weight() -> None:
    """In either part they multiply as in dense arithmetic."""
    w = weight("uniform", (200, 130), 0.5, "fp16")
    w[3, 4:8], w[150, 40:44], w[160, 64:68] = (1, 1, np.nan, 1), (np.inf, 1, 1, -np.inf), (1, 1, np.inf, 1)
    x = integers(np.random.default_rng(4), (9, 130), "fp16")
    x[5, 40] = 0
    with np.errstate(invalid="ignore"):
        dense = (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float16)
    made = SparTA.from_dense(w)
    for choice in made.choices(9, sm_count=4):
        np.testing.assert_array_equal(multiply(made, x, choice), dense)
