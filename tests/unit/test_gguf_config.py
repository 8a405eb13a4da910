# SPDX-License-Identifier: Apache-2.0
"""GGUF metadata as the words of ``config.json``, and what is refused for its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import BLOCKS, FF, GROUPS, HEADS, HIDDEN, SIZE, VOCAB, gguf, model, numbers, write
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.io.gguf_file import GgufCheckpoint


def test_config(tmp_path: Path) -> None:
    stored, _ = model()
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored)) as checkpoint:
        assert dict(checkpoint.config) == {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
            "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
            "intermediate_size": FF, "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float16",
            "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        words = checkpoint.tokenizer
        assert words["model"] == "gpt2"
        assert words["tokens"][:2] == ("tok0", "tok1")
        assert words["merges"] == ("a b", "Ġ t")
        assert words["token_type"].tolist() == [1] * VOCAB
        assert (words["bos_token_id"], words["eos_token_id"]) == (1, 2)
        assert checkpoint.chat_template == "{{ x }}"


def config(
    tmp_path: Path, arch: str = "llama", *, extra: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    stored, _ = model(arch)
    stored |= {name: (array, None) for name, array in (extra or {}).items()}
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored, arch=arch, fields=numbers(**fields))) as checkpoint:
        return dict(checkpoint.config)


def test_config_of_others(tmp_path: Path) -> None:
    head = config(tmp_path, extra={"output.weight": np.ones((VOCAB, HIDDEN), np.float16)})
    assert head["tie_word_embeddings"] is False
    qwen = config(tmp_path, "qwen3", **{"attention.key_length": SIZE, "attention.value_length": SIZE})
    assert (qwen["model_type"], qwen["head_dim"], qwen["attention_bias"]) == ("qwen3", SIZE, False)
    assert config(tmp_path, "qwen2")["architectures"] == ["Qwen2ForCausalLM"]
    biased = {f"blk.{i}.attn_q.bias": np.ones(HIDDEN, np.float32) for i in range(BLOCKS)}
    assert config(tmp_path, extra=biased)["attention_bias"] is True
    windowed = config(tmp_path, **{"attention.sliding_window": 64})
    assert (windowed["model_type"], windowed["sliding_window"]) == ("mistral", 64)
    assert "sliding_window" not in config(tmp_path, "qwen2", **{"attention.sliding_window": 128})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_scaled_positions(tmp_path: Path, fields: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    assert config(tmp_path, **fields).get("rope_scaling") == wanted


def llama3(theta: float, factor: float, dtype: Any = np.float32) -> NDArray[Any]:
    """As in the published code of the models, pair by pair."""
    out = []
    for i in range(0, SIZE, 2):
        wavelength = 2 * np.pi * theta ** (i / SIZE)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype)


def test_positions_of_llama3(tmp_path: Path) -> None:
    theta = {"rope.freq_base": 500000.0}
    for factor in (8.0, 32.0):
        made = config(tmp_path, extra={"rope_freqs.weight": llama3(5e5, factor)}, **theta)
        assert made["rope_scaling"] == {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    assert "rope_scaling" not in config(tmp_path, extra={"rope_freqs.weight": np.ones(SIZE // 2, np.float32)})
    other = llama3(5e5, 8.0)
    other[np.flatnonzero((other > 1) & (other < 8))[0]] *= 1.01
    bad = (other, llama3(5e5, 8.0)[:-1], llama3(5e5, 8.0, np.float16), llama3(4e5, 8.0), -llama3(5e5, 8.0),
           np.full(SIZE // 2, np.nan, np.float32))  # fmt: skip
    for divisors in bad:
        with pytest.raises(FormatError, match=r"rope_freqs\.weight"):
            config(tmp_path, extra={"rope_freqs.weight": divisors}, **theta)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    with pytest.raises(FormatError, match=r"rope\.scaling\.type"):
        config(tmp_path, extra={"rope_freqs.weight": llama3(5e5, 8.0)}, **theta, **linear)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"expert_count": 8}, "expert_count"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"attention.scale": 1.0}, "attention.scale"),
        ({"attention.causal": False}, "attention.causal"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope.scaling.original_context_length"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -2.0}, "rope.scaling.factor"),
        ({"rope.scaling.factor": float("nan")}, "rope.scaling.factor"),
        ({"rope.freq_base": 0.0}, "rope.freq_base"),
        ({"rope.freq_base": "big"}, "rope.freq_base"),
        ({"rope.freq_base": float("inf")}, "rope.freq_base"),
        ({"rope.dimension_count": SIZE // 2}, "rope.dimension_count"),
        ({"attention.value_length": 2 * SIZE}, "attention.value_length"),
        ({"attention.key_length": SIZE // 2}, "blk.0.attn_q.weight"),
        ({"attention.head_count": 0}, "attention.head_count"),
        ({"attention.head_count": [4, 4]}, "attention.head_count"),
        ({"attention.head_count_kv": 3}, "attention.head_count_kv"),
        ({"attention.head_count_kv": 4}, "blk.0.attn_k.weight"),
        ({"embedding_length": 512}, "embedding_length"),
        ({"block_count": 1}, "blk.1.attn_norm.weight"),
        ({"block_count": 2.0}, "block_count"),
        ({"block_count": True}, "block_count"),
        ({"!general.type": "adapter"}, "general.type"),
        ({"!split.count": 3}, "split.count"),
        ({"!general.type": ["model"]}, "general.type"),
        ({"!tokenizer.ggml.padding_token_id": VOCAB}, "padding_token_id"),
    ],
    ids=str,
)
def test_refused_metadata(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        config(tmp_path, **fields)
    assert field in caught.value.field
    assert str(tmp_path) in str(caught.value)


def test_missing_metadata(tmp_path: Path) -> None:
    stored, _ = model()
    optional = {"attention.head_count_kv", "rope.freq_base"}
    for key in numbers():
        fields = {name: value for name, value in numbers().items() if name != key}
        if key in optional:
            continue
        with pytest.raises(FormatError) as caught:
            GgufCheckpoint(write(tmp_path / "m.gguf", stored, fields=fields))
        assert caught.value.field == f"llama.{key}"


@pytest.mark.parametrize("arch", ["gemma", "opt", "mamba"])
def test_other_architectures(tmp_path: Path, arch: str) -> None:
    with pytest.raises(FormatError, match="llama, qwen2, qwen3, got '" + arch):
        GgufCheckpoint(write(tmp_path / "m.gguf", model()[0], arch=arch))


@pytest.mark.parametrize(
    "name", ["blk.2.attn_q.weight", "blk.00.attn_q.weight", "blk.0.attn_q", "blk.0.ffn_gate_inp.weight", "rope.weight",
             "blk.0.attn_norm.bias", "blk.0.attn_q_norm.weight", "blk.-1.attn_q.weight"]
)  # fmt: skip
def test_other_tensors(tmp_path: Path, name: str) -> None:
    stored, _ = model()
    stored[name] = np.zeros((HIDDEN, HIDDEN), np.float32), None
    with pytest.raises(FormatError) as caught:
        GgufCheckpoint(write(tmp_path / "m.gguf", stored))
    assert caught.value.field == name


def test_other_types_and_ranks(tmp_path: Path) -> None:
    stored, _ = model()
    kind = gguf.GGMLQuantizationType.Q5_0
    data = gguf.quants.quantize(np.ones((FF, HIDDEN), np.float32), kind)
    for name, tensor, words in (
        ("blk.0.ffn_up.weight", (data, kind), "F32, .*, got Q5_0"),
        ("blk.0.ffn_up.weight", (np.zeros((2, FF, HIDDEN), np.float32), None), "2 dimensions"),
        ("output_norm.weight", (np.zeros((2, HIDDEN), np.float32), None), "1 dimension,"),
        ("blk.0.attn_q.weight", (np.zeros((2, HIDDEN), np.float32), None), "256 rows, 4 heads of 64, got 2"),
    ):
        with pytest.raises(FormatError, match=words):
            GgufCheckpoint(write(tmp_path / "m.gguf", {**stored, name: tensor}))
    del stored["token_embd.weight"]
    with pytest.raises(FormatError, match=r"token_embd\.weight: expected a tensor, got none"):
        GgufCheckpoint(write(tmp_path / "m.gguf", stored))


def test_big_endian(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FormatError, match="got a big-endian file"):
        GgufCheckpoint(tmp_path / "m.gguf")
