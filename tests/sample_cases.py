# SPDX-License-Identifier: Apache-2.0
"""Logits and options whose next tokens are known, for the kernel on a GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.decoder.launcher import Launch
from flashllm.decoder.sample import SampleState, sample
from flashllm.engine.sampling import SamplingOptions, choose, write_options

PHILOX = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
"""Counters, keys and words of philox4x32 with 10 rounds, from the authors' file kat_vectors of Random123."""

TOKENS = 10
"""The most tokens that a case generates."""
NAN, INF = float("nan"), float("inf")
SPECIAL: tuple[tuple[tuple[float, ...], int], ...] = (
    ((1, 3, 2, 3, 3), 1),
    ((-0.0, 0.0, -1), 0),
    ((NAN, -2, NAN, -1), 3),
    ((NAN, NAN, NAN), 0),
    ((NAN, -INF, -INF), 1),
    ((-INF, -INF, -INF, -INF), 0),
    ((1, INF, 5, INF), 1),
    ((-INF, -3e38, NAN), 1),
    ((7,), 0),
)
"""Rows and their tokens; at any temperature, if at most one logit is finite or one is infinite."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of logits."""

    vocab: int
    options: SamplingOptions
    spread: float = 3.0
    """Standard deviation of the logits."""
    step: float = 0.0
    """Logits are multiples of this, so that many are equal; 0: they are not rounded."""

    def logits(self) -> NDArray[np.float32]:
        """[vocab], the same every time."""
        logits = np.random.default_rng(self.vocab).standard_normal(self.vocab) * self.spread
        if self.step:
            logits = np.round(logits / self.step) * self.step
        return logits.astype(np.float32)


def case(vocab: int, temperature: float, top_k: int = 0, top_p: float = 1.0, *, tokens: int = 3, **more: float) -> Case:
    """A case with a seed of its own, of 64 bits."""
    seed = 0xFEDCBA98_00000000 + vocab * 977 + top_k
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_new_tokens=tokens)
    return Case(vocab=vocab, options=options, **more)


CASES = (
    case(1, 0.0),
    case(67, 0.0),
    case(5003, 0.0, top_k=3),
    case(1, 1.0, top_k=1, top_p=0.5),
    case(66, 1.5),
    case(5003, 0.7),
    case(5003, 0.7, top_k=50),
    case(5004, 1.3, top_k=1),
    case(67, 2.0, top_k=67),
    case(5003, 0.7, top_p=0.9),
    case(5004, 0.01, top_p=0.99),
    case(67, 1.0, top_p=1e-7),
    case(5003, 1.1, top_k=50, top_p=0.8),
    case(5003, 5.0, top_k=2000, top_p=0.9),  # more than threads: first the whole row is searched, then candidates
    case(9001, 1.0, top_p=0.95, spread=0.01),  # no candidates: the largest of each thread do not suffice
    case(12001, 1.0, top_k=5, spread=0.5, step=4.0),  # too many candidates, all equal
    case(12002, 1.0, top_k=3000, top_p=0.6, spread=0.5, step=0.25),
    case(300, 1.0, top_k=7, top_p=0.7, step=1.0),
    # Few tokens are kept, equally probable, and all are drawn: one too many or too few would be noticed.
    case(302, 100.0, top_k=3, tokens=TOKENS),
    case(302, 100.0, top_p=3.5 / 302, tokens=TOKENS),
    case(302, 100.0, top_k=6, top_p=0.6, tokens=TOKENS),
    case(6002, 100.0, top_k=3, tokens=TOKENS),
    case(6002, 100.0, top_p=3.5 / 6002, tokens=TOKENS),
    case(6002, 100.0, top_k=6, top_p=0.6, tokens=TOKENS),
)
LARGE_CASES = tuple(
    case(vocab, *options)
    for vocab in (32000, 50257, 152064)
    for options in ((0.0,), (1.0,), (0.8, 50), (0.8, 0, 0.95), (1.2, 200, 0.9), (4.0, 0, 0.99), (1.0, 20000))
)
"""For a GPU."""


def expected(one: Case) -> list[int]:
    """Its first tokens, with the same logits in every step."""
    return [choose(one.logits(), one.options, count) for count in range(one.options.max_new_tokens)]


def is_close(one: Case) -> bool:
    """Whether two tokens are so close, or ``top_p`` so close to a boundary, that rounding might change the choice."""
    options = one.options
    nudged = [replace(options, temperature=options.temperature * factor) for factor in (1 - 1e-5, 1 + 1e-5)]
    if options.top_p < 1:
        nudged += [replace(options, top_p=min(options.top_p * factor, 1 - 1e-7)) for factor in (1 - 1e-5, 1 + 1e-5)]
    return any(expected(replace(one, options=other)) != expected(one) for other in nudged)


@dataclass(frozen=True, kw_only=True)
class Fenced:
    """A state whose output lies between rows that no kernel may touch."""

    state: SampleState
    memory: Any

    def output(self) -> NDArray[np.int32]:
        """What is there now, [B, capacity]; fails if anything around it has changed."""
        memory: NDArray[np.int32] = self.memory if isinstance(self.memory, np.ndarray) else self.memory.get()
        assert (memory[0] == -7).all()
        assert (memory[-1] == -7).all()
        return memory[1:-1]


def fenced(xp: Any, options: Sequence[SamplingOptions], *, capacity: int, stops: Sequence[int] = ()) -> Fenced:
    """A state for ``options``, its output full of -7; positions are 100 times the row, tokens -1."""
    batch = len(options)
    state = SampleState.create(xp, batch=batch, capacity=capacity, stop_tokens=stops)
    memory = xp.full((batch + 2, capacity), -7, np.int32)
    state = replace(
        state,
        output=memory[1:-1],
        tokens=xp.full(batch, -1, np.int32),
        positions=xp.arange(batch, dtype=np.int32) * 100,
    )
    write_options(state, options)
    return Fenced(state=state, memory=memory)


def check_rows(launch: Launch, xp: Any, cases: Sequence[Case]) -> None:
    """The tokens of cases of one vocabulary, in one batch, are those of the reference."""
    logits = xp.asarray(np.stack([one.logits() for one in cases]))
    rows = fenced(xp, [one.options for one in cases], capacity=TOKENS + 1)
    steps = max(one.options.max_new_tokens for one in cases)
    for _ in range(steps + 1):  # the last finds all finished
        sample(launch, logits=logits, state=rows.state)
    for row, one in zip(rows.output(), cases, strict=True):
        assert not is_close(one), one
        want = expected(one)
        assert row.tolist() == want + [-7] * (TOKENS + 1 - len(want)), one
