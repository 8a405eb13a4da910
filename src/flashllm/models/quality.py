# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text: perplexity and bits per byte, whatever multiplies by its linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from flashllm.formats.sources import array_module
from flashllm.models import forward
from flashllm.models.config import ModelConfig
from flashllm.models.text import Windows
from flashllm.progress import Advance, ignore

_HEAD_TOKENS = 512  # rows of logits in memory together: [512, vocabulary]


class Model(Protocol):
    """A model that is read one block at a time, as NumPy or CuPy arrays."""

    config: ModelConfig
    xp: Any
    threads: int
    """How many threads may multiply by its matrices at the same time."""

    def outside(self) -> dict[str, Any]:
        """Embeddings, final norm and head, by their names in the checkpoint."""

    def block(self, layer: int) -> tuple[dict[str, Any], forward.Linear]:
        """Norms and biases of block ``layer``, and a function that multiplies by its matrices."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well the tokens of a text were predicted."""

    tokens: int
    """Number of predicted tokens."""
    nats: float
    """Sum of -log(probability) over them."""
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token; infinite if that does not fit a float."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; not finite if the nats are not, or if no byte was predicted."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.inf


def evaluate(model: Model, text: Windows, *, advance: Advance = ignore) -> Quality:
    """Predict every token of ``text`` but the first of each window."""
    xp = model.xp
    tokens = xp.asarray(text.tokens)
    nats = 0.0
    hidden, outside = run_blocks(model, tokens, advance=advance)
    rows = hidden[:, :-1].reshape(-1, model.config.hidden)
    targets = tokens[:, 1:].reshape(-1)
    for first, logits in head(model, outside, rows):
        largest = logits.max(axis=1)
        sums = xp.log(xp.exp(logits - largest[:, None]).sum(axis=1, dtype="float64")) + largest
        chosen = logits[xp.arange(len(logits)), targets[first : first + len(logits)]]
        nats += float((sums - chosen).sum())
    return Quality(tokens=int(targets.size), nats=nats, text_bytes=text.text_bytes)


def run_blocks(model: Model, tokens: Any, *, advance: Advance = ignore) -> tuple[Any, dict[str, Any]]:
    """Hidden states [S, T, hidden] of ``tokens`` [S, T] after all blocks, and the tensors outside of them."""
    outside = model.outside()
    hidden = forward.embed(model.config, outside, tokens)
    for layer in range(model.config.layers):
        advance(f"block {layer}", 0)
        small, linear = model.block(layer)
        forward.block_in_place(model.config, small, hidden, linear, threads=model.threads)
        advance(f"block {layer}", 1)
    return hidden, outside


def head(model: Model, outside: dict[str, Any], rows: Any) -> Iterator[tuple[int, Any]]:
    """Logits [R, vocabulary] of ``rows`` [T, hidden], some rows at a time, each time with the index of the first."""
    weight = outside[model.config.layout.head].T
    for first in range(0, len(rows), _HEAD_TOKENS):
        yield first, forward.final_norm(model.config, outside, rows[first : first + _HEAD_TOKENS]) @ weight


def largest_difference(left: Any, right: Any) -> float:
    """The largest |left - right| of two arrays of logits; infinite if either contains a NaN."""
    xp = array_module(left)
    found = float(xp.abs(left.astype("float64") - right).max())
    return found if math.isfinite(found) else math.inf
