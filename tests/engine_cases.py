# SPDX-License-Identifier: Apache-2.0
"""Two blocks of every kind of model in an engine, against float64, for the emulator and for a GPU alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm import decoder
from flashllm.backends import emulator
from flashllm.convert.run import convert
from flashllm.engine.engine import Engine
from flashllm.engine.sampling import SamplingOptions
from flashllm.engine.shard import WHOLE, Shard
from flashllm.engine.weights import CheckpointSource, PackedSource, Source, Weights, load
from flashllm.formats.base import DType
from flashllm.formats.sources import to_host
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.sparse_model import SparseModel
from flashllm.models import quality
from flashllm.models.dense import DenseModel
from model_cases import VOCAB, write_checkpoint

Logits = NDArray[np.float64]

# Head sizes that kernels have; sizes of hidden states and feed-forward layers that are not multiples of 8.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "opt": {"hidden_size": 40, "num_attention_heads": 5},
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 16},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24},
    "qwen3": {"num_attention_heads": 2, "head_dim": 40},
}
DIVISIBLE: Mapping[str, Mapping[str, Any]] = {
    "opt": {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 60},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 50},
}
"""Sizes that divide among two GPUs, those of OPT also among four."""
CASES: tuple[tuple[str, DType, str | None], ...] = (
    ("opt", "fp16", None),
    ("opt", "bf16", "tiled-csl"),
    ("llama", "fp16", "tiled-csl"),
    ("llama", "bf16", None),
    ("mistral", "fp16", "bitmap"),
    ("mistral", "bf16", None),
    ("qwen2", "fp16", "slot24"),
    ("qwen2", "bf16", "bitmap"),
    ("qwen3", "fp16", None),
    ("qwen3", "bf16", "slot24"),
)
"""Kind of model, type, and format of its weights, or None for dense ones."""
LENGTHS = (7, 1, 12)
NEW_TOKENS = (5, 3, 4)
PREFILL_ROWS = 9
CAPACITY = 40
_NAN = 0x7FDA  # in fp16 and bf16
_AGREE = 2.0  # the largest error of logits may be this many times that of dense products alone, as in `flashllm eval`


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a model should compute."""

    exact: DenseModel
    """In float64."""
    narrow: DenseModel
    """In fp32, except for 16-bit operands and results of products with the blocks' matrices."""

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Float64 logits after each of ``tokens``: [T, vocab]."""
        return _logits(self.exact, tokens)

    def bound(self, sequences: Sequence[Sequence[int]]) -> float:
        """The largest error that an engine's logits of these may have."""
        errors = [quality.largest_difference(_logits(self.narrow, one), self.logits(one)) for one in sequences]
        return _AGREE * max(errors)


@dataclass(frozen=True, kw_only=True)
class Model(Reference):
    """A random model on disk."""

    path: Path

    def load(self, xp: Any, format: str | None, *, shard: Shard = WHOLE) -> Weights:
        """Its weights in a format, or dense."""
        if format is not None:
            out = self.path.with_name(f"{self.path.name}-{format}")
            if not out.exists():
                convert(self.path, out, format=format)
            return load(PackedSource(SparseModel(out)), xp, shard=shard)
        with open_checkpoint(self.path) as checkpoint:
            source: Source = CheckpointSource(checkpoint)
            return load(source, xp, shard=shard)


def make_model(path: Path, kind: str, dtype: DType, **config: Any) -> Model:
    """A model of one of ``model_cases.KINDS`` with 70 % zeros; its head is not the embedding, else it would repeat."""
    stored = {"fp16": "F16", "bf16": "BF16"}[dtype]
    write_checkpoint(path, kind, dtype=stored, tied=False, zeros=0.7, **(config or SIZES[kind]))
    checkpoint = open_checkpoint(path)
    exact, narrow = DenseModel(checkpoint, dtype=np.float64), DenseModel(checkpoint, narrow=dtype)
    return Model(path=path, exact=exact, narrow=narrow)


def preload() -> None:
    """Compile the kernels for the emulator together, faster than one by one; attention is left out, as few are used."""
    modules = [import_module(f"flashllm.decoder.{name}") for name in decoder.MODULES if "attention" not in name]
    emulator.preload([spec for module in modules for spec in module.specs()])


def random_prompts(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def greedy(new_tokens: Sequence[int] = NEW_TOKENS) -> list[SamplingOptions]:
    return [SamplingOptions(max_new_tokens=count) for count in new_tokens]


def poison(engine: Engine) -> None:
    """Fill with NaN everything that the engine has to write before it reads it."""
    keys_and_values = [array for layer in engine.cache.layers for array in layer]
    activations = [array for one in (engine._activations, engine._last) for array in vars(one).values()]
    for array in (*keys_and_values, *activations, engine.logits):
        array.view(np.uint16)[...] = _NAN


def decode(engine: Engine, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> list[Logits]:
    """Logits after every prompt and after each generated token except the last: [tokens, vocab]."""
    engine.start(prompts, options)
    steps = [engine.runtime.fetch(engine.logits)]
    for _ in range(max(one.max_new_tokens for one in options) - 1):
        engine.step()
        steps.append(engine.runtime.fetch(engine.logits))
    counts, done = engine.counts()
    assert done
    return [np.stack([step[i] for step in steps[:count]]).astype(np.float64) for i, count in enumerate(counts)]


def check(
    engine: Engine, model: Reference, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]
) -> list[list[int]]:
    """Logits, whether the tokens are read as a prompt or one by one, are as near to float64 as with dense 16-bit
    products; tokens have the largest float64 logit, unless the two largest are nearer to each other than that. Returns
    each prompt with its output.
    """
    poison(engine)
    decoded = decode(engine, prompts, options)
    outputs = engine.tokens()
    assert [len(one) for one in outputs] == [one.max_new_tokens for one in options]
    assert len({token for one in outputs for token in one}) > len(outputs), "models that repeat themselves show little"
    sequences = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    bound = model.bound(sequences)
    assert 0 < bound < np.inf
    poison(engine)
    scored = engine.score(sequences)
    for prompt, output, steps, scores in zip(prompts, outputs, decoded, scored, strict=True):
        wanted = model.logits([*prompt, *output])
        error = quality.largest_difference(scores, wanted)
        assert error <= bound, f"logits of a prompt: {error} off, at most {bound}"
        behind = slice(len(prompt) - 1, len(prompt) - 1 + len(output))
        error = quality.largest_difference(steps, wanted[behind])
        assert error <= bound, f"logits of steps: {error} off, at most {bound}"
        assert quality.largest_difference(steps, scores[behind]) <= bound
        for token, logits in zip(output, wanted[behind], strict=True):
            first, second = np.sort(logits)[:-3:-1]
            assert token == logits.argmax() or first - second <= bound
    return sequences


def _logits(model: DenseModel, tokens: Sequence[int]) -> Logits:
    return _computed(model, tuple(tokens))


@lru_cache(maxsize=16)  # a case needs the same sequences several times
def _computed(model: DenseModel, tokens: tuple[int, ...]) -> Logits:
    hidden, outside = quality.run_blocks(model, model.xp.asarray([tokens]))
    parts = [to_host(part) for _, part in quality.head(model, outside, hidden[0])]
    return np.concatenate(parts).astype(np.float64)
