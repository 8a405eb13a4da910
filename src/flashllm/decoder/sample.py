# SPDX-License-Identifier: Apache-2.0
"""The next token of every sequence from its logits: host side of cuda/decoder/sample.cu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashllm.decoder.arrays import check, check_optional
from flashllm.decoder.launcher import Launch
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec

MOST_VOCAB = 1 << 23
"""The most logits of a row: the sum of that many weights of at most 2^40 fits in 64 bits."""

_SPEC = KernelSpec(name="sample", source="decoder/sample.cu", function="flashllm::sample", threads=1024)


@dataclass(frozen=True, kw_only=True)
class SampleState:
    """Where the sequences of a batch [B] stand and how their tokens are drawn, on the device: one graph serves any."""

    tokens: Any
    """int32 [B]: input of the next step."""
    positions: Any
    """int32 [B]: position of that input."""
    counts: Any
    """int32 [B]: tokens in ``output`` so far."""
    limits: Any
    """int32 [B]: the most there may be; a limit beyond the capacity of ``output`` means that capacity."""
    finished: Any
    """int32 [B]: 1 once a stop token has come or the limit is reached; such a row no longer changes."""
    output: Any
    """int32 [B, capacity]: the tokens of each sequence, a stop token included."""
    temperature: Any
    """fp32 [B]; 0 (or a subnormal number) takes the token with the largest logit."""
    top_k: Any
    """int32 [B]: how many tokens with the largest logits take part, with all equal to the last of them; 0: all."""
    top_p: Any
    """fp32 [B]: the fewest tokens that together have this share of the probability, after temperature and top-k, take
    part, with all equal to the last of them; 1: all."""
    seeds: Any
    """uint64 [B]: what a sequence draws depends on its seed, count and logits alone."""
    stops: Any
    """int32 [stop tokens]: the same for all sequences; may be empty."""

    @classmethod
    def create(cls, xp: Any, *, batch: int, capacity: int, stop_tokens: Sequence[int] = ()) -> SampleState:
        """Arrays of ``xp`` (``numpy`` or ``cupy``): nothing emitted so far, greedy, limits of ``capacity`` tokens."""
        for name, size in (("batch", batch), ("capacity", capacity)):
            if size < 1:
                raise ArgumentError(name, expected="a number >= 1", got=str(size))
        return cls(
            tokens=xp.zeros(batch, np.int32),
            positions=xp.zeros(batch, np.int32),
            counts=xp.zeros(batch, np.int32),
            limits=xp.full(batch, capacity, np.int32),
            finished=xp.zeros(batch, np.int32),
            output=xp.zeros((batch, capacity), np.int32),
            temperature=xp.zeros(batch, np.float32),
            top_k=xp.zeros(batch, np.int32),
            top_p=xp.ones(batch, np.float32),
            seeds=xp.zeros(batch, np.uint64),
            stops=xp.asarray(np.array(stop_tokens, np.int32)),
        )


def sample(launch: Launch, *, logits: Any, state: SampleState, advance_positions: bool = True) -> None:
    """Draw one more token for every sequence of ``state`` that is not finished, from logits [B, vocab] (fp32).

    The token goes into ``output``; unless it ends the sequence, it also goes into ``tokens``, and the position advances
    by one (not without ``advance_positions``: after a prompt the engine has set it). NaN never wins against a number,
    and the lowest token wins among equal logits; a row of nothing but NaN gives token 0. Where the largest logit is
    infinite the draw is greedy. Raises ``ArgumentError``.
    """
    batch, vocab = check("logits", logits, ("batch", "vocab"), "fp32")
    if vocab > MOST_VOCAB:
        raise ArgumentError("logits", expected=f"rows of at most {MOST_VOCAB} logits", got=str(vocab))
    _, capacity = check("output", state.output, (batch, "capacity"), "int32")
    for name in ("tokens", "positions", "counts", "limits", "finished", "top_k"):
        check(name, getattr(state, name), (batch,), "int32")
    for name in ("temperature", "top_p"):
        check(name, getattr(state, name), (batch,), "fp32")
    check("seeds", state.seeds, (batch,), "uint64")
    n_stops = int(state.stops.size)  # an empty array may have no address
    args = (
        logits,
        np.int32(vocab),
        state.tokens,
        state.positions,
        state.counts,
        state.limits,
        state.finished,
        state.output,
        np.int32(capacity),
        state.temperature,
        state.top_k,
        state.top_p,
        state.seeds,
        check_optional("stops", state.stops if n_stops else None, (n_stops,), "int32"),
        np.int32(n_stops),
        np.int32(advance_positions),
    )
    launch(_SPEC, (batch,), args)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    return [_SPEC]
