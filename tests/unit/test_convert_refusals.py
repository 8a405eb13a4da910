# SPDX-License-Identifier: Apache-2.0
"""Conversions that resume after a crash, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoints import DOWN, LAYERS, NORM, read, tensors_of, write

from flashllm.convert.back import to_hugging_face
from flashllm.convert.run import convert
from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
from flashllm.io.container import ContainerWriter
from flashllm.io.safetensors_file import write_file

pytestmark = pytest.mark.usefixtures("without_gpu")


def test_a_run_that_is_killed_goes_on(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(tiny_llama, tmp_path / "whole", format="bitmap")
    out = tmp_path / "out"
    real = ContainerWriter.add_weight
    count = 0

    def dies(self: Any, name: str, weight: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:  # in the second block
            raise KeyboardInterrupt
        real(self, name, weight)

    monkeypatch.setattr(ContainerWriter, "add_weight", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_llama, out, format="bitmap")
    monkeypatch.setattr(ContainerWriter, "add_weight", real)
    assert sorted(path.name for path in out.iterdir()) == ["block-00000.safetensors", "config.json", "tokenizer.json"]
    (out / ".block-00001.safetensors.77-0123abcd.tmp").write_bytes(b"of a process that got SIGKILL")
    stamp = (out / "block-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ArgumentError, match="--resume"):
        convert(tiny_llama, out, format="bitmap")
    done: list[tuple[str, int]] = []
    made = convert(
        tiny_llama, out, format="bitmap", resume=True, progress=lambda name, files: done.append((name, files))
    )
    assert made.kept_files == 1
    assert sum(files for _, files in done) == LAYERS + 1
    assert (out / "block-00000.safetensors").stat().st_mtime_ns == stamp
    assert made.manifest == whole.manifest
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name
    again = convert(tiny_llama, out, format="bitmap", resume=True)
    assert (again.kept_files, again.seconds.matrix_bytes, again.seconds.whole_gbps) == (LAYERS + 1, 0, None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "slot24"}, "format"),
        ({"fuse": False}, "fuse"),
        ({"dtype": "bf16"}, "dtype"),
        ({"format": "auto", "n": 64}, "format"),
    ],
)
def test_results_of_other_options_are_refused(
    tmp_path: Path, tiny_llama: Path, options: dict[str, Any], named: str
) -> None:  # fmt: skip
    out = tmp_path / "out"
    convert(tiny_llama, out, format="bitmap")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ArgumentError, match=f"of another: {named} "):
        convert(tiny_llama, out, resume=True, **{"format": "bitmap", **options})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_results_of_another_checkpoint_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_llama, out, format="bitmap")
    tensors = read(tiny_llama)
    tensors[f"{DOWN}.weight"][5, 5] = 2.5
    other = tmp_path / "other"
    write(other, "llama", tensors)
    with pytest.raises(ArgumentError, match="of another: name 'llama', now 'other'"):
        convert(other, out, format="bitmap", resume=True)
    write_file(tiny_llama / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ArgumentError, match="of another: fingerprint"):
        convert(tiny_llama, out, format="bitmap", resume=True)


def test_directories_with_other_things_are_left_alone(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ArgumentError, match=r"'model\.safetensors' in"):
        convert(tiny_llama, tiny_llama, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="a file at"):
        convert(tiny_llama, tmp_path / "file")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"the config\.json of the same model"):
        convert(tiny_llama, out, format="bitmap", resume=True)
    assert (out / "config.json").read_text() == "{}"
    with pytest.raises(ArgumentError, match="new or empty"):
        convert(tiny_llama, out)


def test_a_block_that_is_damaged_is_not_kept(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_llama, out, format="bitmap")
    path = out / "block-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(FormatError, match=r"block-00001\.safetensors"):
        convert(tiny_llama, out, format="bitmap", resume=True)
    path.write_bytes((out / "block-00000.safetensors").read_bytes())
    with pytest.raises(FormatError, match=r"part\.file: expected 'block-00001\.safetensors'"):
        convert(tiny_llama, out, format="bitmap", resume=True)


def _without(name: str) -> Any:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def _config(**entries: Any) -> Any:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config.update(entries)

    return change


def _tensor(name: str, array: NDArray[Any]) -> Any:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors[name] = array

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_without(f"{DOWN}.weight"), f"{DOWN}.weight"),
        (_config(model_type="mamba"), "model_type"),
        (_config(model_type=["llama"]), "model_type"),
        (_config(num_hidden_layers=0), "num_hidden_layers"),
        (_config(num_hidden_layers=True), "num_hidden_layers"),
        (_config(num_hidden_layers=1), NORM),
        (_config(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight"),
        (_tensor("model.layers.01.x", np.zeros(3, np.float16)), "model.layers.01.x"),
        (_tensor("model.layers.x", np.zeros(3, np.float16)), "model.layers.x"),
        (_tensor(f"{DOWN}.weight", np.zeros(3, np.float16)), f"{DOWN}.weight"),
        (_tensor(f"{DOWN}.weight", np.zeros((3, 0), np.float16)), f"{DOWN}.weight"),
        (_tensor(f"{DOWN}.weight", np.zeros((40, 72), np.int32)), f"{DOWN}.weight.dtype"),
        (_tensor("model.steps", np.zeros(1, np.uint8)), "model.steps.dtype"),
        (_tensor(f"{DOWN}.bias", np.zeros(41, np.float16)), f"{DOWN}.bias"),
    ],
)
def test_checkpoints_that_cannot_be_converted(tmp_path: Path, change: Any, field: str) -> None:
    tensors, config = tensors_of("llama", "fp16"), {}
    change(tensors, config)
    source = write(tmp_path / "model", "llama", tensors, **config)
    with pytest.raises(FormatError) as error:
        convert(source, tmp_path / "out", format="bitmap")
    assert error.value.field == field
    assert not (tmp_path / "out").exists()


def test_arguments(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "out"
    for options, argument in (
        ({"format": "csr"}, "format"), ({"dtype": "fp32"}, "dtype"), ({"n": 0}, "n"), ({"n": ()}, "n"),
        ({"device": "tpu"}, "device"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError) as error:
            convert(tiny_llama, out, **options)  # type: ignore[arg-type]
        assert error.value.argument == argument
    with pytest.raises(MissingDependencyError, match="no GPU"):
        convert(tiny_llama, out, device="gpu")
    assert not out.exists()
    convert(tiny_llama, out, format="bitmap")
    with pytest.raises(ArgumentError, match="shard_bytes"):
        to_hugging_face(out, tmp_path / "back", shard_bytes=0)
    with pytest.raises(ArgumentError, match="flashllm convert"):
        to_hugging_face(tiny_llama, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ArgumentError, match="new or empty"):
        to_hugging_face(out, tiny_llama)
