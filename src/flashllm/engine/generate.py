# SPDX-License-Identifier: Apache-2.0
"""From a model on disk to text: opening its files, loading its weights, and generating the text of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from flashllm.engine.communicator import Communicator
from flashllm.engine.engine import PREFILL_ROWS, Engine, check_prompt, check_sizes
from flashllm.engine.prompts import is_list, pad_rows
from flashllm.engine.runtime import Runtime
from flashllm.engine.sampling import SamplingOptions
from flashllm.engine.shard import WHOLE, Shard
from flashllm.engine.streaming import TextStream
from flashllm.engine.weights import CheckpointSource, PackedSource, Source, Weights, load
from flashllm.errors import ArgumentError, FlashLLMError, FormatError, MissingDependencyError, brief
from flashllm.formats.base import DType
from flashllm.formats.check import is_int
from flashllm.io.checkpoint import Checkpoint, open_checkpoint
from flashllm.io.fingerprint import fingerprint
from flashllm.io.hf_directory import MAX_CONFIG_BYTES
from flashllm.io.safetensors_file import read_json
from flashllm.io.sparse_model import SparseModel, is_sparse_model
from flashllm.models.config import ModelConfig
from flashllm.models.packed import UnpackedModel
from flashllm.models.tokenizer import Tokenizer, load_tokenizer
from flashllm.progress import Advance, ignore

if TYPE_CHECKING:
    from typing_extensions import Self

_GENERATION_NAME = "generation_config.json"
_EOS = "eos_token_id"


@dataclass(frozen=True, kw_only=True)
class ModelText:
    """How a model's tokens map to text and back."""

    vocab: int
    stop_tokens: tuple[int, ...]
    """The tokens that end a text, according to the model's files."""
    tokenizer: Tokenizer | None
    problem: FlashLLMError | None = None
    """Why there is no tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, including those that the tokenizer puts before any text.

        Raises ``FormatError`` or ``MissingDependencyError`` without a tokenizer that fits the model.
        """
        if self.tokenizer is None:
            raise self.problem or MissingDependencyError("the model has no tokenizer")
        found = [*self.tokenizer.prefix, *self.tokenizer.encode(text).ids]
        if max(found, default=0) >= self.vocab:
            expected = f"one with the model's vocabulary of {self.vocab}"
            raise FormatError(field="tokenizer", expected=expected, got=f"token {max(found)}")
        return found


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model whose weights are on a device."""

    weights: Weights
    text: ModelText
    runtime: Runtime


class ModelFiles:
    """A model on disk: what is known before its weights are read. Use in a ``with`` statement.

    ``path`` is a directory written by ``flashllm convert``, a Hugging Face directory, or a ``.gguf`` file.
    """

    def __init__(self, path: str | Path, *, dtype: DType | None = None, dense: bool = False) -> None:
        """``dtype``: the type of weights and activations, by default as stored (fp16 where that is wider). ``dense``:
        expand packed matrices, zeros included; others are dense anyway.

        Raises ``ArgumentError``, ``FormatError`` and ``OSError`` as opening a checkpoint does.
        """
        packed = SparseModel(path) if is_sparse_model(path) else None
        self._checkpoint: Checkpoint = open_checkpoint(path) if packed is None else UnpackedModel(packed)
        try:
            self._source: Source = (
                CheckpointSource(self._checkpoint, dtype=dtype) if packed is None else PackedSource(packed, dense=dense)
            )
            if dtype not in (None, self._source.dtype):
                expected = f"{self._source.dtype}, as the weights are packed"
                raise ArgumentError("dtype", expected=expected, got=str(dtype))
            self.config: ModelConfig = self._source.config
            self.text: ModelText = _text(self._checkpoint, self.config)
        except BaseException:
            self._checkpoint.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._checkpoint.close()

    @property
    def fingerprint(self) -> str:
        """Identifies the model, as :func:`flashllm.io.fingerprint.fingerprint` does."""
        return fingerprint(self._checkpoint)

    def load(self, runtime: Runtime, *, shard: Shard = WHOLE, advance: Advance = ignore) -> LoadedModel:
        """Read the weights, or those of ``shard``. Raises what :func:`flashllm.engine.weights.load` does."""
        with runtime.active():
            weights = load(self._source, runtime.xp, shard=shard, advance=advance)
        return LoadedModel(weights=weights, text=self.text, runtime=runtime)


def open_model(
    path: str | Path,
    *,
    runtime: Runtime,
    dtype: DType | None = None,
    dense: bool = False,
    shard: Shard = WHOLE,
    advance: Advance = ignore,
) -> LoadedModel:
    """Load the model at ``path`` onto the device of ``runtime``; :class:`ModelFiles` explains the other arguments."""
    with ModelFiles(path, dtype=dtype, dense=dense) as files:
        return files.load(runtime, shard=shard, advance=advance)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> None:
    """Raise ``ArgumentError`` for prompts that the model cannot continue as far as requested. Needs no weights."""
    for index, (prompt, one) in enumerate(zip(prompts, options, strict=True)):
        check_prompt(
            prompt,
            f"prompts[{index}]",
            vocab=config.vocab,
            capacity=config.positions,
            new_tokens=one.max_new_tokens,
        )
    check_sizes(config, batch=len(prompts), capacity=_room(prompts, options))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The newest output of one sequence."""

    sequence: int
    token: int | None
    """None for text that was still held back at the end."""
    text: str
    """Empty inside a character, for a stop token, and without a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How long a batch took."""

    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    """New tokens of each sequence, including a stop token."""
    first_token_seconds: float
    """Time until the first token of every sequence was on the host, which includes reading all prompts."""
    step_seconds: tuple[float, ...]
    """Time of each later step, which adds a token to every unfinished sequence. The first prepares the others."""

    @property
    def token_seconds(self) -> float | None:
        """Mean time per output token of a sequence; None before there was more than one step."""
        steps = self.step_seconds[1:]
        return sum(steps) / len(steps) if steps else None

    @property
    def seconds(self) -> float:
        """Total time."""
        return self.first_token_seconds + sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences, divided by the total time."""
        return sum(self.new_tokens) / self.seconds


class Generation:
    """The text of a batch as it is generated: iterate over it once, then read the attributes."""

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[Sequence[int]],
        options: Sequence[SamplingOptions],
        *,
        stop_tokens: Sequence[int],
        communicator: Communicator | None,
    ) -> None:
        self.prompts = [[int(token) for token in prompt] for prompt in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        """New tokens of each sequence."""
        self.texts = [""] * len(prompts)
        """Text of the new tokens of each sequence."""
        self._options, self._stops = options, frozenset(stop_tokens)
        self._tokenizer = model.text.tokenizer
        self._seconds: list[float] = []
        self._engine = Engine(
            model.weights,
            model.runtime,
            batch=len(prompts),
            capacity=_room(prompts, options),
            prefill_rows=pad_rows(sum(map(len, prompts)), PREFILL_ROWS),  # memory for wider passes would be wasted
            stop_tokens=stop_tokens,
            communicator=communicator,
        )

    def __iter__(self) -> Iterator[Piece]:
        if self._seconds:
            raise ArgumentError("generation", expected="one iteration", got="a second one")
        tokenizer = self._tokenizer
        streams = [] if tokenizer is None else [TextStream(tokenizer, prompt) for prompt in self.prompts]
        for found in self._timed_steps():
            for sequence, token in found:
                self.tokens[sequence].append(token)
                text = streams[sequence].push(token) if streams and token not in self._stops else ""
                yield self._piece(sequence, token, text)
        for sequence, stream in enumerate(streams):
            if rest := stream.finish():
                yield self._piece(sequence, None, rest)

    @property
    def report(self) -> Report:
        """Times of what has been iterated over, without the time that the caller's loop spends on the pieces."""
        if not self._seconds:
            raise ArgumentError("generation", expected="one that has been iterated over", got="nothing so far")
        return Report(
            prompt_tokens=tuple(map(len, self.prompts)),
            new_tokens=tuple(map(len, self.tokens)),
            first_token_seconds=self._seconds[0],
            step_seconds=tuple(self._seconds[1:]),
        )

    def stopped(self, sequence: int) -> bool:
        """Whether a stop token has ended ``sequence``, rather than the limit on new tokens."""
        return bool(self.tokens[sequence]) and self.tokens[sequence][-1] in self._stops

    def _piece(self, sequence: int, token: int | None, text: str) -> Piece:
        self.texts[sequence] += text
        return Piece(sequence=sequence, token=token, text=text)

    def _timed_steps(self) -> Iterator[list[tuple[int, int]]]:
        steps = self._engine.stream(self.prompts, self._options)
        while True:
            began = time.perf_counter()
            found = next(steps, None)
            if found is None:
                return
            self._seconds.append(time.perf_counter() - began)
            yield found


def generate_text(
    model: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    options: SamplingOptions | Sequence[SamplingOptions],
    *,
    stop_tokens: Sequence[int] | None = None,
    communicator: Communicator | None = None,
) -> Generation:
    """Set up a batch of prompts, each a text or tokens; iterating over the result generates their continuations.

    ``options``: one for all prompts, or one for each. ``stop_tokens``: by default those of the model.
    ``communicator``: for a shard of a model, that of its group, whose ranks all generate the same text. Memory is
    allocated here. Raises ``ArgumentError`` for prompts that the model cannot continue, ``DeviceMemoryError``, and what
    :meth:`ModelText.encode` does.
    """
    if not is_list(prompts):
        raise ArgumentError("prompts", expected="a sequence of texts or of tokens", got=brief(prompts))
    encoded = [model.text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    each = [options] * len(encoded) if isinstance(options, SamplingOptions) else list(options)
    if len(each) != len(encoded):
        raise ArgumentError("options", expected=f"{len(encoded)}, one for each prompt", got=str(len(each)))
    check_prompts(model.weights.config, encoded, each)
    stops = model.text.stop_tokens if stop_tokens is None else stop_tokens
    return Generation(model, encoded, each, stop_tokens=stops, communicator=communicator)


def _room(prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> int:
    """Tokens of the longest sequence once it is complete; 1 if there are no sequences."""
    return max((len(prompt) + one.max_new_tokens for prompt, one in zip(prompts, options, strict=True)), default=1)


def _text(checkpoint: Checkpoint, config: ModelConfig) -> ModelText:
    tokenizer, problem = None, None
    try:
        tokenizer = load_tokenizer(checkpoint)
    except (FormatError, MissingDependencyError) as error:
        problem = error
    stops = _stop_tokens(checkpoint, config.vocab)
    return ModelText(vocab=config.vocab, stop_tokens=stops, tokenizer=tokenizer, problem=problem)


def _stop_tokens(checkpoint: Checkpoint, vocab: int) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json or, if that has none, of config.json: one token or several.

    For a GGUF file it is ``tokenizer.ggml.eos_token_id``. Numbers outside the model's vocabulary are ignored.
    """
    place = checkpoint.companions().get(_GENERATION_NAME)
    settings = {} if place is None else read_json(place, most_bytes=MAX_CONFIG_BYTES)
    found = settings.get(_EOS)
    path = place or checkpoint.path
    if found is None:
        found, path = checkpoint.config.get(_EOS), checkpoint.path
    several = found if isinstance(found, list) else [] if found is None else [found]
    if not all(is_int(token) for token in several):
        raise FormatError(field=_EOS, expected="a token, or a list of tokens", got=brief(found), path=str(path))
    return tuple(dict.fromkeys(token for token in several if 0 <= token < vocab))
