# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories as checkpoints: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError
from flashllm.io import hf_directory
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.hf_directory import COMPANIONS, HfCheckpoint
from flashllm.io.safetensors_file import write_file
from flashllm.io.tensor_writer import TensorWriter, write_checkpoint_index
from flashllm.models.layout import LAYOUTS

Tensors = dict[str, NDArray[Any]]
HIDDEN, FF, VOCAB, LAYERS = 8, 16, 11, 3
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": FF, "num_hidden_layers": LAYERS},
    "llama": {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FF, "num_hidden_layers": LAYERS},
}
INDEX = "model.safetensors.index.json"


def model(kind: str, dtype: Any) -> Tensors:
    """All tensors of a small model; any 16 bits, infinities and NaN among them."""
    layout, rng = LAYOUTS[kind], np.random.default_rng(4)

    def bits(*shape: int) -> NDArray[Any]:
        return rng.integers(0, 2**16, shape, dtype=np.uint16).view(dtype)

    out = {layout.embedding: bits(VOCAB, HIDDEN), **{name: bits(HIDDEN) for name in layout.outside}}
    for layer in range(LAYERS):
        out |= {name: bits(FF, HIDDEN) for name in layout.linears(layer)}
        out[f"{layout.prefix(layer)}.norm.weight"] = bits(HIDDEN)
    return out


def single(folder: Path, tensors: Tensors, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def sharded(folder: Path, tensors: Tensors, config: Any, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, shard in enumerate(names):
        part = dict(list(tensors.items())[i::count])
        with TensorWriter(folder / shard, metadata={"format": "pt"}, expected=part) as writer:
            for name, array in part.items():
                writer.add(name, array)
    write_checkpoint_index(folder, names)
    return folder


def same(checkpoint: Any, wanted: Tensors) -> None:
    assert set(checkpoint.tensors) == set(wanted)
    for name, array in wanted.items():
        found, info = checkpoint.read(name), checkpoint.info(name)
        kind = {"float16": "F16", "bfloat16": "BF16"}[str(array.dtype)]
        assert (info.name, info.shape, info.dtype, info.stored) == (name, array.shape, kind, kind)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.flags.c_contiguous
        assert not found.flags.writeable, "mapped"
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("write", [single, sharded])
def test_every_bit(tmp_path: Path, kind: str, dtype: Any, write: Callable[..., Path]) -> None:
    tensors = model(kind, dtype)
    with open_checkpoint(write(tmp_path / "m", tensors, CONFIGS[kind])) as checkpoint:
        assert isinstance(checkpoint, HfCheckpoint)
        assert checkpoint.config == CONFIGS[kind]
        assert checkpoint.path == tmp_path / "m"
        same(checkpoint, tensors)


def test_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    tensors = model("llama", np.float16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = single(tmp_path, tensors, CONFIGS["llama"] | {"tie_word_embeddings": True})
    with HfCheckpoint(path) as checkpoint:
        same(checkpoint, tensors)


@pytest.mark.parametrize("write", [single, sharded])
def test_older_names_of_opt(tmp_path: Path, write: Callable[..., Path]) -> None:
    tensors = model("opt", np.float16)
    older = {name.removeprefix("model."): array for name, array in tensors.items()}
    with HfCheckpoint(write(tmp_path / "opt", older, CONFIGS["opt"])) as checkpoint:
        same(checkpoint, tensors)
    with HfCheckpoint(write(tmp_path / "other", older, CONFIGS["llama"])) as checkpoint:
        same(checkpoint, older)
    twice = older | {"model.decoder.final_layer_norm.bias": older["decoder.final_layer_norm.bias"]}
    with pytest.raises(FormatError, match=r"decoder\.final_layer_norm\.bias: expected each tensor once"):
        HfCheckpoint(write(tmp_path / "twice", twice, CONFIGS["opt"]))


def test_links_as_in_the_cache(tmp_path: Path) -> None:
    """The cache of Hugging Face keeps files elsewhere and links to them."""
    tensors = model("llama", np.float16)
    blobs = sharded(tmp_path / "blobs", tensors, CONFIGS["llama"])
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    with HfCheckpoint(snapshot) as checkpoint:
        same(checkpoint, tensors)


def test_companions(tmp_path: Path) -> None:
    path = single(tmp_path, model("opt", np.float16), CONFIGS["opt"])
    with HfCheckpoint(path) as checkpoint:
        assert checkpoint.companions() == {}
        for name in ("tokenizer.json", "merges.txt", "README.md", "generation_config.json"):
            (path / name).write_text("{}", encoding="utf-8")
        (path / "vocab.json").mkdir()
        found = checkpoint.companions()
    assert found == {name: path / name for name in ("tokenizer.json", "merges.txt", "generation_config.json")}
    assert {"tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"} < set(COMPANIONS)


def test_names_and_closing(tmp_path: Path) -> None:
    tensors = model("llama", np.float16)
    before = len(list(Path("/proc/self/fd").iterdir()))
    checkpoint = HfCheckpoint(sharded(tmp_path, tensors, CONFIGS["llama"]))
    with pytest.raises(ArgumentError, match="'nothing'"):
        checkpoint.read("nothing")
    kept = checkpoint.read("model.norm.weight")
    checkpoint.close()
    checkpoint.close()
    assert kept.tobytes() == tensors["model.norm.weight"].tobytes()
    with pytest.raises(ArgumentError, match="closed"):
        checkpoint.read("model.norm.weight")
    del kept
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    tensors = model("llama", np.float16)
    sharded(tmp_path, model("opt", np.float16), CONFIGS["opt"])
    with HfCheckpoint(single(tmp_path, tensors, CONFIGS["llama"])) as checkpoint:
        same(checkpoint, tensors)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"x")
    for path, error, words in (
        (tmp_path / "none", FileNotFoundError, "found nothing"),
        (tmp_path / "file.bin", ArgumentError, "a directory with config.json, or a .gguf file"),
        (tmp_path, FileNotFoundError, "config.json"),
    ):
        with pytest.raises(error, match=words):
            open_checkpoint(path)
    with pytest.raises(ArgumentError, match=r"a directory with config\.json"):
        HfCheckpoint(tmp_path / "file.bin")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FormatError, match=r"files: expected model\.safetensors or model.*\.json, got neither$"):
        open_checkpoint(tmp_path)
    (tmp_path / "block-00000.safetensors").touch()
    with pytest.raises(FormatError, match=r"got neither, but files of a conversion: finish it with --resume$"):
        open_checkpoint(tmp_path)


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["opt"]), encoding="utf-8")
    (tmp_path / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(FormatError, match=f"{name}: a pickle.*convert it to safetensors"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a JSON object"),
        ("[1]", "a JSON object, got list"),
        ("null", "a JSON object"),
        ('{"a": 1, "a": 2}', "'a' more than once"),
        ('{"a": ' * 100_000, "a JSON object"),
        (b"{\xff}", "UTF-8, got byte 0xff"),
        ('{"a": ' + "9" * 10_000 + "}", "a JSON object"),
        (" " * (1 << 20) + "{}", "at most 1,048,576 bytes"),
    ],
    ids=range(8),
)
def test_refused_config(tmp_path: Path, text: str | bytes, words: str) -> None:
    single(tmp_path, model("opt", np.float16), {})
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    change(index)
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "a\0.safetensors", "..", "", ".",
     "a\n.safetensors", "pytorch_model.bin", INDEX, 7, None, ["x.safetensors"], "sub/../x.safetensors"],
    ids=repr,
)  # fmt: skip
def test_shards_elsewhere(tmp_path: Path, shard: Any) -> None:
    tensors = model("llama", np.float16)
    path = sharded(tmp_path / "m", tensors, CONFIGS["llama"])
    write_file(tmp_path / "x.safetensors", {NORM: tensors[NORM]}, {})
    edited(path, lambda index: index["weight_map"].update({NORM: shard}))
    with pytest.raises(FormatError, match="without folders") as caught:
        open_checkpoint(path)
    assert caught.value.field == f"weight_map.{NORM}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), "weight_map: expected an object"),
        (lambda index: index.update(weight_map={}), "weight_map: expected an object"),
        (lambda index: index.update(weight_map=[]), "weight_map: expected an object"),
        (lambda index: index["weight_map"].update(more=FIRST), f"weight_map.more: expected a tensor of {FIRST}"),
        (lambda index: index["weight_map"].pop(NORM), f"{NORM}: expected in weight_map"),
        (lambda index: index["weight_map"].update({f"w{i}": f"{i}.safetensors" for i in range(1001)}), "at most 1000"),
    ],
)
def test_refused_index(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    path = sharded(tmp_path, model("llama", np.float16), CONFIGS["llama"])
    edited(path, change)
    with pytest.raises(FormatError, match=words):
        open_checkpoint(path)


def test_tensor_in_another_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path, model("llama", np.float16), CONFIGS["llama"])
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    other = SECOND if index["weight_map"][NORM] == FIRST else FIRST
    edited(path, lambda index: index["weight_map"].update({NORM: other}))
    with pytest.raises(FormatError, match=f"{NORM}: expected"):
        open_checkpoint(path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = model("llama", np.float16)
    path = sharded(tmp_path, tensors, CONFIGS["llama"])
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    more = {"model.extra": tensors[NORM]}
    for number in "45":
        write_file(path / f"{number}.safetensors", {f"own.{number}": tensors[NORM], **more}, {})
        index["weight_map"][f"own.{number}"] = f"{number}.safetensors"
    index["weight_map"]["model.extra"] = "4.safetensors"
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(FormatError, match=r"model\.extra: expected a tensor in one shard, got one in 4\.safetensors"):
        open_checkpoint(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    """FIFOs, directories, loops and links that lead nowhere: each gives an error, and nothing waits."""
    tensors = model("llama", np.float16)
    for number, name in enumerate(("config.json", "model.safetensors", INDEX, FIRST)):
        for kind in ("fifo", "folder", "loop", "nowhere"):
            write = single if name == "model.safetensors" else sharded
            path = write(tmp_path / f"{number}{kind}", tensors, CONFIGS["llama"])
            place = path / name
            place.unlink()
            if kind == "fifo":
                os.mkfifo(place)
            elif kind == "folder":
                place.mkdir()
            else:
                place.symlink_to(place.name if kind == "loop" else "nothing")
            error = FileNotFoundError if kind == "nowhere" else FormatError
            with pytest.raises(error, match=name if kind == "nowhere" else "a regular file"):
                open_checkpoint(path)


def test_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any part of any file missing or changed: only errors of the package, and little memory."""
    monkeypatch.setattr(hf_directory, "_MAX_SHARDS", 8)
    path = sharded(tmp_path, model("llama", np.float16), CONFIGS["llama"])
    rng = random.Random(20260104)
    outcomes = {"read": 0, "refused": 0}
    before = len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    for name in ("config.json", INDEX, FIRST):
        whole = (path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            position = rng.randrange(min(len(whole), 2000))
            if rng.random() < 0.4:
                del damaged[position:]
            else:
                damaged[position : position + rng.randrange(3)] = rng.choice(
                    [b"\xff", b"0", b'"', b"\0" * 8, b"}{", b"/"]
                )
            (path / name).write_bytes(damaged)
            try:
                with open_checkpoint(path) as checkpoint:
                    for tensor, info in checkpoint.tensors.items():
                        assert checkpoint.read(tensor).shape == info.shape
                outcomes["read"] += 1
            except (FormatError, ArgumentError, OSError):
                outcomes["refused"] += 1
        (path / name).write_bytes(whole)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 10
    assert len(list(Path("/proc/self/fd").iterdir())) == before
