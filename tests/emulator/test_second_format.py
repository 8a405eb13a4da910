# SPDX-License-Identifier: Apache-2.0
"""A format whose kernel, split and buffers are unlike ours runs on the emulator as ours do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import coordinates
from coordinates import Coordinates
from flashllm import ArgumentError
from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions
from products import assert_exact, assert_special, exact, integers, special, weight

BUILD = BuildOptions(source_root=Path(__file__).parent)


@pytest.fixture(autouse=True)
def _second_format(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_product(dtype: str) -> None:
    a, x = weight("skewed", (100, 71), 0.3, dtype), integers(np.random.default_rng(1), (5, 71), dtype)
    for by in ("row", "column"):
        got, counts = emulator.spmm(x, Coordinates.from_dense(a, by=by), build=BUILD)
        assert_exact(got, exact(x, a, dtype))
        assert counts.blocks == 2 * 5


def test_special_values() -> None:
    w, x = special(weight("uniform", (201, 101), 0.3, "fp16"), 6)
    got, _ = emulator.spmm(x, Coordinates.from_dense(w), build=BUILD)
    assert_special(coordinates.NAME, got, x, w)


def test_blocks_are_for_stream_k_only() -> None:
    w, x = Coordinates.from_dense(np.ones((4, 8), np.float16)), np.ones((1, 8), np.float16)
    with pytest.raises(ArgumentError, match="blocks: expected None: coordinates has no stream-K split, got 2"):
        emulator.spmm(x, w, blocks=2, build=BUILD)
