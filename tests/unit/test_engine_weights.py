# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model for an engine: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashllm.convert.run import convert
from flashllm.engine.shard import Shard
from flashllm.engine.weights import CheckpointSource, PackedSource, Weights, load
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.sparse_model import SparseModel
from model_cases import config_of, random_tensors, read_tensors, write_checkpoint, write_tensors

ATTENTION, FEED_FORWARD = "model.layers.1.self_attn", "model.layers.1.mlp"


def dense(path: Path, **options: Any) -> Weights:
    with open_checkpoint(path) as checkpoint:
        return load(CheckpointSource(checkpoint, **options), np)


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        ("F16", None, "fp16"),
        ("BF16", None, "bf16"),
        ("F32", None, "fp16"),
        ("BF16", "fp16", "fp16"),
        ("F32", "bf16", "bf16"),
    ],
)
def test_dense_weights_of_one_type(tmp_path: Path, stored: str, asked: Any, dtype: str) -> None:
    path = write_checkpoint(tmp_path / "m", "qwen3", dtype=stored)
    tensors, loaded = read_tensors(path), dense(path, dtype=asked)
    kind = np.float16 if dtype == "fp16" else ml_dtypes.bfloat16
    assert loaded.dtype == dtype
    assert loaded.head is loaded.embedding
    joined = {
        "qkv": [f"{ATTENTION}.{one}_proj.weight" for one in "qkv"],
        "out": [f"{ATTENTION}.o_proj.weight"],
        "up": [f"{FEED_FORWARD}.gate_proj.weight", f"{FEED_FORWARD}.up_proj.weight"],
        "down": [f"{FEED_FORWARD}.down_proj.weight"],
        "q_norm": [f"{ATTENTION}.q_norm.weight"],
        "ffn_norm": ["model.layers.1.post_attention_layernorm.weight"],
    }
    for field, names in joined.items():
        wanted = np.concatenate([tensors[name].astype(np.float32).astype(kind) for name in names])
        found = getattr(loaded.blocks[1], field)
        assert found.dtype == (np.float16 if dtype == "fp16" else np.uint16)
        assert found.ctypes.data % 16 == 0
        np.testing.assert_array_equal(found.view(np.uint16), wanted.view(np.uint16), err_msg=field)
    assert loaded.blocks[1].qkv_bias is None
    assert loaded.matrix_bytes < loaded.nbytes


def test_a_layer_without_bias_beside_others_gets_zeros(tmp_path: Path) -> None:
    config = config_of("llama")
    tensors = random_tensors(config)
    bias = np.arange(12, dtype=np.float32)
    tensors[f"{ATTENTION}.k_proj.bias"] = bias
    loaded = dense(write_tensors(tmp_path / "m", config, tensors))
    assert loaded.blocks[0].qkv_bias is None
    np.testing.assert_array_equal(loaded.blocks[1].qkv_bias, [*[0] * 36, *bias, *[0] * 12])


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    config = config_of("llama", dtype="BF16")
    tensors = random_tensors(config)
    tensors[f"{FEED_FORWARD}.up_proj.weight"][3, 4] = 1e5
    path = write_tensors(tmp_path / "m", config, tensors, dtype="BF16")
    assert dense(path).dtype == "bf16"
    with pytest.raises(FormatError, match=r"mlp\.up_proj\.weight: expected values that fp16 can hold: use --dtype bf1"):
        dense(path, dtype="fp16")


def test_infinities_of_the_file_stay(tmp_path: Path) -> None:
    config = config_of("llama", dtype="F32")
    tensors = random_tensors(config)
    tensors["model.norm.weight"][0] = np.inf
    assert dense(write_tensors(tmp_path / "m", config, tensors, dtype="F32")).norm[0] == np.inf


def test_types_that_come_with_scales_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = write_checkpoint(tmp_path / "m", "llama")
    tensors = {name: np.array(value) for name, value in read_tensors(path).items()}
    name = f"{FEED_FORWARD}.down_proj.weight"
    tensors[name] = np.ones_like(tensors[name], np.uint8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"mlp\.down_proj\.weight: expected float16, bfloat16, float32, float64, got uint8"
    ):
        dense(path)


def test_packed_weights_and_expanded_ones(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama", zeros=0.7)
    convert(path, tmp_path / "s", format="tiled-csl")
    wanted = dense(path)
    packed = load(PackedSource(SparseModel(tmp_path / "s")), np)
    expanded = load(PackedSource(SparseModel(tmp_path / "s"), dense=True), np)
    for one, other, whole in zip(packed.blocks, expanded.blocks, wanted.blocks, strict=True):
        for matrix, array, right in zip(one.matrices, other.matrices, whole.matrices, strict=True):
            assert isinstance(matrix, TiledCSL)
            np.testing.assert_array_equal(matrix.to_dense(), right)
            np.testing.assert_array_equal(array, right)
    np.testing.assert_array_equal(packed.embedding, wanted.embedding)
    assert packed.matrix_bytes < expanded.matrix_bytes == wanted.matrix_bytes


def test_a_shard_of_packed_weights_is_packed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama", zeros=0.7, intermediate_size=54)
    convert(path, tmp_path / "s", format="tiled-csl")
    shard = Shard(index=1, count=2)
    source = PackedSource(SparseModel(tmp_path / "s"))
    found, whole = load(source, np, shard=shard).blocks[1], load(source, np).blocks[1]
    assert isinstance(found.down, TiledCSL)
    np.testing.assert_array_equal(found.down.to_dense(), whole.down.to_dense()[:, 27:])
    np.testing.assert_array_equal(found.qkv.to_dense()[:18], whole.qkv.to_dense()[18:36])
    with pytest.raises(ArgumentError, match=r"^tp: expected a divisor of the 2 KV heads, got 3"):
        load(source, np, shard=Shard(index=0, count=3))


def test_layers_that_were_not_joined_are_refused(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "m", "llama", zeros=0.7), tmp_path / "s", format="tiled-csl", fuse=False)
    with pytest.raises(FormatError, match=r"qkv.*: expected one matrix of all these layers: convert without --no-fuse"):
        load(PackedSource(SparseModel(tmp_path / "s")), np)


def test_several_types_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = write_checkpoint(tmp_path / "m", "llama", zeros=0.7)
    tensors = {name: np.array(value) for name, value in read_tensors(path).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    save_file(tensors, path / "model.safetensors")
    convert(path, tmp_path / "s", format="tiled-csl")
    with pytest.raises(
        FormatError, match=r"dtype: expected one type of all tensors: convert with --dtype .*bf16, fp16"
    ):
        PackedSource(SparseModel(tmp_path / "s"))
    convert(path, tmp_path / "one", format="tiled-csl", dtype="bf16")
    assert PackedSource(SparseModel(tmp_path / "one")).dtype == "bf16"
