# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of checkpoints and of GGUF files, and windows of texts with the bytes that are predicted in them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashllm.convert.run import convert
from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.sparse_model import SparseModel
from flashllm.models.packed import UnpackedModel
from flashllm.models.text import read_text, split_batches, windows
from flashllm.models.tokenizer import Tokenizer, load_tokenizer
from flashllm.prune.run import Settings, prune
from model_cases import write_checkpoint, write_tokenizer

tokenizers = pytest.importorskip("tokenizers")

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TEXT = "Über 3 cafés — naïve 東京 𝄞 the 12345 end. " * 5


def by_bytes(*, begin: bool = False, end: bool = False) -> Any:
    """Every byte is a token; 256 and 257 can stand around a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    template = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
    if begin or end:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    return made


def test_prefix() -> None:
    assert Tokenizer(by_bytes()).prefix == ()
    assert Tokenizer(by_bytes(begin=True)).prefix == (256,)
    assert Tokenizer(by_bytes(begin=True, end=True)).prefix == (256,)
    # An end token has no place before a text.
    assert Tokenizer(by_bytes(end=True)).prefix == ()


def test_nothing_is_cut_or_filled_up() -> None:
    made = by_bytes(begin=True)
    made.enable_truncation(8)
    made.enable_padding(length=32)
    found = Tokenizer(made).encode("nine characters and more")
    assert len(found.ids) == len("nine characters and more")
    assert 256 not in found.ids


def test_the_mark_of_an_editor_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfab\xef\xbb\xbfc")
    assert read_text(tmp_path / "text") == "ab\ufeffc"


def test_surrogates_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"text: expected characters that UTF-8 can encode, got .* at position 2"):
        Tokenizer(by_bytes()).encode("ab\udcff")


def test_there_and_back() -> None:
    tokenizer = Tokenizer(by_bytes(begin=True))
    found = tokenizer.encode(TEXT)
    assert len(found.ids) == len(TEXT.encode())
    assert tokenizer.decode(found.ids) == TEXT
    assert tokenizer.decode([256, *found.ids[:3], 257]) == "Üb"
    begins = [place for place, letter in enumerate(TEXT) for _ in letter.encode()]
    assert list(found.starts) == begins
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_json()))
    assert (again.encode(TEXT), again.prefix) == (found, (256,))


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize(("count", "length"), [(1, 3), (1, 100), (3, 50), (7, 12), (2, 61)])
def test_windows_of_bytes(begin: bool, count: int, length: int) -> None:
    text = "plain letters, a byte each; " * 10
    found = windows(Tokenizer(by_bytes(begin=begin)), text, count=count, length=length)
    assert found.tokens.shape == (count, length)
    assert found.tokens.dtype == np.int64
    ids = [BYTES.index("Ġ" if letter == " " else letter) for letter in text]
    fresh = length - begin
    ends = []
    for row in found.tokens.tolist():
        assert not begin or row.pop(0) == 256
        at = next(at for at in range(ends[-1] if ends else 0, len(ids)) if ids[at : at + fresh] == row)
        ends.append(at + fresh)
    assert len(ends) == count
    assert found.text_bytes == count * (length - 1)


def test_windows_are_spread_over_the_text() -> None:
    text = "".join(chr(33 + i % 90) for i in range(90))
    tokens = windows(Tokenizer(by_bytes()), text, count=4, length=10).tokens
    ids = np.array([BYTES.index(letter) for letter in text])
    begins = [int(np.flatnonzero(ids == row[0])[0]) for row in tokens]
    assert begins == [0, 26, 53, 80]
    whole = windows(Tokenizer(by_bytes()), text, count=9, length=10).tokens
    np.testing.assert_array_equal(whole.ravel(), ids)


def test_bytes_of_letters_of_many_bytes() -> None:
    """A letter is counted with the token that completes it."""
    sizes = [len(letter.encode()) for letter in TEXT]
    credit = [0 if later else size for size in sizes for later in range(size - 1, -1, -1)]
    assert {1, 2, 3, 4} <= set(sizes)
    total = len(credit)
    assert total == len(TEXT.encode())
    for begin in (False, True):
        tokenizer = Tokenizer(by_bytes(begin=begin))
        for fresh in (2, 7, 40, total):
            found = windows(tokenizer, TEXT, count=1, length=fresh + begin)
            assert found.text_bytes == sum(credit[not begin : fresh])
        # Next to each other: with a prefix every byte is predicted once.
        count = total // 9
        rest = TEXT.encode()[: 9 * count].decode("utf-8", "ignore")
        if len(rest.encode()) == 9 * count and begin:
            assert windows(tokenizer, rest, count=count, length=10).text_bytes == 9 * count


def test_windows_that_cannot_be() -> None:
    tokenizer = Tokenizer(by_bytes(begin=True))
    for count, length in ((0, 10), (1, 2), (1, 0), (-1, 10)):
        with pytest.raises(ArgumentError, match=f"length: .* got {count}x{length}"):
            windows(tokenizer, TEXT, count=count, length=length)
    assert windows(tokenizer, "x" * 90, count=10, length=10).tokens.shape == (10, 10)
    with pytest.raises(ArgumentError) as caught:
        windows(tokenizer, "x" * 89, count=10, length=10)
    assert (caught.value.argument, caught.value.got) == ("text", "89 tokens")
    with pytest.raises(ArgumentError, match=r"text: .* got 0 tokens"):
        windows(tokenizer, "", count=1, length=5)


def test_parts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT, encoding="utf-8")
    assert read_text(path) == TEXT
    half = len(TEXT) // 2
    assert read_text(path, part=(0.0, 0.5)) == TEXT[:half]
    assert read_text(path, part=(0.0, 0.37)) + read_text(path, part=(0.37, 1.0)) == TEXT
    for part in ((0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ArgumentError, match="part"):
            read_text(path, part=part)


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff")
    with pytest.raises(FormatError) as caught:
        read_text(path)
    assert (caught.value.index, caught.value.got) == (3, "byte 0xff")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError, match="a regular file"):
            read_text(other)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    monkeypatch.setattr("flashllm.models.text._MOST_BYTES", 3)
    with pytest.raises(FormatError, match="at most 3 bytes"):
        read_text(path)


def test_batches() -> None:
    for rows, length, at_once in ((10, 7, 21), (3, 50, 10), (4, 5, 1000)):
        parts = split_batches(np.zeros((rows, length)), at_once=at_once)
        assert [i for part in parts for i in range(*part.indices(rows))] == list(range(rows))
        assert all(part.stop - part.start in (1, at_once // length) for part in parts)


def test_the_tokenizer_of_a_directory(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    with open_checkpoint(folder) as checkpoint:
        with pytest.raises(FormatError) as caught:
            load_tokenizer(checkpoint)
        assert (caught.value.field, caught.value.path) == ("tokenizer.json", str(folder))
        path = write_tokenizer(folder)
        tokenizer = load_tokenizer(checkpoint)
        assert tokenizer.prefix == (1,)
        assert tokenizer.decode(tokenizer.encode("with the cat").ids) == "with the cat"
        assert len(tokenizer.encode(" the").ids) == 2
        for content in (b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100000):
            path.write_bytes(content)
            with pytest.raises(FormatError) as caught:
                load_tokenizer(checkpoint)
            assert caught.value.path == str(path)
            assert caught.value.field == ("file" if content == b"\xff\xfe" else "tokenizer.json")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with (
        open_checkpoint(write_checkpoint(tmp_path, "llama")) as checkpoint,
        pytest.raises(MissingDependencyError, match=r"flashllm\[hf\]"),
    ):
        load_tokenizer(checkpoint)


def of_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    checkpoint: Any = SimpleNamespace(tokenizer=fields, path=Path("x.gguf"))
    return load_tokenizer(checkpoint)


def fields_of(
    pre: str | None, *, more: Sequence[str] = (), merges: Sequence[str] = (), **others: Any
) -> dict[str, Any]:
    """Metadata as the reader of GGUF files gives them: bytes, ``more``, <s> (control), <u> (defined by users)."""
    names = (*BYTES, *more, "<s>", "<u>")
    kinds = np.array([1] * (len(names) - 2) + [3, 4], np.int32)
    found = {"model": "gpt2", "tokens": names, "merges": tuple(merges), "token_type": kinds, "pre": pre, **others}
    return {key: value for key, value in found.items() if value is not None}


def cut(pre: str | None, text: str) -> list[str]:
    """``text``, which has no letter twice, in the pieces that merges do not cross: each piece becomes one token."""
    letters = [BYTES[BYTES.index({" ": "Ġ", "\n": "Ċ"}.get(letter, letter))] for letter in text]
    assert len(set(letters)) == len(text)
    names, merges = [], []
    for first in range(len(letters)):  # pairs from the left come first
        for last in range(first + 1, len(letters)):
            merges.append(f"{''.join(letters[first:last])} {letters[last]}")
            names.append("".join(letters[first : last + 1]))
    found = of_gguf(fields_of(pre, more=names, merges=merges, add_bos_token=False)).encode(text)
    return [text[a:b] for a, b in zip(found.starts, (*found.starts[1:], len(text)), strict=True)]


GPT2 = ["x", "'s", " 1234", "!", "\n"]


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", GPT2),
        ("default", GPT2),
        (None, GPT2),
        ("smollm", ["x", "'s", " ", "1", "2", "3", "4", "!", "\n"]),
        ("qwen2", ["x", "'s", " ", "1", "2", "3", "4", "!\n"]),
    ],
)
def test_how_a_text_is_cut(pre: str | None, wanted: list[str]) -> None:
    assert cut(pre, "x's 1234!\n") == wanted
    assert cut(pre, "y'S") == (["y", "'S"] if pre == "qwen2" else ["y", "'", "S"])


def test_how_llama_3_cuts_a_text() -> None:
    assert cut("llama-bpe", "x's 1234!\n") == ["x", "'s", " ", "123", "4", "!\n"]
    assert cut("llama-bpe", "y'S") == ["y", "'S"]


def test_special_and_user_tokens_of_gguf() -> None:
    tokenizer = of_gguf(fields_of("gpt-2", more=["ab"], merges=["a b"]))
    ab, control, user = 256, 257, 258
    assert tokenizer.prefix == ()
    assert tokenizer.encode("ab<s>ab<u>").ids == (ab, control, ab, user)
    assert tokenizer.decode([ab, control, user]) == "ab<u>"


def test_the_first_token_of_gguf() -> None:
    assert of_gguf(fields_of("gpt-2", bos_token_id=256, add_bos_token=True)).prefix == (256,)
    assert of_gguf(fields_of("gpt-2", bos_token_id=256, add_bos_token=False)).prefix == ()
    assert of_gguf(fields_of("qwen2", bos_token_id=256)).prefix == ()
    # llama.cpp puts it before texts of Llama 3 if the file does not say.
    assert of_gguf(fields_of("llama-bpe", bos_token_id=256)).prefix == (256,)
    assert of_gguf(fields_of("llama-bpe", bos_token_id=256, add_bos_token=False)).prefix == ()
    odd = fields_of("gpt-2", bos_token_id=0, add_bos_token=True)
    odd["tokens"] = ("$A :1 <b o s>", *odd["tokens"][1:])
    assert of_gguf(odd).prefix == (0,)
    for value in (None, -1, 258, True, "1"):
        with pytest.raises(FormatError) as caught:
            of_gguf(fields_of("gpt-2", bos_token_id=value, add_bos_token=True))
        assert caught.value.field == "tokenizer.ggml.bos_token_id"


def test_whole_words_of_llama_3() -> None:
    """Whole words that no merges of pairs lead to."""
    assert of_gguf(fields_of("llama-bpe", more=["abc"], add_bos_token=False)).encode("abc").ids == (256,)
    assert len(of_gguf(fields_of("gpt-2", more=["abc"])).encode("abc").ids) == 3


def test_letters_of_qwen_are_composed() -> None:
    found = of_gguf(fields_of("qwen2")).encode("e\u0301")
    assert found.ids == of_gguf(fields_of("qwen2")).encode("é").ids
    assert len(of_gguf(fields_of("gpt-2")).encode("e\u0301").ids) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "llama"),
        ("model", None),
        ("pre", "deepseek-llm"),
        ("pre", 3),
        ("pre", ["gpt-2"]),
        ("tokens", None),
        ("tokens", ()),
        ("tokens", 5),
        ("tokens", "abc"),
        ("tokens", np.arange(4)),
        ("tokens", ("a", "a")),
        ("merges", 5),
        ("merges", ("ab",)),
        ("merges", ("a b c",)),
        ("merges", np.arange(4)),
        ("merges", ("a b",)),
        ("merges", ("ab c",)),
        ("token_type", 1),
        ("token_type", np.ones(7, np.int32)),
    ],
)
def test_metadata_of_gguf_that_are_wrong(name: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        of_gguf({**fields_of("gpt-2"), name: value})
    assert (caught.value.field, caught.value.path) == (f"tokenizer.ggml.{name}", "x.gguf")


def test_gguf_as_a_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = of_gguf(fields_of("llama-bpe", more=["ab"], merges=["a b"], bos_token_id=257))
    folder = write_checkpoint(tmp_path, "llama")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert json.loads(tokenizer.to_json())["model"]["type"] == "BPE"
    with open_checkpoint(folder) as checkpoint:
        again = load_tokenizer(checkpoint)
    assert again.prefix == tokenizer.prefix == (257,)
    assert again.encode("ab <s>12345<u>") == tokenizer.encode("ab <s>12345<u>")


def test_the_tokenizer_of_a_gguf_file_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned or converted model can be evaluated without the file that it came from."""
    fields = fields_of("llama-bpe", more=["ab"], merges=["a b"], bos_token_id=257)
    wanted = of_gguf(fields)
    with open_checkpoint(write_checkpoint(tmp_path / "model", "llama")) as checkpoint:
        checkpoint.tokenizer = fields  # type: ignore[attr-defined]  # as a GGUF file has it, and no tokenizer.json
        prune(checkpoint, tmp_path / "pruned", Settings(method="magnitude", sparsity=0.5))
        convert(checkpoint, tmp_path / "packed", format="dense")
        convert(checkpoint, tmp_path / "packed", format="dense", resume=True)
        with open_checkpoint(tmp_path / "pruned") as pruned:
            found = [load_tokenizer(one) for one in (pruned, UnpackedModel(SparseModel(tmp_path / "packed")))]
        monkeypatch.setitem(sys.modules, "tokenizers", None)  # without the package it stays behind
        convert(checkpoint, tmp_path / "none", format="dense")
    assert [(one.prefix, one.encode("ab <s>1")) for one in found] == [(wanted.prefix, wanted.encode("ab <s>1"))] * 2
    assert not (tmp_path / "none" / "tokenizer.json").exists()
