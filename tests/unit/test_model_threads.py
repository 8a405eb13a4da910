# SPDX-License-Identifier: Apache-2.0
"""Sequences in separate threads give the same results as one after the other."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from flashllm.io.checkpoint import open_checkpoint
from flashllm.models import forward, threads, weights
from flashllm.models.config import model_config
from flashllm.models.threads import for_each, threads_of
from flashllm.prune import calibrate
from flashllm.prune.statistics import Gram, Norms
from model_cases import write_checkpoint


def test_results_come_in_order_and_from_several_threads() -> None:
    pytest.importorskip("threadpoolctl")
    together = threading.Barrier(3, timeout=20)

    def work(part: int) -> int:
        if part < 3:
            together.wait()  # three at a time, or never
        return part * part

    assert for_each(work, range(7), threads=3) == [0, 1, 4, 9, 16, 25, 36]


def test_products_have_one_thread() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def limits(_: int) -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    assert for_each(limits, range(2), threads=2) == [{1}, {1}]


def test_errors_come_through() -> None:
    pytest.importorskip("threadpoolctl")
    with pytest.raises(ZeroDivisionError):
        for_each(lambda part: 1 // part, [1, 0, 1], threads=2)


def test_one_thread_where_there_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of("cupy") == 1
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert threads_of(np) == 1
    assert for_each(lambda part: threading.current_thread(), [1, 2], threads=1) == [threading.current_thread()] * 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_nothing_but_the_order_of_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(threads, "threads_of", lambda xp: count)
    monkeypatch.setattr(calibrate, "threads_of", lambda xp: count)
    with open_checkpoint(write_checkpoint(tmp_path / "model", "llama")) as checkpoint:
        config = model_config(checkpoint.config)
        block = weights.block(checkpoint, config, 0)
    hidden = np.random.default_rng(0).standard_normal((5, 9, config.hidden)).astype(np.float32)
    want = forward.block(config, block.small, hidden, forward.multiply_by(block.linears))
    before = hidden.copy()
    grams, norms = (calibrate.observe(config, block, hidden, kind) for kind in (Gram, Norms))
    np.testing.assert_array_equal(hidden, before)
    x = forward._rms_norm(hidden, block.small["input_layernorm.weight"], config.norm_eps).reshape(-1, config.hidden)
    np.testing.assert_allclose(grams["self_attn.k_proj"].matrix(), x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norms["self_attn.v_proj"].norms(), np.linalg.norm(x, axis=0), rtol=1e-5)
    again = calibrate.observe(config, block, hidden, Gram)
    for name, gram in grams.items():
        np.testing.assert_array_equal(gram.matrix(), again[name].matrix())
    calibrate.advance(config, block, hidden)
    np.testing.assert_allclose(hidden, want, rtol=1e-5, atol=1e-5)
    assert {part.stop - part.start for part in forward.parts_of(hidden, count)} <= {-(-5 // count)}
