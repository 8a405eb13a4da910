# SPDX-License-Identifier: Apache-2.0
"""The next token on the CPU: the choices of the reference, and a step changes nothing that it should not."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.decoder.sample import SampleState, sample, specs
from flashllm.engine.sampling import SamplingOptions, philox
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec
from sample_cases import CASES, PHILOX, SPECIAL, Case, check_rows, fenced

BY_VOCAB = [list(cases) for _, cases in groupby(sorted(CASES, key=lambda one: one.vocab), lambda one: one.vocab)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    emulator.preload(specs())


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def copies(state: SampleState) -> dict[str, NDArray[Any]]:
    return {field.name: getattr(state, field.name).copy() for field in fields(state)}


def test_philox_gives_the_published_words() -> None:
    counters, keys, want = (
        np.array([words(text) for text in column], np.uint32) for column in zip(*PHILOX, strict=True)
    )
    rng = np.random.default_rng(0)
    counters = np.concatenate((counters, rng.integers(0, 1 << 32, (61, 4), np.uint64).astype(np.uint32)))
    keys = np.concatenate((keys, rng.integers(0, 1 << 32, (61, 2), np.uint64).astype(np.uint32)))
    got = np.zeros((64, 4), np.uint32)
    spec = KernelSpec(name="philox", source="philox.cu", function="philox_words", threads=64)
    emulator.launch(spec, (1,), (counters, keys, got), build=emulator.BuildOptions(source_root=Path(__file__).parent))
    np.testing.assert_array_equal(got[: len(want)], want)
    for counter, (low, high), drawn in zip(counters, keys, got, strict=True):
        np.testing.assert_array_equal(philox(counter, int(high) << 32 | int(low)), drawn)


@pytest.mark.parametrize("cases", BY_VOCAB, ids=lambda cases: str(cases[0].vocab))
def test_tokens_are_those_of_the_reference(cases: list[Case]) -> None:
    check_rows(partial(emulator.launch, seed=cases[0].vocab), np, cases)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_infinity_and_equal_logits(temperature: float) -> None:
    for row, token in SPECIAL:
        if temperature and sum(np.isfinite(row)) > 1 and max(row) < np.inf:
            continue
        options = SamplingOptions(temperature=temperature, top_k=2, top_p=0.9, max_new_tokens=1)
        rows = fenced(np, [options], capacity=1)
        sample(emulator.launch, logits=np.array([row], np.float32), state=rows.state)
        assert rows.output().tolist() == [[token]], row


def test_nan_is_never_drawn() -> None:
    logits = np.full((4, 70), np.nan, np.float32)
    logits[:, [3, 21, 69]] = 1, 0.5, -np.inf
    filters = ((0, 1.0), (40, 1.0), (0, 0.999), (69, 0.999))
    options = [SamplingOptions(temperature=1.0, top_k=k, top_p=p, max_new_tokens=8, seed=k) for k, p in filters]
    rows = fenced(np, options, capacity=8)
    for _ in range(8):
        sample(emulator.launch, logits=logits, state=rows.state)
    assert set(rows.output().reshape(-1).tolist()) == {3, 21}


def test_what_a_sequence_draws_is_its_own() -> None:
    """It depends on the seed, but neither on the batch nor on the schedule of the threads."""
    one = next(one for one in CASES if one.vocab == 5003 and one.options.top_k and one.options.top_p < 1)
    other = SamplingOptions(seed=1, max_new_tokens=3, temperature=2.0)
    drawn = []
    for seed, options in enumerate(([one.options], [other, one.options, other])):
        rows = fenced(np, options, capacity=3)
        logits = np.stack([one.logits()] * len(options))
        for _ in range(3):
            sample(partial(emulator.launch, seed=seed), logits=logits, state=rows.state)
        drawn.append(rows.output().tolist())
    assert drawn[0][0] == drawn[1][1]
    assert drawn[1][0] == drawn[1][2] != drawn[1][1]


@pytest.mark.parametrize("advance", [True, False])
def test_a_step_of_a_batch(advance: bool) -> None:
    """Rows: one that goes on, a stop token, the last token, one that was finished, one without room, none to emit."""
    logits = np.zeros((6, 40), np.float32)
    logits[np.arange(6), [11, 12, 13, 14, 15, 16]] = 1
    rows = fenced(np, [SamplingOptions(max_new_tokens=5)] * 6, capacity=5, stops=(2, 12))
    state = rows.state
    state.counts[:] = 2, 2, 4, 2, 5, 0
    state.limits[:] = 5, 5, 5, 5, 9, 0
    state.finished[3] = 1
    before = copies(state)
    launch = partial(emulator.launch, dependent=tuple(getattr(state, field.name) for field in fields(state)))
    sample(launch, logits=logits, state=state, advance_positions=advance)
    after = copies(state)
    want = before["output"].copy()
    want[0, 2], want[1, 2], want[2, 4] = 11, 12, 13
    np.testing.assert_array_equal(rows.output(), want)
    assert after["counts"].tolist() == [3, 3, 5, 2, 5, 0]
    assert after["finished"].tolist() == [0, 1, 1, 1, 1, 1]
    assert after["tokens"].tolist() == [11, -1, -1, -1, -1, -1]
    assert after["positions"].tolist() == [int(advance), 100, 200, 300, 400, 500]
    for name in ("limits", "temperature", "top_k", "top_p", "seeds", "stops"):
        np.testing.assert_array_equal(after[name], before[name])


def test_many_stop_tokens() -> None:
    rows = fenced(np, [SamplingOptions(max_new_tokens=2)] * 2, capacity=2, stops=[*range(100, 1600), 5])
    logits = np.zeros((2, 9), np.float32)
    logits[0, 5] = logits[1, 6] = 1
    sample(emulator.launch, logits=logits, state=rows.state)
    assert rows.state.finished.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("logits", np.zeros((2, 9))),
        ("output", np.zeros((3, 4), np.int32)),
        ("tokens", np.zeros(3, np.int32)),
        ("positions", np.zeros(2, np.int64)),
        ("counts", np.zeros(4, np.int32)[::2]),
        ("temperature", np.zeros(2)),
        ("seeds", np.zeros(2, np.int64)),
        ("stops", np.zeros(2, np.int64)),
    ],
)
def test_arrays_that_do_not_fit(name: str, array: NDArray[Any]) -> None:
    state = SampleState.create(np, batch=2, capacity=4)
    logits = np.zeros((2, 9), np.float32)
    if name == "logits":
        logits = array
    else:
        state = replace(state, **{name: array})
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        sample(emulator.launch, logits=logits, state=state)


def test_a_state_has_room_for_a_token() -> None:
    for batch, capacity in ((0, 1), (1, 0)):
        with pytest.raises(ArgumentError, match="a number >= 1"):
            SampleState.create(np, batch=batch, capacity=capacity)
