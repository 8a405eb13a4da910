# SPDX-License-Identifier: Apache-2.0
"""Text while its tokens are still coming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"
"""What a decoder gives for bytes that are no character, such as the first half of one."""
_LONGEST_CHARACTER = 4  # bytes, so tokens


class Decoder(Protocol):
    """What :class:`TextStream` needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class TextStream:
    """Turns one token after the other into pieces of text.

    A token may end amid a character: its text is held back until the character is complete. For byte-level tokens the
    pieces, joined, are the text of all tokens at once, whatever bytes they are. With a new token only a few are decoded
    again: those held back, and those of the piece before, as the text of a token may depend on the one in front of it
    (the first word of a text has no space there).
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._decode = tokenizer.decode
        self._context: list[int] = []
        self._context_length = 0
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """What the text has more, for certain, with this token; may be empty."""
        self._held.append(token)
        text = self._text(self._held)
        if text.endswith(_INCOMPLETE):
            return self._settled(len(text)) if len(self._held) >= _LONGEST_CHARACTER else ""
        if text:  # what has no text, such as a special token, is no context either
            self._context = self._held
            self._context_length = len(self._decode(self._context))
        self._held = []
        return text

    def finish(self) -> str:
        """The rest of the text: what was held back, complete or not. Another text may follow."""
        text = self._text(self._held)
        self._context, self._context_length, self._held = [], 0, []
        return text

    def _text(self, ids: Sequence[int]) -> str:
        """The text of tokens behind the context."""
        return self._decode([*self._context, *ids])[self._context_length :]

    def _settled(self, length: int) -> str:
        """Text of the tokens held back whose bytes will not become characters, whatever comes.

        A place between tokens where a character may still go on is one where the two sides, decoded apart, give more
        than their ``length`` together.
        """
        for cut in range(len(self._held) - 1, 0, -1):
            settled = self._text(self._held[:cut])
            if len(settled) + len(self._text(self._held[cut:])) == length:
                self._held = self._held[cut:]
                return settled
        return ""
