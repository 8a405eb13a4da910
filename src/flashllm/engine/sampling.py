# SPDX-License-Identifier: Apache-2.0
"""How tokens are chosen: the options, and a NumPy version of cuda/decoder/sample.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.decoder.sample import SampleState
from flashllm.errors import ArgumentError, brief
from flashllm.formats.check import is_int
from flashllm.formats.sources import is_cupy

_MOST_INT32 = 2**31 - 1
_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the tokens of one sequence are chosen. Raises ``ArgumentError`` for values out of their ranges."""

    temperature: float = 0.0
    """Divides the logits; 0: always take the token with the largest one."""
    top_k: int = 0
    """Draw only from the tokens with the ``top_k`` largest logits, and any that tie with the last of them; 0: all."""
    top_p: float = 1.0
    """Of these, only the fewest that reach this share of the probability, and any that tie with the last; 1: all."""
    seed: int = 0
    """0..2^64 - 1. Equal seeds draw the same noise."""
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        most = float(np.finfo(np.float32).max)
        if not _is_real(self.temperature) or not 0 <= self.temperature <= most:
            raise ArgumentError("temperature", expected="a finite number >= 0", got=brief(self.temperature))
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise ArgumentError("top_p", expected="a number above 0 and up to 1", got=brief(self.top_p))
        for name, least, most_int in (
            ("top_k", 0, _MOST_INT32),
            ("seed", 0, 2**64 - 1),
            ("max_new_tokens", 1, _MOST_INT32),
        ):
            value = getattr(self, name)
            if not is_int(value) or not least <= value <= most_int:
                raise ArgumentError(name, expected=f"an integer in {least}..{most_int}", got=brief(value))


def write_options(state: SampleState, options: Sequence[SamplingOptions]) -> None:
    """Write the limits and parameters of every row of ``state``, from one of ``options`` each.

    Stop tokens belong to the whole state and are not written. Raises ``ArgumentError`` unless there are as many options
    as rows, none with more new tokens than ``output`` has room for.
    """
    batch, capacity = state.output.shape
    if len(options) != batch:
        raise ArgumentError("options", expected=f"{batch}, one for each row", got=str(len(options)))
    longest = max(one.max_new_tokens for one in options)
    if longest > capacity:
        raise ArgumentError("max_new_tokens", expected=f"at most {capacity}, the room for them", got=str(longest))
    for array, values in (
        (state.limits, [one.max_new_tokens for one in options]),
        (state.temperature, [one.temperature for one in options]),
        (state.top_k, [one.top_k for one in options]),
        (state.top_p, [one.top_p for one in options]),
        (state.seeds, [one.seed for one in options]),
    ):
        host = np.array(values, array.dtype)
        if is_cupy(array):
            array.set(host)
        else:
            array[...] = host


def choose(logits: NDArray[Any], options: SamplingOptions, count: int) -> int:
    """The token that the kernel chooses after ``count`` others, from logits [vocab], computed here in float64.

    The two may differ only where rounding decides. :func:`flashllm.decoder.sample.sample` says how NaN and infinities
    are treated.
    """
    values = np.asarray(logits, np.float64)
    tokens = np.flatnonzero(~np.isnan(values))
    if tokens.size == 0:
        return 0
    values = values[tokens]
    greedy = int(values.argmax())
    largest = values[greedy]
    temperature, top_p = float(np.float32(options.temperature)), float(np.float32(options.top_p))
    if temperature < np.finfo(np.float32).tiny or not math.isfinite(largest):
        return int(tokens[greedy])
    scores = (values - largest) / temperature
    least = -math.inf
    if 0 < options.top_k < values.size:
        least = np.partition(values, -options.top_k)[-options.top_k]
    if top_p < 1:
        falling = np.argsort(-values, kind="stable")[: np.count_nonzero(values >= least)]
        shares = np.cumsum(np.exp(scores[falling]))
        least = values[falling[np.searchsorted(shares, top_p * shares[-1])]]
    scores = np.where(values >= least, scores + noise(options.seed, count, len(logits))[tokens], -math.inf)
    return int(tokens[scores.argmax()])


def noise(seed: int, count: int, vocab: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [vocab] for the token after ``count`` others; that of token ``t`` depends on no other."""
    counters = np.zeros((-(-vocab // 4), 4), np.uint32)
    counters[:, 0] = np.arange(len(counters))
    counters[:, 1] = count
    words = philox(counters, seed).reshape(-1)[:vocab]
    uniform: NDArray[np.float64] = np.minimum((words + 0.5) * 2.0**-32, 1 - 2.0**-24)
    drawn: NDArray[np.float64] = -np.log(-np.log1p(-uniform))
    return drawn


def philox(counters: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Four random words for each counter of four words [..., 4]: Philox4x32-10, as in cuda/flashllm/philox.cuh."""
    words = counters.astype(np.uint32)
    keys = np.array([key & 0xFFFFFFFF, key >> 32], np.uint32)
    for _ in range(_ROUNDS):
        products = words[..., ::2] * _MULTIPLIERS
        high, low = (products >> np.uint64(32)).astype(np.uint32), products.astype(np.uint32)
        mixed = high[..., ::-1] ^ words[..., 1::2] ^ keys
        words = np.stack((mixed[..., 0], low[..., 1], mixed[..., 1], low[..., 0]), axis=-1)
        keys = keys + _KEY_STEPS
    return words


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
