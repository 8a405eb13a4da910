# SPDX-License-Identifier: Apache-2.0
"""Directories of sparse weights: what is read, what a manifest must say, and files that do not hold it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import CONFIGS, DOWN, NORM, tensors_of, write

import weight_cases as cases
from flashllm.convert.run import convert
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.bitmap import Bitmap
from flashllm.io.container import ContainerFile, ContainerWriter
from flashllm.io.manifest import DENSE, MANIFEST_FILE, parse_manifest, parse_part, part_text
from flashllm.io.safetensors_file import read_header
from flashllm.io.sparse_model import SparseModel, is_sparse_model
from flashllm.io.tensor_writer import TensorWriter

BLOCK = "block-00000.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sparse")
    convert(write(root / "model", "llama", tensors_of("llama", "fp16")), root / "out", format="bitmap")
    return root / "out"


@pytest.fixture
def directory(tmp_path: Path, made: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("mmap", [False, True])
def test_reads_everything(made: Path, mmap: bool) -> None:
    model = SparseModel(made)
    tensors = tensors_of("llama", "fp16")
    assert model.config == CONFIGS["llama"]
    assert list(model.companions()) == ["tokenizer.json"]
    assert len(model.manifest.weights) == 8
    weight = model.weight(DOWN, mmap=mmap)
    assert isinstance(weight, Bitmap)
    np.testing.assert_array_equal(weight.to_dense().view(np.uint16), cases.pruned(tensors[f"{DOWN}.weight"]))
    assert isinstance(model.matrix(DOWN), Bitmap)
    np.testing.assert_array_equal(model.dense(NORM, mmap=mmap).view(np.uint16), tensors[NORM].view(np.uint16))
    assert model.entry(DOWN).members[0].name == f"{DOWN}.weight"


def test_a_dense_matrix_has_the_name_of_its_tensor(tmp_path: Path) -> None:
    tensors = tensors_of("llama", "bf16")
    convert(write(tmp_path / "model", "llama", tensors), tmp_path / "out", format=DENSE)
    model = SparseModel(tmp_path / "out")
    for found in (model.matrix(DOWN), model.dense(f"{DOWN}.weight")):
        np.testing.assert_array_equal(found.view(np.uint16), tensors[f"{DOWN}.weight"].view(np.uint16))  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="which is dense"):
        model.weight(DOWN)
    with pytest.raises(ArgumentError, match="stored dense"):
        model.dense(DOWN)


def test_names_and_paths(tmp_path: Path, made: Path) -> None:
    model = SparseModel(made)
    for call in (model.weight, model.dense, model.matrix, model.entry):
        with pytest.raises(ArgumentError, match="'absent'"):
            call("absent")
    with pytest.raises(ArgumentError, match="stored dense"):
        model.dense(f"{DOWN}.weight")
    assert is_sparse_model(made)
    assert not is_sparse_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        SparseModel(tmp_path / "none")
    with pytest.raises(ArgumentError, match="flashllm convert"):
        SparseModel(tmp_path)


def test_files_that_are_missing_damaged_or_no_files(directory: Path) -> None:
    model = SparseModel(directory)
    raw = (directory / BLOCK).read_bytes()
    (directory / BLOCK).unlink()
    with pytest.raises(FileNotFoundError):
        model.weight(DOWN)
    (directory / BLOCK).write_bytes(raw[:-2])
    with pytest.raises(FormatError, match=BLOCK):
        model.weight(DOWN)
    (directory / BLOCK).unlink()
    os.mkfifo(directory / BLOCK)
    with pytest.raises(FormatError, match="a FIFO"):
        model.weight(DOWN)
    for name in ("config.json", MANIFEST_FILE):
        text = (directory / name).read_text()
        for bad in (text[:-3], "[]", "\ud800", '{"a": 1, "a": 2}'):
            (directory / name).write_text(bad, errors="surrogatepass")
            with pytest.raises(FormatError, match=name):
                SparseModel(directory)
        (directory / name).write_text(text)


def test_a_block_of_another_conversion_is_seen(tmp_path: Path, directory: Path) -> None:
    tensors = tensors_of("llama", "fp16", density=0.2)
    convert(write(tmp_path / "model", "llama", tensors), tmp_path / "other", format="bitmap")
    shutil.copy(tmp_path / "other" / BLOCK, directory / BLOCK)
    model = SparseModel(directory)
    with pytest.raises(FormatError, match=r"__metadata__\.part"):
        model.weight(DOWN)
    model.weight("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("change", ["nnz", "shape", "no weight", "dense shape", "dense type", "no tensor", "no note"])
def test_a_file_that_does_not_hold_what_the_manifest_says(directory: Path, change: str) -> None:
    path = directory / BLOCK
    note = read_header(path).metadata["part"]
    with ContainerFile(path) as file:
        weights = {name: file.weight(name) for name in file.weights}
        buffers = {f"{name}.{buffer}" for name, weight in weights.items() for buffer in weight.BUFFERS}
        tensors = {name: file.tensor(name) for name in file.header.tensors if name not in buffers}
    norm = "model.layers.0.input_layernorm.weight"
    if change in ("nnz", "shape"):
        rows = slice(None, -1) if change == "shape" else slice(None)
        dense = weights[DOWN].to_dense()[rows].copy()
        dense[0] = 0
        weights[DOWN] = Bitmap.from_dense(dense)
    elif change == "no weight":
        del weights[DOWN]
    elif change == "dense shape":
        tensors[norm] = tensors[norm][:-1]
    elif change == "dense type":
        tensors[norm] = tensors[norm].astype(np.float32)
    elif change == "no tensor":
        del tensors[norm]
    with ContainerWriter(path, weights=weights, tensors=tensors, note_bytes=len(note)) as writer:
        for name, weight in weights.items():
            writer.add_weight(name, weight)
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        if change != "no note":
            writer.note("part", note)
    model = SparseModel(directory)
    with pytest.raises(FormatError) as error:
        model.dense(norm) if change in ("dense shape", "dense type", "no tensor") else model.weight(DOWN)
    assert error.value.path == str(path)


def test_values_are_validated(directory: Path) -> None:
    path = directory / BLOCK
    header = read_header(path)
    entry = header.tensors[f"{DOWN}.fronts"]
    raw = bytearray(path.read_bytes())
    raw[entry.start : entry.start + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(FormatError):
        SparseModel(directory).weight(DOWN)
    assert SparseModel(directory).weight(DOWN, validate=False).nnz > 0


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every entry of JSON is, of lists the first alone."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in items:
        yield (*at, key)
        yield from _places(one, (*at, key))


_FREE_TEXT = ("why", "gpu", "flashllm", "model_type", "name", "fingerprint")


def test_every_field_of_a_manifest_is_checked(made: Path) -> None:
    text = (made / MANIFEST_FILE).read_text()
    sound = json.loads(text)
    assert parse_manifest(sound, path="m").as_json() == sound
    places = list(_places(sound))
    assert len(places) == 60
    for place in places:
        names = [key for key in place if isinstance(key, str)]
        for bad in (None, -1, True, "", "x\0y", 1.5, [], {}, [{}], 1e300, 2**70, KeyError):
            value = json.loads(text)
            inner = value
            for key in place[:-1]:
                inner = inner[key]
            last = place[-1]
            if bad is KeyError:
                if isinstance(last, int):
                    continue  # of a list that then is shorter
                del inner[last]
            else:
                if isinstance(bad, str) and bad and (names[-1] in _FREE_TEXT or names[-2:] == ["members", "dtype"]):
                    continue
                if inner[last] == bad and type(inner[last]) is type(bad):
                    continue
                inner[last] = bad
            with pytest.raises(FormatError):
                parse_manifest(value, path="m")


@pytest.mark.parametrize("place", ["weights", "tensors"])
def test_names_and_files_of_a_manifest_are_given_once(made: Path, place: str) -> None:
    sound = json.loads((made / MANIFEST_FILE).read_text())
    sound["parts"][0][place].append(sound["parts"][0][place][0])
    with pytest.raises(FormatError, match=r"parts\.name: expected names given once"):
        parse_manifest(sound, path="m")
    sound = json.loads((made / MANIFEST_FILE).read_text())
    sound["parts"].append({"file": sound["parts"][0]["file"], "weights": [], "tensors": []})
    with pytest.raises(FormatError, match=r"parts\.file: expected names given once"):
        parse_manifest(sound, path="m")


@pytest.mark.parametrize(
    "file", ["../block-00000.safetensors", "/etc/passwd", "block-0.safetensors", "model.safetensors"]
)
def test_a_manifest_names_files_of_its_own_directory(made: Path, file: str) -> None:
    value = json.loads((made / MANIFEST_FILE).read_text())
    value["parts"][0]["file"] = file
    with pytest.raises(FormatError, match=r"parts\[0\]\.file"):
        parse_manifest(value, path="m")


def test_the_manifest_can_be_made_from_the_files_alone(made: Path) -> None:
    manifest = SparseModel(made).manifest
    for part in manifest.parts:
        text = read_header(made / part.file).metadata["part"]
        assert parse_part(text, file=part.file, path="m") == (manifest.identity, part)
        assert part_text(manifest.identity, part) == text


def test_a_container_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weight = Bitmap.from_dense(cases.matrix("uniform", 40, 72, 0.3, 1, "fp16"))

    def writer(**options: Any) -> ContainerWriter:
        return ContainerWriter(path, weights=["a"], tensors=["b"], **options)

    def fill(out: ContainerWriter, spoil: Any) -> None:
        with out:
            out.add_weight("a", weight)
            spoil(out)

    for spoil, error in (
        (lambda w: w.add_weight("a", weight), ArgumentError),  # twice
        (lambda w: w.add_weight("c", np.zeros(3)), ArgumentError),
        (lambda w: w.add_tensor("a.masks", np.zeros(3, np.float16)), ArgumentError),
        (lambda w: w.note("weights", "{}"), ArgumentError),
        (lambda w: w.note("part", "x" * 10**5), ArgumentError),  # longer than it was said to be
        (lambda w: 1 / 0, ZeroDivisionError),
    ):  # fmt: skip
        with pytest.raises(error):
            fill(writer(), spoil)
        assert list(tmp_path.iterdir()) == []
    with writer(note_bytes=100) as out:
        out.add_weight("a", weight)
        with out.tensor("b", "F16", (3,)) as part:
            part.write(np.ones(3, np.float16))
        out.note("part", '"' * 100)
    with ContainerFile(path) as file:
        assert file.weights == ("a",)
        assert file.header.metadata["part"] == '"' * 100
        np.testing.assert_array_equal(file.weight("a").masks, weight.masks)
        np.testing.assert_array_equal(file.tensor("b"), np.ones(3, np.float16))
        for call in (file.weight, file.tensor):
            with pytest.raises(ArgumentError, match="'absent'"):
                call("absent")
    with TensorWriter(tmp_path / "plain", metadata={}, expected=["a"]) as plain:
        plain.add("a", np.zeros(1, np.float16))
    with pytest.raises(FormatError, match=r"__metadata__\.format"):
        ContainerFile(tmp_path / "plain")
