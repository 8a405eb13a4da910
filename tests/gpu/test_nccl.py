# SPDX-License-Identifier: Apache-2.0
"""Gathers by NCCL on real GPUs: on one, and on two where there are two."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine_cases
import rank_cases
from flashllm.device import device_count
from flashllm.engine.engine import Engine
from flashllm.engine.nccl import NcclCommunicator
from flashllm.engine.processes import launch_ranks
from flashllm.engine.products import GpuProducts
from flashllm.engine.rendezvous import Place, meet
from flashllm.engine.runtime import GpuRuntime
from flashllm.errors import ArgumentError

SCRIPT = str(Path(rank_cases.__file__).resolve())
SOON = 10.0
"""Seconds from the death of one rank to the end of all ranks."""


@pytest.fixture
def communicator(cp: Any) -> Iterator[NcclCommunicator]:
    """A communicator of one rank."""
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("NCCL does not load")
    made = NcclCommunicator(meet(Place()))
    yield made
    made.leave()


@pytest.fixture
def two_gpus() -> None:
    count, _ = device_count()
    if count < 2:
        pytest.skip(f"needs 2 GPUs, there are {count}")


def test_one_rank_gathers_in_a_graph(communicator: NcclCommunicator) -> None:
    rank_cases.check_gathers(communicator, rank=0, count=1)


def test_the_null_stream_is_refused(cp: Any, communicator: NcclCommunicator) -> None:
    with pytest.raises(ArgumentError, match="the null stream"):
        communicator.all_gather(cp.zeros((1, 8), np.float16))


def test_one_rank_decodes(
    cp: Any, communicator: NcclCommunicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gathers of one part in every pass, also in captured steps: the same bits as an engine without gathers."""
    # Which cuBLAS algorithm is the fastest may differ from run to run, and with it the last bits of the logits.
    monkeypatch.setattr(GpuProducts, "_fastest", lambda self, key, weights: self._default(key))
    model = engine_cases.make_model(tmp_path / "model", "qwen2", "bf16", **engine_cases.DIVISIBLE["qwen2"])
    prompts, weights = engine_cases.random_prompts(), model.load(cp, "tiled-csl")
    logits = []
    for member in (communicator, None):
        engine = Engine(weights, GpuRuntime(), batch=len(prompts), capacity=engine_cases.CAPACITY, communicator=member)
        engine_cases.check(engine, model, prompts, engine_cases.greedy())
        logits.append(engine_cases.decode(engine, prompts, engine_cases.greedy()))
    for one, other in zip(*logits, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("two_gpus")
def test_two_ranks_gather(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks(2, [sys.executable, SCRIPT, "gathers"]) == 0, capfd.readouterr().err


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("format", ["dense", "tiled-csl", "bitmap"])
@pytest.mark.parametrize(("kind", "dtype"), [("opt", "fp16"), ("opt", "bf16"), ("qwen2", "fp16"), ("qwen2", "bf16")])
def test_two_ranks_decode_as_one(
    kind: str, dtype: str, format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, SCRIPT, "engine", str(tmp_path), kind, dtype, format]
    assert launch_ranks(2, command) == 0, capfd.readouterr().err


@pytest.mark.usefixtures("two_gpus")
def test_a_killed_rank_ends_the_other() -> None:
    command = [sys.executable, SCRIPT, "killed"]
    code = f"import sys; from flashllm.engine.processes import launch_ranks; sys.exit(launch_ranks(2, {command!r}))"
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "replaying\n", launcher.communicate()[1]
    start = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - start < 1 + SOON  # it is killed after 1 s
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "Error: rank 1 has ended\nError: rank 1 of 2 was ended by signal 9, killed\n" in errors


@pytest.mark.usefixtures("two_gpus")
def test_an_exception_beside_a_captured_graph_ends_as_any_other(capfd: pytest.CaptureFixture[str]) -> None:
    """Its frames hold the graph, for which NCCL's abort waits: the process must not crash when Python ends."""
    start = time.monotonic()
    assert launch_ranks(2, [sys.executable, SCRIPT, "raised"]) == 1
    assert time.monotonic() - start < 60
    errors = capfd.readouterr().err
    assert "rank 1: ValueError: rank of this test\n" in errors
    assert errors.endswith("Error: rank 1 of 2 ended with status 1\n")
