# SPDX-License-Identifier: Apache-2.0
"""How small the bitmap kernel's ring of value rows may be: no weight deadlocks it, but one chunk less would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mutations import MMA, WGMMA, Mutation, build_of

from flashllm.backends import emulator
from flashllm.errors import CompileError
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import CHUNK_ROWS, SLACK, STREAM_ELEMENTS
from flashllm.matmul import bitmap
from products import assert_exact, exact, integers, weight

SMALLEST = SLACK + STREAM_ELEMENTS + 1 + CHUNK_ROWS
UNCHECKED = "kRing >= bitmap::kSlack + kMoves + 1 + bitmap::kChunkRows"


@pytest.fixture
def ring_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Give the kernel a ring of so many rows."""
    monkeypatch.setattr(bitmap, "RING_ROWS", dict.fromkeys(bitmap.RING_ROWS, request.param))
    bitmap._spec.cache_clear()
    yield request.param
    bitmap._spec.cache_clear()


def check(pattern: str, density: float, n: int, build: emulator.BuildOptions, *, seed: int, blocks: int) -> None:
    w = weight(pattern, (128, 64 * 50), density, "fp16", seed)
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), "fp16")
    got, _ = emulator.spmm(x, Bitmap.from_dense(w), seed=seed, build=build, blocks=blocks)
    assert_exact(got, exact(x, w, "fp16"))


@pytest.mark.parametrize("ring_rows", [SMALLEST], indirect=True)
@pytest.mark.parametrize("n", [9, 33])
@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
@pytest.mark.parametrize("pattern", ["full", "lagging", "uniform", "column"])
def test_exact_with_the_smallest_ring(pattern: str, arch: str, n: int, ring_rows: int) -> None:
    for seed, (density, blocks) in enumerate(((0.6, 1), (0.9, 2), (0.3, 7), (0.5, 25))):
        check(pattern, density, n, emulator.BuildOptions(arch=arch), seed=seed, blocks=blocks)


@pytest.mark.parametrize("ring_rows", [SMALLEST - CHUNK_ROWS], indirect=True)
@pytest.mark.parametrize("arch", [MMA, WGMMA])
def test_a_smaller_ring_is_refused_and_would_deadlock(arch: str, ring_rows: int, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="could wait for rows that wait for the slowest stream"):
        check("full", 1.0, 9, emulator.BuildOptions(arch=arch), seed=0, blocks=1)
    unchecked = build_of(Mutation("any ring", "flashllm/value_ring.cuh", UNCHECKED, "true"), arch, tmp_path / "any")
    with pytest.raises(emulator.EmulationError, match="deadlock"):
        check("full", 1.0, 9, unchecked, seed=0, blocks=1)
