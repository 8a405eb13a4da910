# SPDX-License-Identifier: Apache-2.0
"""Pieces of text from tokens, joined, are the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.engine.streaming import TextStream

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve\n𝄞x � end"


class Bytes:
    """A byte-level tokenizer: a token is its bytes; counts the tokens it has decoded."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens, self.decoded = tokens, 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return b"".join(self.tokens[token] for token in ids).decode("utf-8", errors="replace")


class Words:
    """Tokens are words with a leading space, except for the first of a text; 0 is a special token."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids if token)


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(Bytes([bytes([i]) for i in range(256)]))
    assert pieces(stream, list("a€é𝄞".encode())) == ["a", "", "", "€", "", "é", "", "", "", "𝄞", ""]


def test_an_incomplete_character_comes_at_the_end() -> None:
    stream = TextStream(Bytes([bytes([i]) for i in range(256)]))
    for _ in range(2):  # nothing is left of the previous text
        assert pieces(stream, list(b"a\xf0\x9f")) == ["a", "", "", "�"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_text_in_tokens_of_so_many_bytes(size: int) -> None:
    encoded = TEXT.encode()
    tokens = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    assert "".join(pieces(TextStream(Bytes(tokens)), range(len(tokens)))) == TEXT


BROKEN = (
    *(bytes([byte]) for byte in b"a\x80\x9f\xac\xc3\xe2\xed\xf0\xff"),
    b"\xe2\x82",
    b"\x9f\x98",
    b"\x82\xe2",
    b" b",
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(BROKEN), max_size=30))
def test_whatever_the_bytes(tokens: list[bytes]) -> None:
    tokenizer = Bytes(tokens)
    stream, text = TextStream(tokenizer), ""
    for i in range(len(tokens)):
        text += stream.push(i)
        whole = tokenizer.decode(range(i + 1))
        assert whole.startswith(text)
        assert text == whole or whole.endswith("�")  # otherwise nothing is held back
    assert text + stream.finish() == tokenizer.decode(range(len(tokens)))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(BROKEN), max_size=30), st.integers(0, 30))
def test_behind_a_prompt_comes_what_it_has_not(tokens: list[bytes], length: int) -> None:
    """Wherever the prompt ends: of a character that it cuts off, nothing comes twice and nothing is missing."""
    tokenizer, end = Bytes(tokens), min(length, len(tokens))
    stream, text = TextStream(tokenizer, range(end)), ""
    before = tokenizer.decode(range(end))

    def new(count: int) -> str:
        whole = tokenizer.decode(range(count))
        return whole[len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))) :]

    for i in range(end, len(tokens)):
        text += stream.push(i)
        assert new(len(tokens)).startswith(text)
        assert text == new(i + 1) or new(i + 1).endswith("�")
    assert text + stream.finish() == new(len(tokens))


@pytest.mark.parametrize("tokens", [[b"ab"], [b"\xe2", b"\x82", b"\xac"], [b"\x80"], [b"\xf0", b"\x9f"]])
def test_work_grows_with_the_number_of_tokens(tokens: list[bytes]) -> None:
    """Also where no byte ever becomes a character."""
    tokenizer = Bytes(tokens * 400)
    stream = TextStream(tokenizer)
    for token in range(len(tokenizer.tokens)):
        stream.push(token)
    assert tokenizer.decoded < 50 * len(tokenizer.tokens)


def test_a_space_before_a_word_stays() -> None:
    got = pieces(TextStream(Words()), [3, 0, 0, 5, 0, 7])
    assert got == ["w3", "", "", " w5", "", " w7", ""]


def test_a_prompt_that_ends_amid_a_character() -> None:
    tokens = [*(bytes([byte]) for byte in "wé€\ufffd".encode()), b"!"]
    for end, rest in ((2, ["é", "", "", "€"]), (4, ["", "€"]), (8, ["", "!"]), (9, ["!"])):
        stream = TextStream(Bytes(tokens), range(end))
        assert [stream.push(token) for token in range(end, end + len(rest))] == rest
        assert TextStream(Bytes(tokens), range(end)).finish() == ""


def test_a_space_behind_a_prompt_stays() -> None:
    """Also where nothing near its end has a text."""
    for prompt in ([3], [3, 0], [3, *[0] * 20], [*range(1, 30)]):
        assert pieces(TextStream(Words(), prompt), [5, 7]) == [" w5", " w7", ""]
    assert pieces(TextStream(Words(), [0] * 20), [5, 7]) == ["w5", " w7", ""]


def byte_level(tokenizers: Any) -> Any:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def byte_fallback(tokenizers: Any) -> Any:
    """As in Llama 2: characters are tokens, and those without a token are their bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Greweltdnaïvx,!"]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_of_the_package_tokenizers(make: Any) -> None:
    from flashllm.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(make(pytest.importorskip("tokenizers")))
    ids = tokenizer.encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT
    got = pieces(TextStream(tokenizer), ids)
    assert "".join(got) == TEXT
    assert len(ids) > len(TEXT)
    assert got.count("") > len(ids) - len(TEXT)
    for end in range(len(ids)):
        complete = next(text for n in range(end, -1, -1) if TEXT.startswith(text := tokenizer.decode(ids[:n])))
        assert complete + "".join(pieces(TextStream(tokenizer, ids[:end]), ids[end:])) == TEXT


def test_spaces_before_the_first_word() -> None:
    """The decoder removes one of them, wherever text begins."""
    from flashllm.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(byte_fallback(pytest.importorskip("tokenizers")))
    ids = tokenizer.encode("   wo rd").ids
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids) == "   wo rd"
