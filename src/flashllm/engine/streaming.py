# SPDX-License-Identifier: Apache-2.0
"""Turns tokens into text while more tokens are still being generated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

_INCOMPLETE = "\ufffd"
"""What a decoder outputs for bytes that do not form a character, such as the first half of one."""
_LONGEST_CHARACTER = 4  # in bytes, and so at most in tokens
_CONTEXT = 8  # tokens that are decoded again with the next ones: the end of a prompt, or tokens without text


class Decoder(Protocol):
    """What :class:`TextStream` needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class TextStream:
    """Turns tokens, one after another, into pieces of text.

    A token may end in the middle of a character; its text is then held back until the character is complete. For
    byte-level tokens the joined pieces equal the text of all tokens decoded at once, whatever their bytes. A new token
    causes only a few others to be decoded again: those held back and those of the previous piece, since the text of a
    token may depend on the one before it (the first word of a text has no leading space).

    After a ``prompt`` the pieces are what the text of all tokens adds to that of the prompt. A character that the
    prompt breaks off comes whole once it is complete; the text that stands for its first bytes until then is not
    repeated.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._context: list[int] = []
        self._context_length = 0
        self._held: list[int] = []
        self._known = ""  # the part of the text held back that the prompt's text already has
        for token in self._end_of(prompt):
            self.push(token)
        self._known = self._text(self._held)

    def push(self, token: int) -> str:
        """The text that this token adds for certain; may be empty."""
        self._held.append(token)
        text = self._text(self._held)
        if text.endswith(_INCOMPLETE):
            return self._new(self._settled(len(text))) if len(self._held) >= _LONGEST_CHARACTER else ""
        if text:
            self._context = self._held
        elif self._context_length == 0:  # a leading space may decode to nothing, yet it changes the next token's text
            self._context = [*self._context, *self._held][-_CONTEXT:]
        self._context_length = len(self._decode(self._context))
        self._held = []
        return self._new(text)

    def finish(self) -> str:
        """The rest of the text: what was held back, complete or not. Another text may follow."""
        text = self._new(self._text(self._held))
        self._context, self._context_length, self._held, self._known = [], 0, [], ""
        return text

    def _end_of(self, prompt: Sequence[int]) -> Sequence[int]:
        """The last tokens of a prompt, from the beginning of a character on: if they began inside one, some decoders
        would give no text for any byte up to the next token that is not a byte. The whole prompt if none is near.
        """
        for count in range(_CONTEXT, min(_CONTEXT + _LONGEST_CHARACTER, len(prompt))):
            text = self._decode(prompt[-count:])
            if text and not text.startswith(_INCOMPLETE):
                return prompt[-count:]
        return prompt

    def _new(self, text: str) -> str:
        """The part of the next ``text`` that is not already known from the prompt."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, self._known, strict=False)))
        self._known = self._known[same:] if same == len(text) else ""
        return text[same:]

    def _text(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` when they follow the context."""
        return self._decode([*self._context, *ids])[self._context_length :]

    def _settled(self, length: int) -> str:
        """Text of those held-back tokens whose bytes cannot become characters, whatever follows.

        Where a character may still continue across a cut between two tokens, the two sides decoded separately give more
        than the ``length`` that they have together.
        """
        for cut in range(len(self._held) - 1, 0, -1):
            settled = self._text(self._held[:cut])
            if len(settled) + len(self._text(self._held[cut:])) == length:
                self._held = self._held[cut:]
                return settled
        return ""
