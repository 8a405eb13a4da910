# SPDX-License-Identifier: Apache-2.0
"""Choosing and packing on the GPU: the same results as on the host, and a right product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm import pack, registry, spmm
from flashllm.device import device_facts
from flashllm.gpus import gpu_of
from flashllm.matmul.auto import rank_formats, rank_formats_of
from flashllm.matmul.sample import sampled
from products import NUMPY_DTYPE, assert_exact, exact, integers, weight

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path / "cache"))


def on_device(cp: Any, w: Any, dtype: str) -> Any:
    """``w`` as the device encoders take it: float16, or the bits of bf16."""
    bits = cp.asarray(w.view(np.uint16))
    return bits.view(np.float16) if dtype == "fp16" else bits


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("pattern", ["uniform", "skewed", "column"])
def test_a_device_matrix_is_judged_as_on_the_host(cp: Any, pattern: str, dtype: str) -> None:
    w = weight(pattern, (2500, 520), 0.2, dtype)
    w[1700] = 1
    formats = list(registry.FORMATS)
    assert sampled(on_device(cp, w, dtype), formats, dtype=dtype) == sampled(w, formats, dtype=dtype)
    pitched = cp.zeros((2500, 1000), np.uint16)
    pitched[:, :520] = cp.asarray(w.view(np.uint16))
    part = pitched[:, :520].view(np.float16) if dtype == "fp16" else pitched[:, :520]
    assert sampled(part, formats, dtype=dtype) == sampled(w, formats, dtype=dtype)


def test_wider_device_matrices_are_judged_too(cp: Any) -> None:
    w = weight("uniform", (1300, 256), 0.2, "fp16").astype(np.float32)
    assert sampled(cp.asarray(w), ["bitmap"]) == sampled(w, ["bitmap"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("n", [8, 64])
def test_packed_in_the_best_format_and_exact(cp: Any, n: int, dtype: str) -> None:
    w = weight("uniform", (1024, 2048), 0.15, dtype)
    sparse = pack(on_device(cp, w, dtype), n=n, dtype=dtype)
    assert sparse.is_device
    assert sparse.format == rank_formats_of(w, n, gpu=gpu_of(device_facts())).best.format
    x = integers(np.random.default_rng(n), (n, 2048), dtype)
    assert_exact(spmm(on_device(cp, x, dtype), sparse).get().view(NUMPY_DTYPE[dtype]), exact(x, w, dtype))


def test_times_that_were_measured_here_are_preferred(cp: Any) -> None:
    from flashllm.matmul.tune import tune

    w = weight("uniform", (1024, 2048), 0.2, "fp16")
    for name in registry.FORMATS:
        tune(pack(cp.asarray(w), format=name), [16])
    ranking = rank_formats_of(cp.asarray(w), 16)
    assert all(candidate.source == "measured" for candidate in ranking.candidates)
    assert rank_formats((1024, 2048), 0.2, 32).best.source == "model"
