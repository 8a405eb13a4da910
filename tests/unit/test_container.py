# SPDX-License-Identifier: Apache-2.0
"""Files of sparse weights: round trips, atomic writing, malformed files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import weight_cases as cases
from flashllm import registry
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import load_weight, load_weights, save_weights
from flashllm.io.files import write_whole
from flashllm.io.safetensors_file import read_header


def weight(seed: int = 1, dtype: str = "fp16", order: str = "bank") -> TiledCSL:
    return TiledCSL.from_dense(cases.matrix("uniform", 200, 100, 0.2, seed, dtype), order=order)


def same(a: TiledCSL, b: TiledCSL) -> bool:
    return (
        a.metadata() == b.metadata()
        and a.words.tobytes() == b.words.tobytes()
        and a.tile_offsets.tobytes() == b.tile_offsets.tobytes()
    )


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path: Path, mmap: bool) -> None:
    weights = {
        "layers.0.q": weight(1, "fp16", "bank"),
        "layers.0": weight(2, "bf16", "row"),
        "empty": TiledCSL.from_dense(np.zeros((5, 5), np.float16)),
    }
    path = tmp_path / "model.safetensors"
    save_weights(path, weights)
    back = load_weights(path, mmap=mmap)
    assert list(back) == list(weights)
    for name, w in weights.items():
        assert same(back[name], w)
        assert same(load_weight(path, name=name, mmap=mmap), w)


def test_method_round_trip_and_name_rules(tmp_path: Path) -> None:
    w = weight()
    w.save(tmp_path / "one", name="a b/ü")
    assert same(TiledCSL.load(tmp_path / "one"), w)
    assert same(TiledCSL.load(tmp_path / "one", name="a b/ü"), w)
    with pytest.raises(ArgumentError, match="'a b/ü'"):
        TiledCSL.load(tmp_path / "one", name="weight")
    save_weights(tmp_path / "two", {"x": w, "y": w})
    with pytest.raises(ArgumentError, match="'x', 'y'"):
        load_weight(tmp_path / "two")
    for weights in ({}, {"": w}, {"x": np.ones(3)}, {3: w}):
        with pytest.raises(ArgumentError):
            save_weights(tmp_path / "bad", weights)
    assert not (tmp_path / "bad").exists()


def test_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    w = weight()
    w.save(tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"weight.words", "weight.tile_offsets"}
        assert file.metadata()["format"] == "flashllm-weights"
        np.testing.assert_array_equal(file.get_tensor("weight.words"), w.words)
        np.testing.assert_array_equal(file.get_tensor("weight.tile_offsets"), w.tile_offsets)


def test_other_tensors_are_left_alone(tmp_path: Path) -> None:
    w = weight()
    w.save(tmp_path / "w")
    metadata = read_header(tmp_path / "w").metadata
    arrays = {"weight.words": w.words, "weight.tile_offsets": w.tile_offsets, "norm": np.ones(7, np.float16)}
    save_file(arrays, tmp_path / "mixed", metadata=metadata)
    assert same(TiledCSL.load(tmp_path / "mixed"), w)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    old = weight(1)
    old.save(path)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'$"):
        weight(2).save(path)
    monkeypatch.undo()
    assert same(TiledCSL.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_errors_of_a_write_name_the_file_and_not_a_temporary_one(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "w"
    with pytest.raises(FileNotFoundError, match=rf"'{absent}'$"):
        weight(1).save(absent)
    with pytest.raises(IsADirectoryError, match=rf"'{tmp_path}'$"):
        weight(1).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"'{absent}'$"):
        write_whole(absent, "text")


def test_an_overwritten_file_stays_readable_through_a_map(tmp_path: Path) -> None:
    old, path = weight(1), tmp_path / "w"
    old.save(path)
    mapped = load_weight(path, mmap=True)
    weight(2).save(path)
    assert same(mapped, old)  # type: ignore[arg-type]


def test_content_is_validated_unless_told_not_to(tmp_path: Path) -> None:
    w = weight()
    w.words[0] |= 0x2000 << 16
    w.save(tmp_path / "w")
    with pytest.raises(FormatError) as error:
        TiledCSL.load(tmp_path / "w")
    assert error.value.path == str(tmp_path / "w")
    assert (error.value.field, error.value.index) == ("words", 0)
    assert TiledCSL.load(tmp_path / "w", validate=False).words[0] == w.words[0]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none")


Change = Callable[[dict[str, Any]], None]


def rewrite(path: Path, change: Change) -> None:
    """Change the JSON header of a container; the tensor bytes stay."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def described(**changes: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        inner = json.loads(header["__metadata__"]["weights"])
        for key, value in changes.items():
            if value is KeyError:
                del inner["weight"][key]
            else:
                inner["weight"][key] = value
        header["__metadata__"]["weights"] = json.dumps(inner)

    return change


def entry(name: str, **changes: Any) -> Change:
    return lambda header: header[f"weight.{name}"].update(changes)


def metadata(**changes: Any) -> Change:
    return lambda header: header["__metadata__"].update(changes)


def drop(*keys: str) -> Change:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


HEADERS: dict[str, tuple[str, Change]] = {
    "no metadata": ("__metadata__.format", drop("__metadata__")),
    "another format": ("__metadata__.format", metadata(format="pt")),
    "no version": ("__metadata__.version", drop("__metadata__", "version")),
    "a later version": ("__metadata__.version", metadata(version="2")),
    "metadata with a number": ("__metadata__", metadata(version=1)),
    "metadata is a list": ("__metadata__", lambda h: h.update(__metadata__=[])),
    "no weights": ("__metadata__.weights", drop("__metadata__", "weights")),
    "weights no JSON": ("__metadata__.weights", metadata(weights="{")),
    "weights a list": ("__metadata__.weights", metadata(weights="[]")),
    "weights of lists": ("__metadata__.weights", metadata(weights='{"weight": []}')),
    "weights nested deeply": ("__metadata__.weights", metadata(weights="[" * 100_000)),
    "weight without format": ("weight.format", described(format=KeyError)),
    "weight of unknown format": ("weight.format", described(format="pickle")),
    "weight of format list": ("weight.format", described(format=["tiled-csl"])),
    "shape missing": ("shape", described(shape=KeyError)),
    "shape text": ("shape", described(shape="200x100")),
    "shape huge": ("shape", described(shape=[10**30, 10**30])),
    "shape of more tiles": ("tile_offsets", described(shape=[2**31 - 1, 2**31 - 1])),
    "dtype unknown": ("dtype", described(dtype="int8")),
    "nnz missing": ("nnz", described(nnz=KeyError)),
    "nnz text": ("nnz", described(nnz="12")),
    "nnz wrong": ("nnz", described(nnz=12)),
    "nnz infinite": ("nnz", described(nnz=float("inf"))),
    "order unknown": ("order", described(order="best")),
    "max_tile_words null": ("max_tile_words", described(max_tile_words=None)),
    "words missing": ("file", drop("weight.words")),
    "offsets renamed": (
        "weight.tile_offsets",
        lambda h: h.update({"weight.offsets": h.pop("weight.tile_offsets")}),
    ),
    "words of another type": ("words", entry("words", dtype="I32")),
    "words of an unreadable type": ("weight.words.dtype", entry("words", dtype="X32")),
    "words of a shorter shape": ("weight.words.data_offsets", entry("words", shape=[4])),
    "words of a huge shape": ("weight.words.shape", entry("words", shape=[2**62, 2**62])),
    "words of a negative shape": ("weight.words.shape", entry("words", shape=[-4])),
    "words of a float shape": ("weight.words.shape", entry("words", shape=[4.0])),
    "words of a bool shape": ("weight.words.shape", entry("words", shape=[True])),
    "words past the file": ("weight.words.data_offsets", entry("words", shape=[2**20], data_offsets=[0, 2**22])),
    "words backwards": ("weight.words.data_offsets", entry("words", data_offsets=[64, 0])),
    "words with one offset": ("weight.words.data_offsets", entry("words", data_offsets=[0])),
    "words with a further field": ("weight.words", entry("words", extra=1)),
    "words no object": ("weight.words", lambda h: h.update({"weight.words": 5})),
    "tensors overlap": (
        "weight.words.data_offsets",
        lambda h: h["weight.words"].update(
            data_offsets=[0, h["weight.words"]["data_offsets"][1] - h["weight.words"]["data_offsets"][0]]
        ),
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w"
    weight().save(path)
    field, change = HEADERS[name]
    rewrite(path, change)
    with pytest.raises(FormatError) as error:
        load_weights(path)
    assert error.value.field == field
    assert error.value.path == str(path)


RAW: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": ("file", lambda raw: b""),
    "seven bytes": ("file", lambda raw: raw[:7]),
    "length only": ("header length", lambda raw: raw[:8]),
    "length zero": ("header length", lambda raw: bytes(8) + raw[8:]),
    "length past the end": ("header length", lambda raw: struct.pack("<Q", len(raw)) + raw[8:]),
    "length of exabytes": ("header length", lambda raw: b"\xff" * 8 + raw[8:]),
    "not UTF-8": ("header", lambda raw: raw[:8] + b"\xff" + raw[9:]),
    "not JSON": ("header", lambda raw: raw[:8] + b"(" + raw[9:]),
    "a JSON number": ("header", lambda raw: struct.pack("<Q", 4) + b"1234"),
    "a name twice": ("header", lambda raw: struct.pack("<Q", 15) + b'{"a": 1,"a": 2}'),
    "a nested bomb": ("header", lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a long number": ("header", lambda raw: struct.pack("<Q", 10_000) + b"1" * 10_000),
    "cut short": ("weight.words.data_offsets", lambda raw: raw[:-4]),
    "a byte too long": ("file", lambda raw: raw + b"\0"),
    "a pickle": ("header length", lambda raw: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os."),
}


@pytest.mark.parametrize("name", RAW)
def test_malformed_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w"
    weight().save(path)
    field, change = RAW[name]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError) as error:
        load_weights(path)
    assert error.value.field == field


@cache
def sound_bytes(name: str, path: Path) -> bytes:
    """The bytes of a small weight, saved at ``path``."""
    registry.weight_class(name).from_dense(cases.matrix("uniform", 20, 20, 0.3, 1, "fp16")).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", registry.FORMATS)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_give_format_errors_only(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    raw = bytearray(sound_bytes(name, path))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        weights = load_weights(path)
    except FormatError:
        return
    for w in weights.values():
        w.to_dense()


GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.mark.parametrize("name", registry.FORMATS)
def test_files_say_the_version_of_the_format(name: str, tmp_path: Path) -> None:
    made = registry.weight_class(name)
    made.from_dense(cases.matrix("uniform", 20, 20, 0.1, 1, "fp16")).save(tmp_path / "w")
    inner = json.loads(read_header(tmp_path / "w").metadata["weights"])
    assert list(inner["weight"])[:2] == ["format", "version"]
    assert inner["weight"]["version"] == made.VERSION == {"tiled-csl": 1, "bitmap": 4, "slot24": 4}[name]
    for version in (KeyError, 0, 1, 2, 3, 4, -1, True, "2", 2.0, None, [2]):
        made.from_dense(cases.matrix("uniform", 20, 20, 0.1, 1, "fp16")).save(tmp_path / "w")
        rewrite(tmp_path / "w", described(version=version))
        said = 1 if version is KeyError else version
        if type(said) is int and said == made.VERSION:
            load_weights(tmp_path / "w")
            continue
        with pytest.raises(FormatError, match="encode the matrix again") as error:
            load_weights(tmp_path / "w", validate=False)
        assert error.value.field == "weight.version"
        assert error.value.expected.startswith(str(made.VERSION))
        assert error.value.got == repr(said)
        assert error.value.path == str(tmp_path / "w")


def test_files_of_an_older_version_are_refused() -> None:
    """A file from before bitmap had its second version, and one of a format that still has its first."""
    with pytest.raises(FormatError, match=r"encode the matrix again, got 1$") as error:
        load_weight(GOLDEN / "bitmap_v1.safetensors")
    assert error.value.field == "weight.version"
    assert load_weight(GOLDEN / "tiled_csl_v1_row.safetensors").format == "tiled-csl"
