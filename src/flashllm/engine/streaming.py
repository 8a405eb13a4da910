# SPDX-License-Identifier: Apache-2.0
"""Text while its tokens are still coming."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

_INCOMPLETE = "\ufffd"
"""What a decoder gives for bytes that are no character, such as the first half of one."""
_LONGEST_CHARACTER = 4  # bytes, so tokens
_CONTEXT = 8  # tokens that are decoded again with the first new ones: of a prompt, and of what has no text


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

    Behind a ``prompt`` the pieces are what the text of all tokens has more than the prompt's. A character that the
    prompt breaks off comes whole once it is complete; what stands for its first bytes until then does not come again.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._context: list[int] = []
        self._context_length = 0
        self._held: list[int] = []
        self._known = ""  # of the text held back, what the prompt's has already
        for token in self._end_of(prompt):
            self.push(token)
        self._known = self._text(self._held)

    def push(self, token: int) -> str:
        """What the text has more, for certain, with this token; may be empty."""
        self._held.append(token)
        text = self._text(self._held)
        if text.endswith(_INCOMPLETE):
            return self._new(self._settled(len(text))) if len(self._held) >= _LONGEST_CHARACTER else ""
        if text:
            self._context = self._held
        elif self._context_length == 0:  # a space in front of a text may have none, and changes the next one's
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
        """The last tokens of a prompt, from where a character begins: of some decoders, all bytes from amid one up to
        the next token that is none are no text. The whole prompt where that is further away.
        """
        for count in range(_CONTEXT, min(_CONTEXT + _LONGEST_CHARACTER, len(prompt))):
            text = self._decode(prompt[-count:])
            if text and not text.startswith(_INCOMPLETE):
                return prompt[-count:]
        return prompt

    def _new(self, text: str) -> str:
        """What of the text that comes next is not known from the prompt."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, self._known, strict=False)))
        self._known = self._known[same:] if same == len(text) else ""
        return text[same:]

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
