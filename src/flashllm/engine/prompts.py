# SPDX-License-Identifier: Apache-2.0
"""Prompts: how they are checked, and how they fill the rows of passes, one after another without padding between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, brief
from flashllm.formats.check import is_int

_STEP = 64
"""The rows of a pass are a multiple of this, so that products are planned for only a few numbers of rows."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one pass; int32 arrays."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    starts: NDArray[np.int32]
    """Row of the first token of each sequence in the chunk, then the number of rows."""
    ends: tuple[tuple[int, int], ...]
    """Sequences that end here: slot, and row of the last token."""

    @property
    def rows(self) -> int:
        """Tokens in the chunk."""
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """Rows of the sequence that has the most of them here."""
        return int(np.diff(self.starts).max())

    def padded(self, rows: int) -> Chunk:
        """The same chunk with rows appended, at position -1, that belong to no sequence and change nothing."""
        more = rows - self.rows
        return replace(
            self,
            tokens=np.pad(self.tokens, (0, more)),
            positions=np.pad(self.positions, (0, more), constant_values=-1),
            slots=np.pad(self.slots, (0, more)),
        )


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` is a sequence, or an array, of anything; text does not count."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def check_tokens(tokens: object, name: str, *, vocab: int) -> None:
    """Raise ``ArgumentError`` unless ``tokens``, called ``name``, are a sequence of integers 0 to ``vocab - 1``.

    NumPy integers are accepted.
    """
    if not is_list(tokens):
        raise ArgumentError(name, expected="a sequence of tokens", got=brief(tokens))
    for token in tokens:
        if not (is_int(token) or isinstance(token, np.integer)) or not 0 <= token < vocab:
            raise ArgumentError(name, expected=f"tokens in 0..{vocab - 1}", got=brief(token))


def pad_rows(rows: int, most: int) -> int:
    """Rows, with padding, of the pass that computes ``rows`` of them."""
    return min(most, -(-rows // _STEP) * _STEP)


def chunks_of(prompts: Sequence[Sequence[int]], most: int) -> Iterator[Chunk]:
    """Passes of up to ``most`` rows; a prompt may continue in the next. Prompt ``i`` is in slot ``i``."""
    rows = [(slot, position, token) for slot, prompt in enumerate(prompts) for position, token in enumerate(prompt)]
    for first in range(0, len(rows), most):
        part = np.array(rows[first : first + most], np.int32)
        slots, positions, tokens = np.ascontiguousarray(part.T)
        begins = np.flatnonzero(np.diff(slots, prepend=-1))
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = np.flatnonzero(positions == lengths[slots] - 1)
        yield Chunk(
            tokens=tokens,
            positions=positions,
            slots=slots,
            starts=np.append(begins, len(part)).astype(np.int32),
            ends=tuple((int(slots[row]), int(row)) for row in ends),
        )
