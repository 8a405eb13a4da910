# SPDX-License-Identifier: Apache-2.0
"""Whole models in an engine on the CPU: kernels on the emulator, most products by NumPy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_cases import (
    CAPACITY,
    CASES,
    DIVISIBLE,
    PREFILL_ROWS,
    Model,
    check,
    greedy,
    make_model,
    preload,
    random_prompts,
)
from flashllm.engine.communicator import CommunicationError, ThreadGroup
from flashllm.engine.engine import Engine
from flashllm.engine.runtime import HostRuntime
from flashllm.engine.sampling import SamplingOptions
from flashllm.engine.shard import Shard
from flashllm.formats.base import DType

Made = Callable[[str, DType], Model]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    preload()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind, dtype: make_model(root / f"{kind}-{dtype}", kind, dtype))


@pytest.fixture(scope="module")
def engine(made: Made) -> Engine:
    """An engine for a small model, for tests of what an engine does with any model."""
    weights = made("llama", "fp16").load(np, None)
    return Engine(weights, HostRuntime("reference"), batch=3, capacity=CAPACITY, prefill_rows=PREFILL_ROWS)


@pytest.mark.parametrize(("kind", "dtype", "format"), CASES)
def test_against_float64(made: Made, kind: str, dtype: DType, format: str | None) -> None:
    """Prompts of one token, and of more tokens than a prefill pass has."""
    model = made(kind, dtype)
    runtime = HostRuntime("reference")
    engine = Engine(model.load(np, format), runtime, batch=3, capacity=CAPACITY, prefill_rows=PREFILL_ROWS)
    check(engine, model, random_prompts(), greedy())


def test_products_on_the_emulator(made: Made) -> None:
    model = made("llama", "fp16")
    weights = model.load(np, "tiled-csl")
    engine = Engine(weights, HostRuntime("emulator"), batch=2, capacity=CAPACITY, prefill_rows=8)
    check(engine, model, random_prompts((5, 3)), greedy((3, 2)))


def test_positions_in_several_splits(made: Made) -> None:
    model = made("mistral", "fp16")
    engine = Engine(model.load(np, None), HostRuntime("reference"), batch=2, capacity=200, prefill_rows=70)
    assert engine._plan.splits > 1
    check(engine, model, random_prompts((126, 3)), greedy((5, 3)))


def test_no_more_steps_than_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    real = engine.step

    def step() -> None:
        nonlocal steps
        steps += 1
        real()

    monkeypatch.setattr(engine, "step", step)
    outputs = engine.generate(random_prompts(), greedy((5, 2, 1)), look_every=3)
    assert steps == 4
    steps = 0
    assert engine.generate(random_prompts(), greedy((1, 1, 1)), look_every=3) == [one[:1] for one in outputs]
    assert steps == 0


def test_stop_tokens_end_a_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(random_prompts(), greedy())
    stops = (whole[0][2], whole[1][0])
    wanted = [one[: next((i + 1 for i, token in enumerate(one) if token in stops), len(one))] for one in whole]
    assert [len(one) for one in wanted[:2]] == [3, 1]
    weights, runtime = engine.weights, engine.runtime
    stopping = Engine(weights, runtime, batch=3, capacity=CAPACITY, stop_tokens=stops)
    assert stopping.generate(random_prompts(), greedy(), look_every=2) == wanted
    streamed: list[list[int]] = [[], [], []]
    fetched: list[int] = []
    real = runtime.fetch

    def fetch(array: Any) -> Any:
        fetched.append(array.size)
        return real(array)

    monkeypatch.setattr(runtime, "fetch", fetch)
    for pieces in stopping.stream(random_prompts(), greedy()):
        assert pieces
        for index, token in pieces:
            streamed[index].append(token)
    assert streamed == wanted
    assert fetched == [2 * 3] * max(map(len, wanted))  # once for each step, and only its own tokens


def test_what_is_drawn_depends_on_prompt_and_seed_alone(engine: Engine) -> None:
    def options(*seeds: int) -> list[SamplingOptions]:
        return [SamplingOptions(temperature=1.5, top_k=40, top_p=0.95, seed=s, max_new_tokens=3) for s in seeds]

    first, second, third = random_prompts()
    drawn = engine.generate([first, second, third], options(5, 6, 1 << 63))
    assert drawn == engine.generate([first, second, third], options(5, 6, 1 << 63))
    turned = engine.generate([third, first, third], options(1 << 63, 5, 8))
    assert turned[:2] == [drawn[2], drawn[0]]
    assert turned[2] != drawn[2]
    alone = Engine(engine.weights, engine.runtime, batch=1, capacity=16)
    assert alone.generate([second], options(6)) == [drawn[1]]


@pytest.mark.parametrize(
    ("kind", "dtype", "format", "count"), [("opt", "fp16", None, 4), ("qwen2", "bf16", "tiled-csl", 2)]
)
def test_parts_are_the_whole(tmp_path: Path, kind: str, dtype: DType, format: str | None, count: int) -> None:
    model = make_model(tmp_path / kind, kind, dtype, **DIVISIBLE[kind])
    model.load(np, format)  # converted before threads ask for it
    group = ThreadGroup(count)
    outputs: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            weights = model.load(np, format, shard=Shard(index=index, count=count))
            engine = Engine(
                weights,
                HostRuntime("reference"),
                batch=3,
                capacity=CAPACITY,
                prefill_rows=PREFILL_ROWS,
                communicator=group.members[index],
            )
            check(engine, model, random_prompts(), greedy())
            outputs[index] = engine.tokens(), engine.runtime.fetch(engine.logits)
        except BaseException as error:
            group.fail()
            outputs[index] = error
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in outputs.values():
        if isinstance(found, BaseException) and not isinstance(found, CommunicationError):
            raise found
    for tokens, logits in outputs.values():
        assert tokens == outputs[0][0]
        np.testing.assert_array_equal(logits, outputs[0][1])
