# SPDX-License-Identifier: Apache-2.0
"""What an engine, its runtime and its products refuse, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashllm.backends import emulator
from flashllm.engine.communicator import CommunicationError, ThreadGroup
from flashllm.engine.engine import Engine, check_sizes
from flashllm.engine.products import GpuProducts, HostProducts
from flashllm.engine.runtime import HostRuntime, open_runtime
from flashllm.engine.sampling import SamplingOptions
from flashllm.engine.shard import Shard
from flashllm.engine.weights import CheckpointSource, Weights, load
from flashllm.errors import ArgumentError, DeviceMemoryError, MissingDependencyError, UnsupportedDeviceError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.checkpoint import open_checkpoint
from model_cases import VOCAB, write_checkpoint

needs_emulator = pytest.mark.skipif(emulator.available() is not None, reason="needs g++")
GREEDY = SamplingOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "m", "llama", head_dim=8)
    with open_checkpoint(path) as checkpoint:
        return load(CheckpointSource(checkpoint), np)


@pytest.fixture(scope="module")
def engine(weights: Weights) -> Engine:
    return Engine(weights, HostRuntime("reference"), batch=2, capacity=12)


def test_heads_that_no_kernel_is_made_for(weights: Weights) -> None:
    for head_dim in (6, 12, 264):
        with pytest.raises(ArgumentError, match=rf"^head_dim: expected a multiple of 8 up to 256, got {head_dim}"):
            check_sizes(replace(weights.config, head_dim=head_dim), batch=1, capacity=1)


@pytest.mark.parametrize(
    ("largest", "name"),
    [
        ({"vocab": 1 << 23}, "vocab"),
        ({"heads": 1 << 15, "kv_heads": 1}, "heads"),
        ({"batch": 65535}, "batch"),
        ({"head_dim": 8, "capacity": (1 << 28) - 1}, "capacity"),
        ({"head_dim": 80, "capacity": 26843545}, "capacity"),
        ({"head_dim": 256, "capacity": (1 << 23) - 1}, "capacity"),
    ],
)
def test_what_kernels_count_in_32_bits(weights: Weights, largest: dict[str, int], name: str) -> None:
    """A model may have more positions than that, and a larger vocabulary."""

    def check(sizes: dict[str, int]) -> None:
        own = {key: size for key, size in sizes.items() if key not in ("batch", "capacity")}
        config = replace(weights.config, positions=1 << 40, **own)
        check_sizes(config, batch=sizes.get("batch", 1), capacity=sizes.get("capacity", 1))

    check(largest)
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*\b{largest[name]}\b.*, got {largest[name] + 1}$"):
        check(largest | {name: largest[name] + 1})


@needs_emulator
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, r"^batch: expected 1\.\.65535, got 0"),
        ({"capacity": 0}, r"^capacity: expected 1\.\.320, the positions of the model"),
        ({"capacity": 321}, r"^capacity: expected 1\.\.320, the positions of the model.* got 321"),
        ({"prefill_rows": 0}, r"^prefill_rows: expected a number >= 1, got 0"),
        ({"stop_tokens": (3, VOCAB)}, r"^stop_tokens: expected tokens in 0\.\.100, got 101"),
        ({"stop_tokens": (3.0,)}, r"^stop_tokens: expected tokens in 0\.\.100, got 3\.0"),
        ({"stop_tokens": 3}, r"^stop_tokens: expected a sequence of tokens, got 3"),
        ({"stop_tokens": (-1,)}, r"^stop_tokens: "),
    ],
)
def test_sizes_that_the_model_cannot_have(weights: Weights, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Engine(weights, HostRuntime("reference"), **({"batch": 1, "capacity": 9} | options))


@needs_emulator
def test_a_shard_without_its_group(weights: Weights) -> None:
    shard = Shard(index=0, count=2)
    with pytest.raises(ArgumentError, match=r"^communicator: expected that of the group"):
        Engine(replace(weights, shard=shard), HostRuntime("reference"), batch=1, capacity=9)


@needs_emulator
def test_tokens_of_a_failed_group_are_not_given(weights: Weights) -> None:
    group = ThreadGroup(1)
    engine = Engine(weights, HostRuntime("reference"), batch=1, capacity=9, communicator=group.members[0])
    assert engine.tokens() == [[]]
    group.fail()
    for read in (engine.tokens, engine.counts, lambda: engine.score([[1]])):
        with pytest.raises(CommunicationError, match="another member of the group has ended"):
            read()


@needs_emulator
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1]], r"^prompts: expected 2 of them, got 1"),
        ([[1]] * 3, r"^prompts: expected 2 of them, got 3"),
        ([[1], []], r"^prompts\[1\]: expected at least one token, got none"),
        ([[1], [5, VOCAB]], r"^prompts\[1\]: expected tokens in 0\.\.100, got 101"),
        ([[-1, 50], [1]], r"^prompts\[0\]: expected tokens in 0\.\.100, got -1"),
        ([[1], [5, True]], r"^prompts\[1\]: expected tokens in 0\.\.100, got True"),
        ([[1], [5.0]], r"^prompts\[1\]: expected tokens in 0\.\.100, got 5\.0"),
        ([[1], ["5"]], r"^prompts\[1\]: expected tokens in 0\.\.100, got '5'"),
        ([np.array([1]), np.array([1.0])], r"^prompts\[1\]: expected tokens in 0\.\.100, got np.float64\(1\.0\)"),
        ([np.array([1]), np.array([True])], r"^prompts\[1\]: expected tokens in 0\.\.100, got np.True_"),
        ([[1], np.int32([[1]])], r"^prompts\[1\]: expected tokens in 0\.\.100, got array"),
        ([np.int64([1]), np.uint8([VOCAB])], r"^prompts\[1\]: expected tokens in 0\.\.100, got np.uint8\(101\)"),
        ([[1], 5], r"^prompts\[1\]: expected a sequence of tokens, got 5"),
        ([[1], "abc"], r"^prompts\[1\]: expected a sequence of tokens, got 'abc'"),
        ([[1], np.int32(3)], r"^prompts\[1\]: expected a sequence of tokens, got "),
        ("ab", r"^prompts: expected a sequence of sequences of tokens, got 'ab'"),
        (5, r"^prompts: expected a sequence of sequences of tokens, got 5"),
        ([[1], [1] * 9], r"^prompts\[1\]: expected at most 12 tokens, prompt and output together, got 9 \+ 4"),
    ],
)
def test_prompts_that_cannot_be_continued(engine: Engine, prompts: Sequence[Sequence[int]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine.start(prompts, [GREEDY] * 2)


@needs_emulator
def test_options_and_steps(engine: Engine) -> None:
    with pytest.raises(ArgumentError, match=r"^options: expected 2, one for each prompt, got 1"):
        engine.start([[1], [2]], [GREEDY])
    with pytest.raises(ArgumentError, match=r"^prompts: expected 1\.\.2 of them, got 3"):
        engine.score([[1]] * 3)
    with pytest.raises(ArgumentError, match=r"^prompts\[0\]: expected at most 12 tokens"):
        engine.score([[1] * 13])
    with pytest.raises(ArgumentError, match=r"^engine: expected prompts before steps"):
        engine.step()


def test_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")
    with pytest.raises(ArgumentError, match=r"^backend: expected emulator or reference, got 'cuda'"):
        HostRuntime("cuda")
    with pytest.raises(UnsupportedDeviceError, match="the driver reports no GPU"):
        open_runtime("cuda")
    monkeypatch.setattr(emulator, "available", lambda: "g++ is not there")
    for backend in (None, "emulator", "reference"):
        with pytest.raises(MissingDependencyError, match=r"g\+\+ is not there"):
            open_runtime(backend)


@pytest.mark.parametrize("kind", [np.float16, np.uint16])
def test_host_products_round_once(kind: Any) -> None:
    one = 0x3F80 if kind is np.uint16 else 1.0
    x, w = np.full((2, 64), one, kind), np.full((3, 64), one, kind)
    w[1] = 0
    y, wide = np.empty((2, 3), kind), np.empty((2, 3), np.float32)
    for out in (y, wide):
        HostProducts("reference").multiply(x, w, out)
    assert wide.tolist() == [[64, 0, 64]] * 2
    assert y.tolist() == ([[0x4280, 0, 0x4280]] * 2 if kind is np.uint16 else [[64, 0, 64]] * 2)


class Full(HostRuntime):
    """A device without memory for products of ``rows`` rows."""

    def __init__(self, rows: int) -> None:
        super().__init__("reference")
        self.products, self.rows = self, rows  # type: ignore[assignment]

    def reserve(self, matrices: Sequence[Any], rows: Sequence[int]) -> None:
        assert len(matrices) == 8
        if self.rows in rows:
            raise DeviceMemoryError("workspace of products", needed=2, free=1)


@needs_emulator
@pytest.mark.parametrize("rows", [2, 64, 80])
def test_an_engine_says_at_once_that_products_lack_memory(weights: Weights, rows: int) -> None:
    """For a step, the widest pass of prompts, and a pass that kernels compute: no prompt is needed to find out."""
    assert weights.config.layers == 2
    with pytest.raises(DeviceMemoryError, match="workspace of products"):
        Engine(weights, Full(rows), batch=2, capacity=40, prefill_rows=100)


class FakeCublas:
    """No GPU is needed to report that a product was not prepared."""

    def close(self) -> None:
        """There is nothing to release."""


def test_products_on_a_gpu_are_prepared_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.baselines.cublas.Cublas", FakeCublas)
    made = GpuProducts(SimpleNamespace(ptr=0), overlap=False)
    x, y, dense = np.zeros((3, 8), np.float16), np.zeros((3, 16), np.float16), np.ones((16, 8), np.float16)
    packed = TiledCSL.from_dense(dense)
    for w in (dense, packed):
        with pytest.raises(ArgumentError, match=r"^x: expected a number of rows that was prepared, got 3"):
            made.multiply(x, w, y)

    def plan(w: Any, rows: int) -> SimpleNamespace:
        return SimpleNamespace(expansion=None, workspace_bytes=100 - rows, scratch_bytes=10 * rows)

    taken: list[tuple[str, int]] = []
    monkeypatch.setattr("flashllm.matmul.plan", plan)
    monkeypatch.setattr(made, "_reserve", lambda name, size: taken.append((name, size)))
    made.reserve([dense, packed], [3, 5, 4])
    assert taken == [("kernels", 97), ("scratch", 50)]  # once: what graphs have captured cannot grow
    assert (len(made._plans), made._dense) == (3, {})  # no algorithm is timed for rows that may not come
    made.close()
