# SPDX-License-Identifier: Apache-2.0
"""An engine: prompts fill the cache, then each captured step adds one token to every sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.decoder.attention import MAX_ROWS, attention, check_capacity, check_heads, plan_attention
from flashllm.decoder.prefill import prefill_attention
from flashllm.decoder.sample import MOST_VOCAB, SampleState, sample
from flashllm.engine.arrays import empty
from flashllm.engine.communicator import Communicator
from flashllm.engine.forward import Activations, Forward, Kind, Operation, Residual, Rows, numpy_type, run
from flashllm.engine.kv_cache import KvCache
from flashllm.engine.prompts import Chunk, check_tokens, chunks_of, is_list, pad_rows
from flashllm.engine.runtime import Runtime
from flashllm.engine.sampling import SamplingOptions, write_options
from flashllm.engine.weights import Weights
from flashllm.errors import ArgumentError, brief
from flashllm.models.config import ModelConfig

PREFILL_ROWS = 2048
"""Maximum number of prompt tokens in one pass."""
_KERNEL_ROWS = 64
"""Maximum number of rows that product kernels compute at a time. For more rows they repeat in the same workspace;
for passes of hundreds of rows the matrix may be expanded, which takes another workspace."""


class Engine:
    """Decodes ``batch`` sequences of up to ``capacity`` tokens, prompt and output together.

    Allocates the cache, activations, logits and the memory that products need in addition to their operands. Not
    thread-safe.
    """

    def __init__(
        self,
        weights: Weights,
        runtime: Runtime,
        *,
        batch: int,
        capacity: int,
        stop_tokens: Sequence[int] = (),
        prefill_rows: int = PREFILL_ROWS,
        communicator: Communicator | None = None,
    ) -> None:
        """Raises ``ArgumentError`` for sizes that the model does not support, and ``DeviceMemoryError``."""
        config = weights.config
        check_sizes(config, batch=batch, capacity=capacity)
        if prefill_rows < 1:
            raise ArgumentError("prefill_rows", expected="a number >= 1", got=str(prefill_rows))
        check_tokens(stop_tokens, "stop_tokens", vocab=config.vocab)
        self.weights, self.runtime, self.batch, self.capacity = weights, runtime, batch, capacity
        self._prefill_rows = min(prefill_rows, batch * capacity)
        shard, xp = weights.shard, runtime.xp
        with runtime.active():
            kind = numpy_type(weights.dtype)
            self.cache = KvCache.create(xp, config, shard, slots=batch, capacity=capacity, dtype=kind)
            self.state = SampleState.create(xp, batch=batch, capacity=capacity, stop_tokens=stop_tokens)
            self._activations = Activations(xp, weights, max(batch, self._prefill_rows))
            self._last = Residual(xp, weights, batch)  # rows whose logits are needed, taken from larger passes
            self.logits = empty(xp, (batch, config.vocab), np.float32, "logits")
            """On the device: the logits from which the last token of each sequence was chosen."""
            self._slots = empty(xp, (batch,), np.int32, "slots")
            runtime.send(self._slots, np.arange(batch, dtype=np.int32))
            self._plan = plan_attention(
                rows=batch,
                heads=shard.heads(config),
                kv_heads=shard.kv_heads(config),
                head_dim=config.head_dim,
                capacity=capacity,
                sm_count=runtime.sm_count,
            )
            self._partials = empty(xp, (max(16, self._plan.workspace_bytes),), np.uint8, "workspace of attention")
            self._partials.fill(0)
            self._forward = Forward(runtime, weights, self.cache, communicator)
            matrices = [w for block in weights.blocks for w in block.matrices]
            runtime.products.reserve(matrices, (self._prefill_rows, min(self._prefill_rows, _KERNEL_ROWS), batch))
        self._communicator = communicator
        self._step: Callable[[], None] | None = None
        self._operations: list[Operation] | None = None
        self._begun = False

    @property
    def workspace_bytes(self) -> int:
        """Bytes allocated in addition to weights and cache."""
        arrays = (self.logits, self._slots, self._partials, *vars(self.state).values())
        own = sum(int(array.nbytes) for array in arrays)
        activations = self._activations.nbytes + self._last.nbytes
        return own + activations + self._forward.nbytes + self.runtime.products.workspace_bytes

    def start(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> None:
        """Read the prompts, one for each sequence of the batch, and choose the first token of each.

        Raises ``ArgumentError`` for a prompt that is empty, has tokens outside the model's vocabulary, or is too long
        together with the new tokens that ``options`` request.
        """
        self._check_prompts(prompts, options)
        self._begun = False  # until all prompts are read, the cache belongs neither to the old ones nor to the new ones
        runtime, state, last = self.runtime, self.state, self._last
        with runtime.active():
            write_options(state, options)
            for array in (state.counts, state.finished):
                array.fill(0)
            runtime.send(state.positions, np.array([len(prompt) for prompt in prompts], np.int32))
            for chunk in chunks_of(prompts, self._prefill_rows):
                a = self._prefill(chunk)
                if chunk.ends:
                    slots, ends = (runtime.xp.asarray(one) for one in zip(*chunk.ends, strict=True))
                    last.residual[slots] = a.residual[ends]
                    last.y[:, slots] = a.y[:, ends]
            self._forward.prepare_head(self.batch)
            run(self._forward.head(last, self.logits))
            sample(runtime.launch, logits=self.logits, state=state, advance_positions=False)
        self._begun = True

    def step(self) -> None:
        """Add one token to every sequence that has not ended. Does not wait for the result."""
        if not self._begun:
            raise ArgumentError("engine", expected="prompts before steps: start()", got="none")
        with self.runtime.active():
            if self._step is None:
                operations = self.decode_operations()
                run(operations)  # uncaptured: kernels are loaded when they first run
                self._step = self.runtime.capture(partial(run, operations))
                return
            self._step()

    def decode_operations(self, kinds: Sequence[Kind] | None = None) -> list[Operation]:
        """The launches of a decoding step; with ``kinds``, only those of these kinds, to time them separately."""
        if self._operations is None:
            self._forward.prepare(self.batch)
            self._forward.prepare_head(self.batch)
            state, a = self.state, self._activations.first(self.batch)
            rows = Rows(tokens=state.tokens, positions=state.positions, slots=self._slots)
            attend = partial(
                attention,
                self.runtime.launch,
                self._plan,
                dtype=self.weights.dtype,
                slots=self._slots,
                positions=state.positions,
                workspace=self._partials,
            )
            draw = partial(sample, self.runtime.launch, logits=self.logits, state=state)
            self._operations = [
                *self._forward.blocks(rows, a, attend),
                *self._forward.head(a, self.logits),
                Operation(kind="other", run=draw),
            ]
        return [one for one in self._operations if kinds is None or one.kind in kinds]

    def counts(self) -> tuple[NDArray[np.int32], bool]:
        """How many tokens each sequence has so far, and whether all have ended. Raises ``CommunicationError``."""
        finished, counts = self._fetch(self.state.finished), self._fetch(self.state.counts)
        return counts, bool(finished.all())

    def tokens(self) -> list[list[int]]:
        """The tokens of each sequence so far. Raises ``CommunicationError``."""
        counts, output = self._fetch(self.state.counts), self._fetch(self.state.output)
        return [row[:count].tolist() for row, count in zip(output, counts, strict=True)]

    def generate(
        self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions], *, look_every: int = 16
    ) -> list[list[int]]:
        """All tokens that follow each prompt. Every ``look_every`` steps it checks whether all sequences have ended."""
        self.start(prompts, options)
        longest = max(one.max_new_tokens for one in options)
        for first in range(1, longest, look_every):
            if self._fetch(self.state.finished).all():
                break
            for _ in range(first, min(first + look_every, longest)):
                self.step()
        return self.tokens()

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield the new tokens after every step, as pairs of sequence and token."""
        self.start(prompts, options)
        ended = np.zeros(self.batch, np.bool_)
        for place in count():  # index of the step's tokens in the output: every unfinished sequence gets one
            with self.runtime.active():
                found = self.runtime.xp.stack((self.state.output[:, place], self.state.finished))
            tokens, finished = self._fetch(found)
            yield [(int(i), int(tokens[i])) for i in np.flatnonzero(~ended)]
            ended = finished != 0
            if ended.all():
                return
            self.step()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Logits [tokens, vocab] after every token of each sequence; the sequences are read like prompts."""
        self._check_prompts(sequences, None)
        config, runtime = self.weights.config, self.runtime
        found = [np.empty((len(one), config.vocab), np.float32) for one in sequences]
        self._begun = False  # from now on the cache holds these sequences
        with runtime.active():
            for chunk in chunks_of(sequences, self._prefill_rows):
                a = self._prefill(chunk)
                for first in range(0, chunk.rows, self.batch):
                    part = self._slice(a, first, min(self.batch, chunk.rows - first))
                    rows = part.x.shape[0]
                    self._forward.prepare_head(rows)
                    run(self._forward.head(part, self.logits[:rows]))
                    logits = self._fetch(self.logits[:rows])
                    for i in range(rows):
                        slot, position = chunk.slots[first + i], chunk.positions[first + i]
                        found[slot][position] = logits[i]
        return found

    def _prefill(self, chunk: Chunk) -> Activations:
        """Run the blocks over a chunk of prompts."""
        runtime, xp = self.runtime, self.runtime.xp
        rows = pad_rows(chunk.rows, self._prefill_rows)
        chunk = chunk.padded(rows)
        arrays = []
        for values in (chunk.tokens, chunk.positions, chunk.slots, chunk.starts):
            array = empty(xp, values.shape, np.int32, "rows of prompts")
            runtime.send(array, values)
            arrays.append(array)
        tokens, positions, slots, starts = arrays
        self._forward.prepare(rows)
        a = self._activations.first(rows)
        attend = partial(
            prefill_attention,
            runtime.launch,
            dtype=self.weights.dtype,
            slots=slots,
            positions=positions,
            starts=starts,
            longest=chunk.longest,
        )
        run(self._forward.blocks(Rows(tokens=tokens, positions=positions, slots=slots), a, attend))
        return a

    def _fetch(self, array: Any) -> NDArray[Any]:
        """A host copy of what steps have written. Checks that the group has not failed, since replays do not."""
        found = self.runtime.fetch(array)
        if self._communicator is not None:
            self._communicator.check()
        return found

    def _slice(self, a: Activations, first: int, rows: int) -> Residual:
        """Copies of some rows in aligned arrays, valid until the next call."""
        part = self._last.first(rows)
        part.residual[...] = a.residual[first : first + rows]
        part.y[:, :rows] = a.y[:, first : first + rows]
        return part

    def _check_prompts(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions] | None) -> None:
        vocab = self.weights.config.vocab
        least = 1 if options is None else self.batch
        if not is_list(prompts):
            raise ArgumentError("prompts", expected="a sequence of sequences of tokens", got=brief(prompts))
        if not least <= len(prompts) <= self.batch:
            expected = f"{self.batch} of them" if least == self.batch else f"1..{self.batch} of them"
            raise ArgumentError("prompts", expected=expected, got=str(len(prompts)))
        if options is not None and len(options) != len(prompts):
            raise ArgumentError("options", expected=f"{len(prompts)}, one for each prompt", got=str(len(options)))
        for index, prompt in enumerate(prompts):
            new = 0 if options is None else options[index].max_new_tokens
            check_prompt(prompt, f"prompts[{index}]", vocab=vocab, capacity=self.capacity, new_tokens=new)


def check_sizes(config: ModelConfig, *, batch: int, capacity: int) -> None:
    """Raise ``ArgumentError`` for a batch or capacity that the model does not support, or sizes that no kernel has."""
    check_heads(config.heads, config.kv_heads, config.head_dim)
    if config.vocab > MOST_VOCAB:
        raise ArgumentError("vocab", expected=f"at most {MOST_VOCAB} tokens", got=str(config.vocab))
    if not 1 <= batch <= MAX_ROWS:
        raise ArgumentError("batch", expected=f"1..{MAX_ROWS}", got=str(batch))
    if not 1 <= capacity <= config.positions:
        expected = f"1..{config.positions}, the positions of the model, for prompt and output together"
        raise ArgumentError("capacity", expected=expected, got=str(capacity))
    check_capacity(capacity, config.head_dim)


def check_prompt(prompt: Sequence[int], name: str, *, vocab: int, capacity: int, new_tokens: int) -> None:
    """Raise ``ArgumentError`` for a prompt, called ``name``, that is not a sequence of the model's tokens, is empty, or
    is too long once ``new_tokens`` follow it.
    """
    check_tokens(prompt, name, vocab=vocab)
    if not len(prompt):
        raise ArgumentError(name, expected="at least one token", got="none")
    if len(prompt) + new_tokens > capacity:
        expected = f"at most {capacity} tokens, prompt and output together"
        raise ArgumentError(name, expected=expected, got=f"{len(prompt)} + {new_tokens}")
