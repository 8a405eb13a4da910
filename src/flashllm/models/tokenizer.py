# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back with the package ``tokenizers``, for Hugging Face directories and GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError, brief
from flashllm.formats.check import is_int
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import read_utf8
from flashllm.io.hf_directory import TOKENIZER_NAME

_MOST_BYTES = 1 << 28
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_GPT4_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _GPT4_LIKE % "{1,3}", "qwen2": _GPT4_LIKE % ""}
_BYTE_LEVEL = ("gpt-2", "default", "smollm", *_SPLITS)
"""Values of ``tokenizer.ggml.pre``: how text is cut before pairs are merged."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text as tokens."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    """Where in the text each token begins, in characters."""


class Tokenizer:
    """A tokenizer of the package ``tokenizers``."""

    def __init__(self, made: Any) -> None:
        made.no_truncation()  # some files cut every text to the length of a training example
        made.no_padding()
        self._made = made
        self.prefix: tuple[int, ...] = _prefix(made)
        """The token that it puts in front of any text, or none."""

    def encode(self, text: str) -> Encoded:
        """Tokens of ``text``, without :attr:`prefix`. Raises ``ArgumentError`` for surrogates, which are no text.

        Python puts them where an argument of the command line is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = f"{text[error.start]!r} at position {error.start}"
            raise ArgumentError("text", expected="characters that UTF-8 can encode", got=got) from None
        found = self._made.encode(text, add_special_tokens=False)
        return Encoded(ids=tuple(found.ids), starts=tuple(start for start, _ in found.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._made.decode(list(ids)))

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``."""
        return str(self._made.to_str())


def _prefix(made: Any) -> tuple[int, ...]:
    found = made.encode("a 1.")
    # Tokens that a tokenizer adds belong to no text; those that it adds after the text do not belong in the prefix.
    behind = next((i for i, text in enumerate(found.sequence_ids) if text is not None), 0)
    return tuple(found.ids[: min(1, behind)])


def has_own_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint itself, not a ``tokenizer.json`` beside it, holds the tokenizer, as GGUF files do."""
    return getattr(checkpoint, "tokenizer", None) is not None


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises ``MissingDependencyError`` without the package ``tokenizers``, and ``FormatError`` if the checkpoint has
    no tokenizer that can be read.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError('the package tokenizers is not installed: pip install "flashllm[hf]"') from error
    fields = getattr(checkpoint, "tokenizer", None)
    if fields is not None:
        return _of_gguf(tokenizers, fields, str(checkpoint.path))
    file = checkpoint.companions().get(TOKENIZER_NAME)
    if file is None:
        raise FormatError(
            field=TOKENIZER_NAME, expected="a file beside the weights", got="none", path=str(checkpoint.path)
        )
    content = read_utf8(file, most_bytes=_MOST_BYTES)
    try:
        made = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the package raises plain Exception
        raise FormatError(field=TOKENIZER_NAME, expected="a tokenizer", got=str(error), path=str(file)) from error
    return Tokenizer(made)


def _of_gguf(tokenizers: Any, fields: Mapping[str, Any], path: str) -> Tokenizer:
    def bad(name: str, expected: str, got: object) -> FormatError:
        return FormatError(field=f"tokenizer.ggml.{name}", expected=expected, got=brief(got), path=path)

    model, cut = fields.get("model"), fields.get("pre", "default")
    if model != "gpt2":
        raise bad("model", "gpt2: for others use the directory of Hugging Face, with its tokenizer.json", model)
    if cut not in _BYTE_LEVEL:
        raise bad("pre", f"one of {', '.join(_BYTE_LEVEL)}", cut)
    lists = {name: fields.get(name, ()) for name in ("tokens", "merges", "token_type")}
    for name, found in lists.items():
        if isinstance(found, str) or not hasattr(found, "__len__"):
            raise bad(name, "a list", found)
    tokens, merges, kinds = (list(found) for found in lists.values())
    if not tokens or not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
        raise bad("tokens", "distinct strings", tokens)
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else () for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise bad("merges", "pairs of tokens", merges)
    if kinds and len(kinds) != len(tokens):
        raise bad("token_type", f"{len(tokens)} numbers", kinds)
    pre, split = tokenizers.pre_tokenizers, tokenizers.Regex
    numbered = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 keeps a word that is itself a token, whether or not merging pairs leads to it.
        made = tokenizers.Tokenizer(tokenizers.models.BPE(numbered, pairs, ignore_merges=cut == "llama-bpe"))
    except Exception as error:
        raise bad("merges", "pairs whose merged tokens exist", error) from error
    if cut in _SPLITS:
        parts = [pre.Split(split(_SPLITS[cut]), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif cut == "smollm":
        parts = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    else:
        parts = [pre.ByteLevel(add_prefix_space=False)]
    if cut == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = pre.Sequence(parts)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    if fields.get("add_bos_token", cut == "llama-bpe"):  # Llama 3 files may omit it and mean true
        first = fields.get("bos_token_id")
        if not is_int(first) or not 0 <= first < len(tokens):
            raise bad("bos_token_id", f"an integer in 0..{len(tokens) - 1}, for it is put before texts", first)
        # Under a fixed name: the token's own may be anything, and the template is parsed.
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="bos $A",
            pair="bos $A bos $B",
            special_tokens=[{"id": "bos", "ids": [first], "tokens": [tokens[first]]}],
        )
    return Tokenizer(made)
