# SPDX-License-Identifier: Apache-2.0
"""The streaming writer of safetensors files, and the index of shards."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from flashllm.errors import ArgumentError, FormatError
from flashllm.io.safetensors_file import DTYPE_NAMES, TensorFile, read_header
from flashllm.io.tensor_writer import TensorWriter, write_checkpoint_index


def samples() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    out = {
        f"layer.{name}": rng.integers(0, 100, (7, 5)).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        for name in DTYPE_NAMES
    }
    return out | {
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 4), np.float16),
        "transposed": rng.standard_normal((6, 9)).astype(np.float16).T,
        "strided": rng.standard_normal((20, 6))[::3, ::2],
        'Ω "quoted" \\ name': np.arange(3, dtype=np.uint8),
        "cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }


def check(path: Path, wanted: dict[str, Any], metadata: dict[str, str]) -> None:
    theirs = load_file(path)
    assert set(theirs) == set(wanted)
    with TensorFile(path) as file:
        assert file.header.metadata == metadata
        assert list(file.header.tensors) == list(wanted)  # in the order of adding
        for name, array in wanted.items():
            entry = file.header.tensors[name]
            for mmap in (False, True):
                found = file.read(entry, mmap=mmap)
                assert (found.shape, found.dtype) == (array.shape, array.dtype), name
                assert found.tobytes() == array.tobytes(), name
            assert theirs[name].shape == array.shape
            assert theirs[name].tobytes() == array.tobytes(), name


def test_both_readers_read_it(tmp_path: Path) -> None:
    arrays = samples()
    metadata = {"format": "pt", "note": 'ä "x"'}
    with TensorWriter(tmp_path / "a.safetensors", metadata=metadata, expected=arrays) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        assert writer.data_bytes == sum(array.nbytes for array in arrays.values())
    check(tmp_path / "a.safetensors", arrays, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


def test_no_tensor(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=[]):
        pass
    check(tmp_path / "a.safetensors", {}, {})


def test_parts(tmp_path: Path) -> None:
    matrix = np.arange(60, dtype=np.float16).reshape(12, 5)
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["m", "n"]) as writer:
        with writer.tensor("m", "F16", matrix.shape) as out:
            assert out.missing == 60
            out.write(matrix[:5])
            out.write(matrix[5:5])
            out.write(matrix[5, :2])
            assert out.missing == 33
            out.write(matrix[5, 2:])
            out.write(matrix[6:])
        with writer.tensor("n", "U8", [np.int64(2), 0]):
            pass
    check(tmp_path / "a.safetensors", {"m": matrix, "n": np.empty((2, 0), np.uint8)}, {})


def test_memory_is_that_of_a_part(tmp_path: Path) -> None:
    part = np.zeros((1 << 10, 1 << 10), np.float16)
    wide = np.zeros((64, 1 << 20), np.float16)[:, ::2]  # not in row-major order, and 64 MB
    tracemalloc.start()
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a", "b"]) as writer:
        with writer.tensor("a", "F16", (1 << 15, 1 << 10)) as out:
            for _ in range(32):
                out.write(part)
        writer.add("b", wide)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
    assert read_header(tmp_path / "a.safetensors").tensors["b"].shape == wide.shape


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"what was there before"])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException], old: bytes | None) -> None:
    path = tmp_path / "a.safetensors"
    if old is not None:
        path.write_bytes(old)
    before = sorted(tmp_path.iterdir())

    def interrupted() -> None:
        with TensorWriter(path, metadata={}, expected=["a"]) as writer:
            writer.add("a", np.zeros(1000, np.float32))
            assert len(list(tmp_path.iterdir())) == len(before) + 1
            raise error

    with pytest.raises(error):
        interrupted()
    assert sorted(tmp_path.iterdir()) == before
    assert old is None or path.read_bytes() == old


def test_a_caught_failure_inside_a_tensor_still_ends_the_file(tmp_path: Path) -> None:
    def part(writer: TensorWriter) -> None:
        with writer.tensor("a", "F32", (4,)) as out:
            out.write(np.zeros(2, np.float32))
            raise ValueError("mine")

    def whole() -> None:
        with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a"]) as writer:
            with pytest.raises(ValueError, match="mine"):
                part(writer)
            with pytest.raises(ArgumentError, match="every tensor whole"):
                writer.add("b", np.zeros(2, np.float32))

    with pytest.raises(ArgumentError, match="every tensor whole, got a part of a"):
        whole()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_touched_before_the_block(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="inside its with block"):
        writer.add("a", np.zeros(2, np.float32))
    with writer:
        writer.add("a", np.zeros(2, np.float32))
    with pytest.raises(ArgumentError, match="inside its with block"):
        writer.add("b", np.zeros(2, np.float32))
    with pytest.raises(ArgumentError, match="not used before"), writer:
        pass
    assert list(load_file(tmp_path / "a.safetensors")) == ["a"]


ZEROS = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a", ZEROS, "names given once, got 'a' twice"),
        ("", ZEROS, "non-empty strings"),
        ("__metadata__", ZEROS, "names of tensors"),
        (7, ZEROS, "names of tensors"),
        ("\ud800", ZEROS, "text that UTF-8 can hold"),
        ("b", np.zeros(4, np.complex64), "got complex64"),
        ("b", np.zeros(4, ">f4"), "got >f4"),
        ("b", np.zeros(4, object), "got object"),
        ("b", [1.0], "a NumPy array, got list"),
        ("b", np.zeros((1,) * 9, np.float32), "at most 8 dimensions"),
    ],
)
def test_refused_tensors_leave_the_file_sound(tmp_path: Path, name: Any, array: Any, words: str) -> None:
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a", "b"]) as writer:
        writer.add("a", ZEROS)
        with pytest.raises(ArgumentError, match=words):
            writer.add(name, array)
        writer.add("c", ZEROS + 1)
    check(tmp_path / "a.safetensors", {"a": ZEROS, "c": ZEROS + 1}, {})


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        ("float32", (4,), "dtype: expected one of F64"),
        ("F8_E4M3", (4,), "got 'F8_E4M3'"),
        (np.float32, (4,), "dtype: expected one of F64"),
        ("F32", (-1,), "of at least 0"),
        ("F32", (2.0,), "of at least 0"),
        ("F32", (2**61,), "of at least 0"),
        ("F32", (2**30, 2**30), "2\\^60 bytes"),
        ("F32", (0, 2**40, 2**40), "2\\^60 bytes"),
    ],
)
def test_refused_declarations(tmp_path: Path, dtype: Any, shape: Any, words: str) -> None:
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["b"]) as writer:
        with pytest.raises(ArgumentError, match=words), writer.tensor("b", dtype, shape):
            pass
        writer.add("b", ZEROS)
    check(tmp_path / "a.safetensors", {"b": ZEROS}, {})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([ZEROS[:3]], "expected 4 elements, got 3"),
        ([], "expected 4 elements, got 0"),
        ([ZEROS[:3], ZEROS[:2]], "at most 1 more elements, got 2"),
        ([ZEROS.astype(np.float16)], "dtype F32, got F16"),
    ],
)
def test_wrong_parts(tmp_path: Path, parts: list[Any], words: str) -> None:
    def write() -> None:
        with (
            TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["b"]) as writer,
            writer.tensor("b", "F32", (4,)) as out,
        ):
            for part in parts:
                out.write(part)

    with pytest.raises(ArgumentError, match=words):
        write()
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    with (
        TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a"]) as writer,
        writer.tensor("a", "F32", (4,)) as out,
    ):
        with pytest.raises(ArgumentError, match="a finished first"):
            writer.add("b", ZEROS)
        out.write(ZEROS)
    check(tmp_path / "a.safetensors", {"a": ZEROS}, {})


def test_room_of_the_header(tmp_path: Path) -> None:
    """Everything expected fits, however large its shapes; what is far beyond is refused, and the rest is written."""
    names = [f"layer.{i}.{'x' * (i % 50)}" for i in range(200)]
    most = np.empty((10**17, 0, *[1] * 6), np.float16)
    with TensorWriter(tmp_path / "a.safetensors", metadata={"k": "v"}, expected=names) as writer:
        for name in names:
            writer.add(name, most)
    check(tmp_path / "a.safetensors", dict.fromkeys(names, most), {"k": "v"})

    added = {}
    with TensorWriter(tmp_path / "a.safetensors", metadata={}, expected=["a"]) as writer:

        def add_many() -> None:
            for i in range(100):
                writer.add(f"t{i}", ZEROS)
                added[f"t{i}"] = ZEROS

        with pytest.raises(ArgumentError, match="no more tensors than fit into the header"):
            add_many()
        assert 1 <= len(added) < 10
    check(tmp_path / "a.safetensors", added, {})


def test_metadata_that_come_later(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a.safetensors", metadata={"a": "1", "b": "2"}, expected=[], spare_bytes=64) as writer:
        writer.describe({"b": "3", "c": "x" * 20})
        with pytest.raises(ArgumentError, match="metadata: expected a header of at most"):
            writer.describe({"d": "x" * 80})
        with pytest.raises(ArgumentError, match="strings to strings"):
            writer.describe({"d": 1})  # type: ignore[dict-item]
    check(tmp_path / "a.safetensors", {}, {"a": "1", "b": "3", "c": "x" * 20})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"a": 1}, "expected": []}, "metadata: expected a mapping of strings"),
        ({"metadata": {1: "a"}, "expected": []}, "metadata: expected a mapping of strings"),
        ({"metadata": {"a": "\udc00"}, "expected": []}, "metadata: expected text"),
        ({"metadata": {}, "expected": [1]}, "expected: expected names"),
        ({"metadata": {}, "expected": [], "spare_bytes": -1}, "spare_bytes"),
        ({"metadata": {}, "expected": [], "spare_bytes": 1.5}, "spare_bytes"),
        ({"metadata": {}, "expected": [], "spare_bytes": 1 << 30}, "header takes at most"),
    ],
)
def test_refused_arguments(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        TensorWriter(tmp_path / "a.safetensors", **options)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        TensorWriter(tmp_path / "none" / "a.safetensors", metadata={}, expected=[]),
    ):
        pass


def shards(folder: Path, content: dict[str, dict[str, Any]]) -> None:
    for file, arrays in content.items():
        with TensorWriter(folder / file, metadata={}, expected=arrays) as writer:
            for name, array in arrays.items():
                writer.add(name, array)


def test_index(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards(tmp_path, {first: {"b": ZEROS, "a": ZEROS}, second: {"c": np.zeros((3, 2), np.float16)}})
    path = write_checkpoint_index(tmp_path, [first, second])
    assert path == tmp_path / "model.safetensors.index.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "metadata": {"total_size": 44},
        "weight_map": {"a": first, "b": first, "c": second},
    }
    assert path.stat().st_mode & 0o777 == (tmp_path / first).stat().st_mode & 0o777
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ([], ArgumentError, "at least one file name"),
        (["a.safetensors", "a.safetensors"], ArgumentError, "given once"),
        (["a.safetensors", "same.safetensors"], ArgumentError, "'a' in a.safetensors and same.safetensors"),
        (["../a.safetensors"], ArgumentError, "without folders"),
        (["/a.safetensors"], ArgumentError, "without folders"),
        (["a.bin"], ArgumentError, "end in .safetensors"),
        ([3], ArgumentError, "end in .safetensors"),
        (["none.safetensors"], FileNotFoundError, "none"),
        (["fifo.safetensors"], FormatError, "a regular file, got a FIFO"),
        (["cut.safetensors"], FormatError, "cut.safetensors"),
    ],
)
def test_refused_index(tmp_path: Path, names: list[Any], error: type[Exception], words: str) -> None:
    shards(tmp_path, {"a.safetensors": {"a": ZEROS}, "same.safetensors": {"a": ZEROS}})
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    (tmp_path / "model.safetensors.index.json").write_text("old", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        write_checkpoint_index(tmp_path, names)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8") == "old"
