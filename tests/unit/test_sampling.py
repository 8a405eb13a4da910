# SPDX-License-Identifier: Apache-2.0
"""The sampling options, and the reference implementation that chooses tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.decoder.sample import SampleState
from flashllm.engine.sampling import SamplingOptions, choose, noise, philox, write_options
from flashllm.errors import ArgumentError
from sample_cases import PHILOX, SPECIAL

SHARES = np.array([0.0625, 0.5, 0.25, 0.0625, 0.125])


def drawn(logits: NDArray[Any], options: SamplingOptions, times: int) -> NDArray[np.int64]:
    """How often each token comes."""
    return np.bincount([choose(logits, options, count) for count in range(times)], minlength=len(logits))


def test_philox_gives_the_published_words() -> None:
    for counter, key, words in PHILOX:
        numbers = np.array([int(word, 16) for word in counter.split()], np.uint32)
        low, high = (int(word, 16) for word in key.split())
        assert " ".join(f"{word:08x}" for word in philox(numbers, high << 32 | low)) == words


def test_noise_has_the_gumbel_distribution() -> None:
    sorted_noise = np.sort(noise(3, 7, 100_000))
    distance = np.abs(np.exp(-np.exp(-sorted_noise)) - (np.arange(100_000) + 0.5) / 100_000).max()
    assert distance < 1.63 / np.sqrt(100_000)  # of Kolmogorov and Smirnov, at 1 %


def test_noise_of_a_token_is_its_own() -> None:
    np.testing.assert_array_equal(noise(5, 2, 11), noise(5, 2, 1000)[:11])
    different = [noise(5, 2, 9), noise(5, 3, 9), noise(6, 2, 9), noise(5 + (1 << 32), 2, 9)]
    assert len({float(value) for one in different for value in one}) == 36


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    shares = SHARES ** (1 / temperature)
    want = 2000 * shares / shares.sum()
    counts = drawn(np.log(SHARES) + 5, SamplingOptions(temperature=temperature, seed=1), 2000)
    assert ((counts - want) ** 2 / want).sum() < 13.3  # chi-square with 4 degrees of freedom, at 1 %


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (1, 1.0, {1}),
        (2, 1.0, {1, 2}),
        (4, 1.0, {0, 1, 2, 3, 4}),  # the fourth is tied with another
        (9, 1.0, {0, 1, 2, 3, 4}),
        (0, 0.01, {1}),
        (0, 0.49, {1}),
        (0, 0.74, {1, 2}),
        (0, 0.76, {1, 2, 4}),
        (0, 0.9, {0, 1, 2, 3, 4}),
        (2, 0.6, {1}),  # a share of what top-k leaves, of which token 1 has two thirds
        (2, 0.7, {1, 2}),
        (3, 0.8, {1, 2}),
    ],
)
def test_filters_keep(top_k: int, top_p: float, kept: set[int]) -> None:
    options = SamplingOptions(temperature=1.0, top_k=top_k, top_p=top_p, seed=9)
    logits = np.log(SHARES).astype(np.float32)
    assert set(np.flatnonzero(drawn(logits, options, 200))) == kept


def test_top_p_is_a_share_after_temperature() -> None:
    """At half the temperature token 1 has 0.25 of 0.335."""
    for temperature, kept in ((1.0, {1, 2}), (0.5, {1})):
        options = SamplingOptions(temperature=temperature, top_p=0.7)
        assert set(np.flatnonzero(drawn(np.log(SHARES), options, 200))) == kept


def test_nan_infinity_and_equal_logits() -> None:
    for row, token in SPECIAL:
        logits = np.array(row, np.float32)
        assert choose(logits, SamplingOptions(), 0) == token, row
        if sum(np.isfinite(row)) < 2 or max(row) == np.inf:
            assert choose(logits, SamplingOptions(temperature=1.0, top_k=2, top_p=0.5), 0) == token, row


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", 1 << 31),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 1 << 64),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        SamplingOptions(**{name: value})


def test_options_are_written_to_their_rows() -> None:
    state = SampleState.create(np, batch=2, capacity=9)
    first = SamplingOptions(temperature=0.5, top_k=3, top_p=0.25, seed=(1 << 64) - 1, max_new_tokens=9)
    write_options(state, [first, SamplingOptions(max_new_tokens=1)])
    assert state.limits.tolist() == [9, 1]
    assert state.temperature.tolist() == [0.5, 0]
    assert state.top_k.tolist() == [3, 0]
    assert state.top_p.tolist() == [0.25, 1]
    assert state.seeds.tolist() == [(1 << 64) - 1, 0]
    with pytest.raises(ArgumentError, match=r"^options: "):
        write_options(state, [first])
    with pytest.raises(ArgumentError, match=r"^max_new_tokens: "):
        write_options(state, [first, SamplingOptions(max_new_tokens=10)])
