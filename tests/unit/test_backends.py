# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashllm import backends
from flashllm.backends import emulator, reference
from flashllm.errors import ArgumentError, MissingDependencyError, UnsupportedDeviceError
from flashllm.formats.tiled_csl import TiledCSL

DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm import device

    monkeypatch.setattr(device, "gpu_problem", lambda: "the driver reports no GPU")


def _integers(shape: tuple[int, int], dtype: str, *, density: float, seed: int) -> Any:
    random = np.random.default_rng(seed)
    values = random.integers(-4, 5, shape) * (random.random(shape) < density)
    return values.astype(np.float32).astype(DTYPES[dtype])


@pytest.mark.parametrize("name", [None, "auto"])
def test_without_a_gpu_the_emulator_is_chosen_and_says_why(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    _no_gpu(monkeypatch)
    monkeypatch.setattr(emulator, "available", lambda: None)
    assert backends.select(name) == ("emulator", "the driver reports no GPU")


def test_without_gpu_and_compiler_the_reference_is_chosen_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_gpu(monkeypatch)
    monkeypatch.setattr(emulator, "available", lambda: "no g++ found")
    assert backends.select() == ("reference", "the driver reports no GPU, and no g++ found")


def test_emulator_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "available", lambda: None)
    assert backends.select("emulator").name == "emulator"
    monkeypatch.setattr(emulator, "available", lambda: "no g++ found")
    with pytest.raises(MissingDependencyError, match=r"'emulator' was asked for, but no g\+\+ found"):
        backends.select("emulator")


def test_forcing_cuda_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_gpu(monkeypatch)
    with pytest.raises(UnsupportedDeviceError, match=r"'cuda' was asked for, but the driver reports no GPU"):
        backends.select("cuda")


def test_reference_can_be_asked_for() -> None:
    assert backends.select("reference").name == "reference"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ArgumentError, match="backend: expected 'cuda', 'emulator', 'reference' or None, got 'tpu'"):
        backends.select("tpu")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (130, 70, 3), (600, 200, 17), (128, 64, 0)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_integers_are_exact(dtype: str, m: int, k: int, n: int, density: float) -> None:
    weight = _integers((m, k), dtype, density=density, seed=m)
    x = _integers((n, k), dtype, density=1.0, seed=k)
    y = reference.spmm(x, TiledCSL.from_dense(weight))
    exact = x.astype(np.int64) @ weight.astype(np.int64).T
    assert y.dtype == x.dtype
    assert y.shape == (n, m)
    np.testing.assert_array_equal(y, exact.astype(np.float64).astype(np.float32).astype(DTYPES[dtype]))


@pytest.mark.parametrize(("dtype", "half_unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_result_is_rounded_once(dtype: str, half_unit: float) -> None:
    # 1 + half a unit + a trace: a rounding to float32 on the way would drop the trace, see a tie, and go down.
    weight = np.array([[1.0, half_unit, 2.0**-14]], np.float32).astype(DTYPES[dtype])
    x = np.array([[1.0, 1.0, 2.0**-14]], np.float32).astype(DTYPES[dtype])
    y = reference.spmm(x, TiledCSL.from_dense(weight))
    assert float(y[0, 0]) == 1.0 + 2 * half_unit


def test_overflow_and_special_values() -> None:
    weight = np.zeros((3, 4), np.float16)
    weight[0, 0] = weight[0, 1] = 60000
    weight[1, 2] = np.nan
    y = reference.spmm(np.ones((1, 4), np.float16), TiledCSL.from_dense(weight))
    assert y[0, 0] == np.inf
    assert np.isnan(y[0, 1])
    assert y[0, 2] == 0


def test_bf16_bits_as_uint16() -> None:
    weight = _integers((40, 30), "bf16", density=0.4, seed=1)
    x = _integers((2, 30), "bf16", density=1.0, seed=2)
    w = TiledCSL.from_dense(weight)
    y = reference.spmm(x.view(np.uint16), w)
    assert y.dtype == np.uint16
    np.testing.assert_array_equal(y.view(ml_dtypes.bfloat16), reference.spmm(x, w))


def test_strided_input() -> None:
    weight = _integers((40, 30), "fp16", density=0.4, seed=1)
    x = _integers((8, 30), "fp16", density=1.0, seed=2)
    w = TiledCSL.from_dense(weight)
    np.testing.assert_array_equal(reference.spmm(x[::2], w), reference.spmm(x, w)[::2])


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((2, 31), np.float16), r"x: expected shape \[N, 30\], got \[2, 31\]"),
        (np.zeros(30, np.float16), r"x: expected shape \[N, 30\], got \[30\]"),
        (np.zeros((2, 30), np.float32), "x: expected dtype float16 like the weight's, got float32"),
        (np.zeros((2, 30), np.uint16), "x: expected dtype float16"),
        ([[0.0] * 30], "x: expected a NumPy array for the reference backend, got list"),
    ],
)
def test_bad_input_is_named(x: Any, text: str) -> None:
    w = TiledCSL.from_dense(_integers((40, 30), "fp16", density=0.4, seed=1))
    with pytest.raises(ArgumentError, match=text):
        reference.spmm(x, w)
