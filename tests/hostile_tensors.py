# SPDX-License-Identifier: Apache-2.0
"""Mutations of ``.safetensors`` files: matrices to encode, and our own files of packed weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import load_weights
from flashllm.io.matrices import read_matrix
from flashllm.io.safetensors_file import write_file
from hostile import TRAP, Container, Table, changed
from hostile_numpy import _use_matrix

_rng = np.random.default_rng(3)
_DENSE = np.where(_rng.random((200, 100)) < 0.1, _rng.integers(1, 60_000, (200, 100)) / 60_000, 0).astype(np.float16)
_PACKED = TiledCSL.from_dense(_DENSE, order="row")
_OFFSETS, _WORDS = _PACKED.tile_offsets, _PACKED.words

Change = Callable[[dict[str, Any]], Any]


def with_header(text: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    """A file with the header ``text``."""
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Header text and tensor bytes of a file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def edited(change: Change) -> Callable[[bytes], bytes]:
    """A change to the JSON of the header; the tensor bytes stay."""

    def apply(raw: bytes) -> bytes:
        text, rest = split(raw)
        header = json.loads(text)
        change(header)
        return with_header(json.dumps(header).encode(), rest)

    return apply


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """A change to the text of the header, for what JSON writers refuse to write."""

    def apply(raw: bytes) -> bytes:
        text, rest = split(raw)
        assert old in text, (old, text)
        return with_header(text.replace(old, new, 1), rest)

    return apply


def entry(name: str, **values: Any) -> Callable[[bytes], bytes]:
    """A change to fields of a tensor's entry."""
    return edited(lambda header: header[name].update(values))


def _swap(a: str, b: str) -> Callable[[bytes], bytes]:
    """Both tensors at the place of the first."""
    return edited(lambda header: header[b].update(data_offsets=header[a]["data_offsets"]))


def _same_bytes(name: str, new: str) -> Callable[[bytes], bytes]:
    return edited(lambda header: header.update({new: header[name]}))


def _shifted(name: str, by: int) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [d + by for d in header[name]["data_offsets"]]

    return edited(change)


def _layout(table: Table, sound: Callable[[Path], Any], first: str, last: str) -> None:
    """What can be wrong with any such file; ``first`` and ``last`` are its tensors by position."""
    add = partial(table.add_bytes, sound=sound)
    span, shape = f"{first}.data_offsets", f"{first}.shape"
    for name, field, change in (
        ("empty", "file", lambda raw: b""),
        ("seven bytes", "file", lambda raw: raw[:7]),
        ("length alone", "header length", lambda raw: raw[:8]),
        ("length zero", "header length", lambda raw: bytes(8) + raw[8:]),
        ("length one", "header length", lambda raw: with_header(*split(raw), length=1)),
        ("length past the end", "header length", lambda raw: with_header(*split(raw), length=len(raw))),
        ("length of exabytes", "header length", lambda raw: b"\xff" * 8 + raw[8:]),
        ("length a byte short", "header", lambda raw: with_header(*split(raw), length=len(split(raw)[0].strip()) - 1)),
        ("header over the limit", "header length", lambda raw: with_header(b" " * (33 << 20))),
        ("header not UTF-8", "header", lambda raw: raw[:8] + b"\xff" + raw[9:]),
        ("header in UTF-16", "header", lambda raw: with_header(split(raw)[0].decode().encode("utf-16"), split(raw)[1])),
        ("header not JSON", "header", lambda raw: raw[:8] + b"(" + raw[9:]),
        ("header a number", "header", lambda raw: with_header(b"1234")),
        ("header a list", "header", lambda raw: with_header(b"[]")),
        ("header NaN", "header", lambda raw: with_header(b"NaN")),
        ("header null", "header", lambda raw: with_header(b"null")),
        ("header of lists nested deeply", "header", lambda raw: with_header(b"[" * 200_000)),
        ("header of objects nested deeply", "header", lambda raw: with_header(b'{"a":' * 100_000)),
        ("header of a million lists", "a", lambda raw: with_header(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}")),
        ("header of a long number", "header", lambda raw: with_header(b"1" * 10_000)),
        ("a name twice", "header", lambda raw: with_header(b'{"a": 1, "a": 2}')),
        ("a field twice", "header", replaced(b'"shape":', b'"shape":[1],"shape":')),
        ("a pickle", "header length", lambda raw: TRAP),
        ("a pickle as header", "header", lambda raw: with_header(TRAP)),
        ("cut short", f"{last}.data_offsets", lambda raw: raw[:-4]),
        ("a byte too long", "file", lambda raw: raw + b"\0"),
        ("metadata a list", "__metadata__", edited(lambda h: h.update(__metadata__=[]))),
        ("metadata null", "__metadata__", edited(lambda h: h.update(__metadata__=None))),
        ("metadata with a number", "__metadata__", edited(lambda h: h.update(__metadata__={"version": 1}))),
        ("metadata with NaN", "__metadata__", edited(lambda h: h.update(__metadata__={"version": float("nan")}))),
        ("metadata nested", "__metadata__", edited(lambda h: h.update(__metadata__={"a": {"b": "c"}}))),
        ("a name of control characters", "\x1b[2J\r\n", edited(lambda h: h.update({"\x1b[2J\r\n": 5}))),
        ("a name of half a character", "\ud800", edited(lambda h: h.update({"\ud800": 5}))),
        ("a name of a megabyte", "a" * 10**6, edited(lambda h: h.update({"a" * 10**6: 5}))),
        ("an entry a number", first, edited(lambda h: h.update({first: 5}))),
        ("an entry with more fields", first, entry(first, extra=1)),
        ("an entry without a type", first, edited(lambda h: h[first].pop("dtype"))),
        ("type unknown", f"{first}.dtype", entry(first, dtype="X32")),
        ("type a list", f"{first}.dtype", entry(first, dtype=["F32"])),
        ("type in small letters", f"{first}.dtype", entry(first, dtype="f32")),
        ("shape shorter", span, entry(first, shape=[4])),
        ("shape negative", shape, entry(first, shape=[-4])),
        ("shape of floats", shape, entry(first, shape=[4.0])),
        ("shape of booleans", shape, entry(first, shape=[True])),
        ("shape NaN", shape, entry(first, shape=[float("nan")])),
        ("shape a text", shape, entry(first, shape="4")),
        ("shape of exabytes", shape, entry(first, shape=[2**62, 2**62])),
        ("shape that overflows to fit", shape, entry(first, shape=[2**62 + 1, 16])),
        ("shape of 8000 digits", shape, entry(first, shape=[int("9" * 4000)] * 2)),
        ("shape of huge sizes and zero", shape, entry(first, shape=[0, 2**62, 8], data_offsets=[0, 0])),
        ("shape of 65", shape, entry(first, shape=[1] * 65)),
        ("shape of a million", shape, entry(first, shape=[2] * 10**6)),
        ("shape of long numbers", shape, entry(first, shape=[int("9" * 4000)] * 2000)),
        ("past the end", span, entry(first, shape=[2**40], data_offsets=[0, 2**42])),
        ("ends before it starts", span, entry(first, data_offsets=[64, 0])),
        ("starts before the file", span, entry(first, data_offsets=[-4, 0])),
        ("one offset", span, entry(first, data_offsets=[0])),
        ("three offsets", span, entry(first, data_offsets=[0, 4, 8])),
        ("offsets of floats", span, entry(first, data_offsets=[0.0, 4.0])),
        ("offsets past 64 bits", span, entry(first, data_offsets=[0, 2**70])),
        ("a gap before the first", f"{first}.data_offsets", lambda raw: _shifted(first, 1)(raw + b"\0")),
        ("a gap at the start", f"{first}.data_offsets", _shifted_all),
        ("bytes used twice", "again.data_offsets", _same_bytes(last, "again")),
        ("an unused tail", "file", edited(lambda h: h.pop(last))),
    ):
        add(name, field, change=change)


def _shifted_all(raw: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        for name, value in header.items():
            if name != "__metadata__":
                value["data_offsets"] = [d + 8 for d in value["data_offsets"]]

    text, rest = split(edited(change)(raw))
    return with_header(text, bytes(8) + rest)


def write_dense(path: Path, **arrays: Any) -> None:
    """A sound file of one matrix and a vector, or of ``arrays``."""
    write_file(path, arrays or {"m": _DENSE.astype(np.float32), "v": np.ones(7, np.float16)}, {})


_dense = Table()
_layout(_dense, write_dense, "m", "v")
for _name, _array in (
    ("a vector", np.ones(6, np.float32)),
    ("a cube", np.ones((2, 3, 4), np.float32)),
    ("no rows", np.ones((0, 3), np.float32)),
    ("a scalar", np.ones((), np.float32)),
):
    _dense.add(f"tensor: {_name}", "m", partial(write_dense, m=_array))
_dense.add("tensor: integers", "m.dtype", partial(write_dense, m=np.ones((2, 2), np.int32)))
for _name in ("U8", "F8_E5M2", "BOOL"):
    _change = entry("m", dtype=_name, shape=[200, 200])
    _dense.add_bytes(f"tensor: {_name}", "m.dtype", partial(write_dense, m=_DENSE), _change)
_dense.add("no tensors", "header", lambda path: path.write_bytes(with_header(b"{}")))

SAFETENSORS = Container(
    suffix=".safetensors", write=write_dense, read=partial(read_matrix, tensor="m"), use=_use_matrix, mutations=_dense
)


def write_packed(path: Path, fields: dict[str, Any] | None = None, **arrays: Any) -> None:
    """A file of one packed weight with some ``fields`` and ``arrays`` replaced; nothing is checked."""
    described = {"weight": {"format": "tiled-csl", **_PACKED.metadata(), **(fields or {})}}
    tensors = {f"weight.{name}": array for name, array in {**_PACKED.arrays(), **arrays}.items()}
    write_file(path, tensors, {"format": "flashllm-weights", "version": "1", "weights": json.dumps(described)})


def metadata(**values: Any) -> Callable[[bytes], bytes]:
    """A change to the metadata; ``None`` removes an entry."""

    def change(header: dict[str, Any]) -> None:
        merged = {**header["__metadata__"], **values}
        header["__metadata__"] = {key: value for key, value in merged.items() if value is not None}

    return edited(change)


def without(field: str) -> Callable[[bytes], bytes]:
    """Removes a field of the weight's description."""

    def change(header: dict[str, Any]) -> None:
        described = json.loads(header["__metadata__"]["weights"])
        del described["weight"][field]
        header["__metadata__"]["weights"] = json.dumps(described)

    return edited(change)


def word(row: int, column: int, value: int = 0x3C00) -> int:
    """A word of Tiled-CSL."""
    return (row * 64 + (column ^ ((row & 7) * 8))) << 16 | value


_free = np.setdiff1d(np.arange(8192), _WORDS[: 4 * int(_OFFSETS[1])] >> 16)
_pad = int(np.flatnonzero((_WORDS & 0x7FFF) == 0)[0])
_first = 4 * int(_OFFSETS[np.searchsorted(4 * _OFFSETS[:5], _pad, side="right") - 1])  # word of that tile
_packed = Table()
_layout(_packed, write_packed, "weight.tile_offsets", "weight.words")
for _name, _change in (
    ("weights no JSON", metadata(weights="{")),
    ("weights a list", metadata(weights="[]")),
    ("weights NaN", metadata(weights="NaN")),
    ("weights missing", metadata(weights=None)),
    ("weights of lists", metadata(weights='{"weight": []}')),
    ("weights nested deeply", metadata(weights="[" * 100_000)),
    ("weights: a name twice", metadata(weights='{"weight": {}, "weight": {}}')),
    ("weights: a field twice", metadata(weights='{"weight": {"nnz": 1, "nnz": 2}}')),
):
    _packed.add_bytes(_name, "__metadata__.weights", write_packed, _change)
for _name, _field, _change in (
    ("no metadata", "format", edited(lambda h: h.pop("__metadata__"))),
    ("another format", "format", metadata(format="pt")),
    ("no version", "version", metadata(version=None)),
    ("a later version", "version", metadata(version="2")),
    ("a version with a space", "version", metadata(version="1 ")),
):
    _packed.add_bytes(_name, f"__metadata__.{_field}", write_packed, _change)
for _field in ("format", "shape", "dtype", "nnz", "order", "max_tile_words"):
    _named = f"weight.{_field}" if _field == "format" else _field
    _packed.add_bytes(f"weights: {_field} missing", _named, write_packed, without(_field))
    nested: list[Any] = []
    for _ in range(300):
        nested = [nested]
    for _name, _value in (
        ("null", None), ("a text", "\x1b[2J"), ("NaN", float("nan")), ("infinite", float("inf")), ("nested", nested),
        ("an object", {"a": 1}), ("negative", -1), ("true", True), ("of 4000 digits", int("9" * 4000)),
    ):  # fmt: skip
        _packed.add(f"weights: {_field} {_name}", _named, partial(write_packed, fields={_field: _value}))
_add = _packed.add
_add("weights: format of another name", "weight.format", partial(write_packed, fields={"format": "pickle"}))
_add("weights: shape of exabytes", "tile_offsets", partial(write_packed, fields={"shape": [2**31 - 1, 2**31 - 1]}))
_add("weights: shape past int32", "shape", partial(write_packed, fields={"shape": [2**31, 1]}))
_add("weights: shape of another grid", "tile_offsets", partial(write_packed, fields={"shape": [300, 100]}))
_add("weights: shape of the same grid", "words", partial(write_packed, fields={"shape": [150, 100]}))
_add("weights: shape with zero", "shape", partial(write_packed, fields={"shape": [0, 100]}))
_add("weights: shape of booleans", "shape", partial(write_packed, fields={"shape": [True, True]}))
_add("weights: nnz one too many", "nnz", partial(write_packed, fields={"nnz": _PACKED.nnz + 1}))
_add("weights: nnz of more than the matrix", "nnz", partial(write_packed, fields={"nnz": 20_001}))
_add("weights: max_tile_words too small", "max_tile_words", partial(write_packed, fields={"max_tile_words": 4}))
_add("weights: max_tile_words too large", "max_tile_words", partial(write_packed, fields={"max_tile_words": 8192}))
_add("weights: max_tile_words over a tile", "max_tile_words", partial(write_packed, fields={"max_tile_words": 8196}))
_add("weights: max_tile_words odd", "max_tile_words", partial(write_packed, fields={"max_tile_words": 6}))
_add("weights: order of another name", "order", partial(write_packed, fields={"order": "best"}))
_add("words signed", "words", partial(write_packed, words=_WORDS.view(np.int32)))
_add("words of two dimensions", "words", partial(write_packed, words=_WORDS.reshape(-1, 4)))
_add("words one short", "words", partial(write_packed, words=_WORDS[:-1]))
_add("words none", "tile_offsets", partial(write_packed, words=_WORDS[:0]), 4)
_add("words of zeros", "words", partial(write_packed, words=np.zeros_like(_WORDS)))
_add("location out of the tile", "words", partial(write_packed, words=changed(_WORDS, 5, 0x2000_3C00)), 5)
_add("location at the top", "words", partial(write_packed, words=changed(_WORDS, 0, 0xFFFF_3C00)), 0)
for _name, _at, _value, _index in (
    ("location twice", 3, (_WORDS[2] & 0xFFFF0000) | 0x3C00, 2),
    ("padding on a value", _pad, _WORDS[_first] & 0xFFFF0000, _pad),
    ("padding of -0.0", _pad, _WORDS[_pad] | 0x8000, _pad),
    ("value below the last row", 4 * int(_OFFSETS[2]), word(72, 0), 4 * int(_OFFSETS[2])),
    ("value right of the last column", 4 * int(_OFFSETS[1]), word(0, 36), 4 * int(_OFFSETS[1])),
):
    _add(_name, "words", partial(write_packed, words=changed(_WORDS, _at, _value)), _index)
_add(
    "four padding words", "words",
    partial(
        write_packed, fields={"max_tile_words": int(4 * (np.diff(_OFFSETS) + np.eye(5, dtype=int)[0]).max())},
        words=np.concatenate([_free[:4].astype(np.uint32) << 16, _WORDS]).astype(np.uint32),
        tile_offsets=np.concatenate([[0], _OFFSETS[1:] + 1]).astype(np.int32),
    ), 3,
)  # fmt: skip
for _name, _at, _value in (
    ("start late", 0, 1), ("start negative", 0, -1), ("fall", 2, int(_OFFSETS[1]) - 1), ("huge", 1, 2**31 - 1),
    ("negative", 3, -(2**31)), ("past the words", 4, int(_OFFSETS[4]) + 1), ("before the end", 4, int(_OFFSETS[4]) - 1),
    ("total not repeated", 5, int(_OFFSETS[5]) + 1),
):  # fmt: skip
    _add(f"tile offsets {_name}", "tile_offsets", partial(write_packed, tile_offsets=changed(_OFFSETS, _at, _value)))
_add("tile offsets one short", "tile_offsets", partial(write_packed, tile_offsets=_OFFSETS[:-1]))
_add("tile offsets none", "tile_offsets", partial(write_packed, tile_offsets=_OFFSETS[:0]))
_add("tile offsets unsigned", "tile_offsets", partial(write_packed, tile_offsets=_OFFSETS.view(np.uint32)))
_add("tile offsets of floats", "tile_offsets", partial(write_packed, tile_offsets=_OFFSETS.view(np.float32)))
_packed.add_bytes("words of bytes", "words", write_packed, lambda raw: _as_bytes(raw, "U8"))
_packed.add_bytes("words of signed bytes", "weight.words.dtype", write_packed, lambda raw: _as_bytes(raw, "I8"))
_packed.add_bytes(
    "offsets renamed", "weight.tile_offsets", write_packed,
    edited(lambda h: h.update({"weight.offsets": h.pop("weight.tile_offsets")})),
)  # fmt: skip


def _as_bytes(raw: bytes, dtype: str) -> bytes:
    return entry("weight.words", dtype=dtype, shape=[_WORDS.nbytes])(raw)


def _use_weights(weights: dict[str, Any]) -> None:
    for weight in weights.values():
        weight.validate()
        weight.to_dense()


WEIGHTS = Container(
    suffix=".safetensors", write=write_packed, read=load_weights, use=_use_weights, mutations=_packed
)  # fmt: skip
