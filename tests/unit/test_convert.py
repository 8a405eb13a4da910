# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to sparse weights and back: every bit, every number of the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoints import CONFIGS, DOWN, LAYERS, check_back, read, tensors_of, write

import weight_cases as cases
from flashllm import registry
from flashllm.convert.run import Conversion, convert
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.bits import numpy_dtype
from flashllm.io.container import load_weights
from flashllm.io.manifest import DENSE
from flashllm.io.safetensors_file import read_header, write_file
from flashllm.io.sparse_model import SparseModel
from flashllm.models.layout import layout_of

pytestmark = pytest.mark.usefixtures("without_gpu")


EVERY_FORMAT = [
    (kind, format, dtype, fuse)
    for kind, dtype, fuse in (("opt", "fp16", True), ("llama", "bf16", True), ("llama", "fp16", False))
    for format in (*registry.FORMATS, DENSE)
]


@pytest.mark.parametrize(("kind", "format", "dtype", "fuse"), [*EVERY_FORMAT, ("opt", "auto", "bf16", False)])
def test_there_and_back(tmp_path: Path, kind: str, format: str, dtype: str, fuse: bool) -> None:
    tensors = tensors_of(kind, dtype)
    source = write(tmp_path / "model", kind, tensors)
    made = convert(source, tmp_path / "out", format=format, fuse=fuse)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "block-00000.safetensors", "block-00001.safetensors", "config.json", "flashllm.json", "outside.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    check_manifest(made, tensors, kind, format, dtype, fuse)
    assert SparseModel(tmp_path / "out").manifest == made.manifest
    check_back(tmp_path / "out", tmp_path / "back", tensors, shard_bytes=20_000 if fuse else 10**9)
    names = sorted(path.name for path in (tmp_path / "back").iterdir())
    if fuse:
        assert "model.safetensors.index.json" in names
        assert "model-00001-of-00004.safetensors" in names
    else:
        assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {**CONFIGS[kind], "torch_dtype": {"fp16": "float16", "bf16": "bfloat16"}[dtype]}


def check_manifest(
    made: Conversion, tensors: Mapping[str, NDArray[Any]], kind: str, format: str, dtype: str, fuse: bool
) -> None:
    """Every number of the manifest, from the dense matrices."""
    layout = layout_of(kind)
    wanted = []
    for layer in range(LAYERS):
        for group in layout.groups:
            members = [f"{layout.prefix(layer)}.{member}.weight" for member in group.members]
            if fuse:
                wanted.append((f"{layout.prefix(layer)}.{group.name}", members))
            else:
                wanted += [(member.removesuffix(".weight"), [member]) for member in members]
    weights = made.manifest.weights
    assert [(name, [m.name for m in w.members]) for name, w in weights.items()] == wanted
    nnz = elements = stored = 0
    for name, members in wanted:
        dense = np.vstack([tensors[member].view(np.uint16) for member in members]).view(numpy_dtype(dtype))  # type: ignore[arg-type]
        w = weights[name]
        kept = dense.view(np.uint16) & 0x7FFF != 0
        tiles = [
            int(kept[row : row + 128, column : column + 64].sum())
            for row in range(0, dense.shape[0], 128)
            for column in range(0, dense.shape[1], 64)
        ]
        assert (w.shape, w.dtype, w.nnz) == (dense.shape, dtype, int(kept.sum()))
        assert w.sparsity == 1 - w.nnz / dense.size
        assert [m.rows for m in w.members] == [len(tensors[member]) for member in members]
        assert {m.dtype for m in w.members} == {"F16" if dtype == "fp16" else "BF16"}
        assert (w.changed, w.became_zero) == (0, 0)
        if format in ("auto", DENSE):  # so small that nothing is faster than dense
            assert (w.format, w.bytes_stored, w.max_tile_nnz) == (DENSE, 2 * dense.size, None)
            assert w.why == "asked for" if format == DENSE else w.why.startswith("faster as it is: ")
        else:
            encoded = registry.weight_class(format).from_dense(dense)
            assert (w.format, w.bytes_stored, w.max_tile_nnz) == (format, encoded.nbytes, max(tiles))
            assert w.why == "asked for"
        nnz, elements, stored = nnz + w.nnz, elements + dense.size, stored + w.bytes_stored
    used = {member for _, members in wanted for member in members}
    totals = made.manifest.totals()
    assert (totals["nnz"], totals["elements"], totals["bytes_stored"]) == (nnz, elements, stored)
    assert totals["other_bytes"] == sum(array.nbytes for name, array in tensors.items() if name not in used)
    assert totals["sparse_weights"] == (0 if format in ("auto", DENSE) else len(wanted))
    others = [m.name for t in made.manifest.tensors.values() for m in t.members]
    assert sorted(others) == sorted(set(tensors) - used)
    assert made.kept_files == 0
    assert made.seconds.matrix_bytes == 2 * elements


def test_a_block_is_a_container_that_any_reader_of_ours_takes(tmp_path: Path, tiny_llama: Path) -> None:
    convert(tiny_llama, tmp_path / "out", format="bitmap")
    tensors = read(tiny_llama)
    path = tmp_path / "out" / "block-00001.safetensors"
    weights = load_weights(path)
    prefix = "model.layers.1"
    assert list(weights) == [
        f"{prefix}.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    rows = np.vstack([tensors[f"{prefix}.mlp.{one}_proj.weight"].view(np.uint16) for one in ("gate", "up")])
    np.testing.assert_array_equal(
        weights[f"{prefix}.mlp.gate_up_proj"].to_dense().view(np.uint16), cases.pruned(rows)
    )  # fmt: skip
    entries = read_header(path).tensors.values()
    assert all((e.start - min(o.start for o in entries)) % {"U32": 4, "I32": 4, "F16": 2}.get(e.dtype, 1) == 0
               for e in entries)  # fmt: skip
    assert load_weights(tmp_path / "out" / "outside.safetensors") == {}


def test_biases_are_joined_as_their_matrices_are(tmp_path: Path) -> None:
    tensors = tensors_of("opt", "fp16")
    made = convert(write(tmp_path / "model", "opt", tensors), tmp_path / "out", format="tiled-csl")
    model = SparseModel(tmp_path / "out")
    prefix = "model.decoder.layers.0.self_attn"
    wanted = np.concatenate([tensors[f"{prefix}.{one}_proj.bias"].view(np.uint16) for one in "qkv"])
    np.testing.assert_array_equal(model.dense(f"{prefix}.qkv_proj.bias").view(np.uint16), wanted)
    assert [m.rows for m in made.manifest.tensors[f"{prefix}.qkv_proj.bias"].members] == [40, 40, 40]
    with pytest.raises(ArgumentError, match="stored dense"):
        model.dense(f"{prefix}.q_proj.bias")


@pytest.mark.parametrize("change", ["a missing bias", "another type", "another type of bias"])
def test_members_that_do_not_go_together_stay_alone(tmp_path: Path, change: str) -> None:
    tensors = tensors_of("opt", "fp16")
    prefix = "model.decoder.layers.1.self_attn"
    if change == "a missing bias":
        del tensors[f"{prefix}.k_proj.bias"]
    else:
        name = f"{prefix}.k_proj.{'weight' if change == 'another type' else 'bias'}"
        tensors[name] = tensors[name].view(np.uint16).view(numpy_dtype("bf16"))
    made = convert(write(tmp_path / "model", "opt", tensors), tmp_path / "out", format="bitmap")
    weights = made.manifest.weights
    assert f"{prefix}.qkv_proj" not in weights
    assert all("differ" in weights[f"{prefix}.{one}_proj"].why for one in "qkv")
    assert "model.decoder.layers.0.self_attn.qkv_proj" in weights
    check_back(tmp_path / "out", tmp_path / "back", tensors)


@pytest.mark.parametrize(("dtype", "stored"), [("keep", "fp16"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_float32_is_rounded_and_counted(tmp_path: Path, dtype: str, stored: str) -> None:
    rng = np.random.default_rng(3)
    tensors = {
        name: rng.normal(size=array.shape).astype(np.float32) for name, array in tensors_of("llama", "fp16").items()
    }
    matrix = tensors[f"{DOWN}.weight"]
    matrix[rng.random(matrix.shape) < 0.7] = 0
    matrix[0, :3] = 1e-12, -1e-12, 1.5  # bf16 can hold the first two, about
    made = convert(write(tmp_path / "model", "llama", tensors), tmp_path / "out", format="slot24", dtype=dtype)
    rounded = matrix.astype(numpy_dtype(stored))  # type: ignore[arg-type]
    w = made.manifest.weights[DOWN]
    assert w.changed == np.count_nonzero(rounded.astype(np.float32) != matrix) > 100
    assert w.became_zero == (2 if stored == "fp16" else 0)
    assert (w.dtype, w.members[0].dtype, w.nnz) == (stored, "F32", np.count_nonzero(rounded))
    np.testing.assert_array_equal(SparseModel(tmp_path / "out").weight(DOWN).to_dense(), rounded)
    embedding = tensors["model.embed_tokens.weight"]
    changed = np.count_nonzero(embedding.astype(numpy_dtype(stored)).astype(np.float32) != embedding)  # type: ignore[arg-type]
    assert made.manifest.tensors["model.embed_tokens.weight"].changed == changed > 0
    assert made.manifest.totals()["changed"] > changed
    assert read_header(tmp_path / "out" / "outside.safetensors").tensors["model.norm.weight"].dtype in ("F16", "BF16")


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "lm_head.weight"])
def test_a_value_that_fp16_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = {name: array.astype(np.float32) for name, array in tensors_of("llama", "fp16").items()}
    tensors[name] = np.zeros_like(tensors[name])
    tensors[name][3, 3] = 65520.0  # halfway to 2^16: to even is infinity
    source = write(tmp_path / "model", "llama", tensors)
    with pytest.raises(FormatError, match="rounds to infinity") as error:
        convert(source, tmp_path / "out", format="tiled-csl")
    assert error.value.field == name
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "flashllm.json" not in left
    assert not any(part.endswith(".tmp") for part in left)
    tensors[name][3, 3] = 65519.0
    write_file(source / "model.safetensors", tensors, {"format": "pt"})
    convert(source, tmp_path / "other", format="tiled-csl")


def test_other_tensors_come_along_and_derived_ones_do_not(tmp_path: Path) -> None:
    tensors = tensors_of("llama", "fp16")
    source = dict(tensors)
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    for name, array in (
        ("model.layers.1.self_attn.sinks", np.arange(4)), ("extra.scale", np.array(3)),
        ("extra.none", np.zeros((0, 4))), ("extra.cube", np.arange(24).reshape(2, 3, 4)),
    ):  # fmt: skip
        source[name] = tensors[name] = array.astype(np.float16)
    convert(write(tmp_path / "model", "llama", source), tmp_path / "out", format="bitmap")
    assert "extra.cube" in read_header(tmp_path / "out" / "outside.safetensors").tensors
    assert "model.layers.1.self_attn.sinks" in read_header(tmp_path / "out" / "block-00001.safetensors").tensors
    check_back(tmp_path / "out", tmp_path / "back", tensors)
