# SPDX-License-Identifier: Apache-2.0
"""Text files as windows of tokens, for calibration and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.io.files import read_utf8
from flashllm.models.tokenizer import Tokenizer

_MOST_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Sequences of equal length cut from a text, in the order of the text, without overlap."""

    tokens: NDArray[np.int64]
    """[sequences, tokens]; each begins with what the tokenizer puts in front of a text."""
    text_bytes: int
    """Bytes of the text that a model predicts: the text of all tokens but the first of each sequence."""


def read_text(path: str | Path, *, part: tuple[float, float] = (0.0, 1.0)) -> str:
    """``part`` of a UTF-8 file, as fractions of its characters. Raises ``FormatError``, ``FileNotFoundError``."""
    first, last = part
    if not 0.0 <= first < last <= 1.0:
        raise ArgumentError("part", expected="fractions a < b in 0..1", got=f"{first}:{last}")
    text = read_utf8(path, most_bytes=_MOST_BYTES)
    return text[int(first * len(text)) : int(last * len(text))]


def windows(tokenizer: Tokenizer, text: str, *, count: int, length: int) -> Windows:
    """``count`` windows of ``length`` tokens, spread evenly over ``text``.

    Raises ``ArgumentError`` if the text has fewer tokens than all windows need together.
    """
    fresh = length - len(tokenizer.prefix)
    if count < 1 or fresh < 2:
        raise ArgumentError(
            "length", expected="at least 2 tokens of text in at least 1 window", got=f"{count}x{length}"
        )
    found = tokenizer.encode(text)
    if len(found.ids) < count * fresh:
        expected = f"a text of at least {count * fresh} tokens, for {count} windows of {length}"
        raise ArgumentError("text", expected=expected, got=f"{len(found.ids)} tokens")
    spare = len(found.ids) - count * fresh
    begins = [i * fresh + i * spare // max(1, count - 1) for i in range(count)]
    ids, starts = np.array(found.ids, np.int64), (*found.starts, len(text))
    prefix = np.array(tokenizer.prefix, np.int64)
    tokens = np.stack([np.concatenate([prefix, ids[b : b + fresh]]) for b in begins])
    known = 0 if len(prefix) else 1  # tokens of the text that nothing predicts
    predicted = [text[starts[b + known] : starts[b + fresh]] for b in begins]
    return Windows(tokens=tokens, text_bytes=sum(len(piece.encode("utf-8")) for piece in predicted))


def split_batches(tokens: Any, *, at_once: int) -> list[slice]:
    """Slices of sequences with about ``at_once`` tokens each, at least one sequence."""
    rows = max(1, at_once // tokens.shape[1])
    return [slice(first, first + rows) for first in range(0, len(tokens), rows)]
