# SPDX-License-Identifier: Apache-2.0
"""What models compute, against a second implementation in float64 that is written in another style.

It works token by token and head by head, keeps the keys and values it has seen, and rotates complex numbers.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.io.checkpoint import open_checkpoint
from flashllm.models import forward, quality, weights
from flashllm.models.config import model_config
from flashllm.models.dense import DenseModel, to_nearest
from model_cases import KINDS, VOCAB, config_of, random_tensors, write_checkpoint, write_tensors

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 216,
}  # fmt: skip
Vector = NDArray[np.float64]


class OneByOne:
    """The second implementation, built from ``config.json`` and tensors by their names in the file."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        self.config = config
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.opt = config["model_type"] == "opt"
        self.top = "model.decoder" if self.opt else "model"
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.size = config.get("head_dim", config["hidden_size"] // self.heads)

    def logits(self, tokens: list[int]) -> Vector:
        """[T, vocabulary]."""
        seen: dict[tuple[int, int], tuple[list[Vector], list[Vector]]] = {}
        return np.stack([self.next(token, position, seen) for position, token in enumerate(tokens)])

    def next(self, token: int, position: int, seen: dict[tuple[int, int], tuple[list[Vector], list[Vector]]]) -> Vector:
        x = self.tensors[f"{self.top}.embed_tokens.weight"][token]
        if self.opt:
            x = x + self.tensors[f"{self.top}.embed_positions.weight"][position + 2]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"{self.top}.layers.{layer}."
            first, second = (
                ("self_attn_layer_norm", "final_layer_norm") if self.opt
                else ("input_layernorm", "post_attention_layernorm")
            )  # fmt: skip
            x = x + self.attention(self.norm(x, at + first), at + "self_attn.", layer, position, seen)
            h = self.norm(x, at + second)
            if self.opt:
                x = x + self.linear(np.maximum(self.linear(h, at + "fc1"), 0.0), at + "fc2")
            else:
                gate = self.linear(h, at + "mlp.gate_proj")
                gate = np.array([g / (1.0 + math.exp(-g)) for g in gate])
                x = x + self.linear(gate * self.linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
        x = self.norm(x, f"{self.top}.final_layer_norm" if self.opt else "model.norm")
        tied = self.config["tie_word_embeddings"]
        return self.tensors[f"{self.top}.embed_tokens.weight" if tied else "lm_head.weight"] @ x

    def attention(self, x: Vector, at: str, layer: int, position: int, seen: Any) -> Vector:
        q, k, v = (self.linear(x, f"{at}{one}_proj").reshape(-1, self.size) for one in "qkv")
        for group in range(self.kv_heads):
            keys, values = seen.setdefault((layer, group), ([], []))
            keys.append(self.turned(k[group], at + "k_norm.weight", position))
            values.append(v[group])
        out = []
        for head in range(self.heads):
            keys, values = seen[layer, head // (self.heads // self.kv_heads)]
            query = self.turned(q[head], at + "q_norm.weight", position)
            scores = np.stack(keys) @ query / math.sqrt(self.size)
            shares = np.exp(scores - scores.max())
            out.append((shares / shares.sum()) @ np.stack(values))
        return self.linear(np.concatenate(out), at + ("out_proj" if self.opt else "o_proj"))

    def turned(self, head: Vector, norm: str, position: int) -> Vector:
        if self.opt:
            return head
        if norm in self.tensors:
            head = self.rms(head, self.tensors[norm])
        half = self.size // 2
        turned = [complex(head[i], head[i + half]) * cmath.rect(1.0, position * self.frequency(i)) for i in range(half)]
        return np.array([z.real for z in turned] + [z.imag for z in turned])

    def frequency(self, pair: int) -> float:
        frequency = 1.0 / self.config["rope_theta"] ** (2 * pair / self.size)
        scaling = self.config.get("rope_scaling") or {"rope_type": "default"}
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "linear":
            return frequency / scaling["factor"]
        if kind == "llama3":
            wave, old = 2 * math.pi / frequency, scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wave > old / low:
                return frequency / scaling["factor"]
            if wave >= old / high:
                smooth = (old / wave - low) / (high - low)
                return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        return frequency

    def linear(self, x: Vector, name: str) -> Vector:
        y = self.tensors[name + ".weight"] @ x
        return y + self.tensors[name + ".bias"] if name + ".bias" in self.tensors else y

    def norm(self, x: Vector, name: str) -> Vector:
        if not self.opt:
            return self.rms(x, self.tensors[name + ".weight"])
        scaled = (x - np.mean(x)) / math.sqrt(np.var(x) + 1e-5)
        return scaled * self.tensors[name + ".weight"] + self.tensors[name + ".bias"]

    def rms(self, x: Vector, weight: Vector) -> Vector:
        return x / math.sqrt(float(x @ x) / len(x) + self.config["rms_norm_eps"]) * weight


def tokens_of(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(length).integers(0, VOCAB, length)


def ours(folder: Path, tokens: Any, dtype: Any = np.float64) -> NDArray[Any]:
    """Logits [S, T, vocabulary] of ``tokens`` [S, T]."""
    with open_checkpoint(folder) as checkpoint:
        model = DenseModel(checkpoint, dtype=dtype)
        hidden, outside = quality.run_blocks(model, tokens)
        parts = [part for _, part in quality.head(model, outside, hidden.reshape(-1, hidden.shape[-1]))]
    return np.concatenate(parts).reshape(*tokens.shape, -1)


def theirs(folder: Path, tokens: Any) -> Vector:
    """Logits [T, vocabulary] of ``tokens`` [T]."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        return OneByOne(checkpoint.config, tensors).logits([int(token) for token in tokens])


def difference(folder: Path, length: int) -> float:
    """Largest difference of the two, relative to the largest logit."""
    tokens = tokens_of(length)
    wanted = theirs(folder, tokens)
    assert np.abs(wanted).max() > 1
    return float(np.abs(ours(folder, tokens[None])[0] - wanted).max() / np.abs(wanted).max())


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "opt-head": ("opt", {"tied": False, "dtype": "BF16"}),
    "llama-head": ("llama", {"tied": False, "dtype": "F32"}),
    "llama-every-head": ("llama", {"num_key_value_heads": None}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "qwen2-theta": ("qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-2}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_second_implementation(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    folder = write_checkpoint(tmp_path, kind, **config)
    assert 2 * forward._QUERIES < 300
    longest = 300 if name in ("opt", "qwen3") else 130  # three steps of queries, or two
    tokens = tokens_of(longest)
    wanted = theirs(folder, tokens)  # those of the first tokens do not depend on the others
    largest = np.abs(wanted).max()
    assert largest > 1
    for length in (1, 5, 130, longest):
        found = ours(folder, tokens[None, :length])
        assert found.dtype == np.float64
        assert np.abs(found[0] - wanted[:length]).max() < 1e-12 * largest
    narrow = ours(folder, tokens[None], np.float32)
    assert narrow.dtype == np.float32
    assert np.abs(narrow[0] - wanted).max() < 1e-4 * largest


def test_more_heads_than_are_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_HEADS_AT_ONCE", 4)  # of 6 heads in 2 groups
    assert difference(write_checkpoint(tmp_path, "llama"), 9) < 1e-12


def test_sequences_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 40)  # 2 sequences, then 1
    monkeypatch.setattr(quality, "_HEAD_TOKENS", 7)
    folder = write_checkpoint(tmp_path, "mistral")
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 17))
    together = ours(folder, tokens)
    for number in range(3):
        np.testing.assert_allclose(together[number], theirs(folder, tokens[number]), rtol=0, atol=1e-11)


def test_the_llama_3_case_has_waves_of_every_kind(tmp_path: Path) -> None:
    config = model_config(_config(write_checkpoint(tmp_path, "llama", rope_scaling=LLAMA3, rope_theta=5000.0)))
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    ratio = forward.rope_frequencies(config, np) / plain
    assert ratio.dtype == np.float64
    np.testing.assert_allclose([ratio.max(), ratio.min()], [1.0, 1 / 8])
    assert ((ratio > 1.01 / 8) & (ratio < 0.99)).any()


def _config(folder: Path) -> Mapping[str, Any]:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.config


def test_biases_of_any_layer_are_added(tmp_path: Path) -> None:
    config = config_of("llama", attention_bias=True)
    tensors = random_tensors(config)
    rng = np.random.default_rng(8)
    for name in [name for name in tensors if "_proj" in name]:
        bias = name.replace(".weight", ".bias")
        tensors[bias] = rng.standard_normal(len(tensors[name])).astype(np.float32)
    folder = write_tensors(tmp_path, config, tensors)
    assert difference(folder, 6) < 1e-12
    with open_checkpoint(folder) as checkpoint:
        small = DenseModel(checkpoint).block(1)[0]
    assert sum(name.endswith("bias") for name in small) == 7


# Mistakes that must not go unnoticed: each replaces a part of the forward pass by a wrong one.
def _interleaved(config: Any, heads: Any) -> Any:
    angles = np.arange(heads.shape[2])[:, None] * forward.rope_frequencies(config, np)
    out = np.empty_like(heads)
    left, right = heads[..., ::2], heads[..., 1::2]
    out[..., ::2] = left * np.cos(angles) - right * np.sin(angles)
    out[..., 1::2] = right * np.cos(angles) + left * np.sin(angles)
    return out


def _backwards(rotate: Callable[..., Any]) -> Callable[..., Any]:
    def other(config: Any, heads: Any) -> Any:
        half = config.head_dim // 2
        swapped = rotate(config, np.concatenate([heads[..., half:], heads[..., :half]], axis=-1))
        return np.concatenate([swapped[..., half:], swapped[..., :half]], axis=-1)

    return other


class _NoMask:
    """NumPy without the triangle of minus infinity."""

    def __getattr__(self, name: str) -> Any:
        return (lambda array, k: np.zeros_like(array)) if name == "triu" else getattr(np, name)


MISTAKES: dict[str, tuple[str, str, Any]] = {
    "pairs side by side": ("llama", "_rotate", _interleaved),
    "no rotation": ("qwen2", "_rotate", lambda config, heads: heads),
    "no mask": ("mistral", "array_module", lambda array: _NoMask()),
    "no mask of OPT": ("opt", "array_module", lambda array: _NoMask()),
    "another offset of positions": ("opt", "OPT_POSITION_OFFSET", 1),
    "gate without sigmoid": ("llama", "_silu", lambda x: x),
    "norm without eps": ("qwen3", "_rms_norm", lambda x, w, eps: x / np.sqrt((x * x).mean(-1, keepdims=True)) * w),
    "norm without weight": ("llama", "_rms_norm", lambda x, w, eps: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, what, wrong = MISTAKES[name]
    folder = write_checkpoint(tmp_path, kind)
    monkeypatch.setattr(forward, what, wrong)
    assert difference(folder, 5) > 1e-7  # the tests above require 1e-12


@pytest.mark.parametrize("name", ["turned the other way", "groups of heads mixed", "norms left out", "wrong eps"])
def test_a_planted_mistake_of_another_kind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = "qwen3"
    folder = write_checkpoint(tmp_path, kind)
    rotate, attention, rms = forward._rotate, forward._attention, forward._rms_norm
    if name == "turned the other way":  # alone it would cancel in the products of q and k
        calls = iter(range(100))
        monkeypatch.setattr(forward, "_rotate", lambda c, h: (rotate if next(calls) % 2 else _backwards(rotate))(c, h))
    elif name == "groups of heads mixed":
        monkeypatch.setattr(forward, "_attention", lambda c, q, k, v: attention(c, q, k[:, ::-1], v[:, ::-1]))
    elif name == "norms left out":
        monkeypatch.setattr(forward, "_rms_norm", lambda x, w, e: x if x.ndim == 4 else rms(x, w, e))
    else:
        monkeypatch.setattr(forward, "_rms_norm", lambda x, w, e: rms(x, w, 10 * e))
    assert difference(folder, 5) > 1e-7


def test_silu_of_large_numbers() -> None:
    with np.errstate(all="raise"):
        found = forward._silu(np.array([-1e30, -200.0, 0.0, 200.0, 1e30], np.float32))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([0, 0, 0, 200, 1e30], np.float32))


def test_rounding_to_types_of_16_bits() -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 50000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf], np.float32)])
    ties = (rng.integers(0, 2**15, 1000, dtype=np.uint32) << 16) | 0x8000
    x = np.concatenate([x, ties.view(np.float32)])
    for dtype, narrow in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        with np.errstate(all="ignore"):
            wanted = x.astype(narrow).astype(np.float32)
        found = to_nearest(x, dtype)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(np.signbit(found[~np.isnan(x)]), np.signbit(wanted[~np.isnan(x)]))
    worst = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(to_nearest(worst, "bf16")).all()


def test_what_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    config = config_of("qwen2", tied=False)
    whole = random_tensors(config)
    for number, (name, instead, got) in enumerate(
        [
            ("model.layers.1.self_attn.k_proj.bias", None, "none"),
            ("model.layers.0.mlp.up_proj.weight", np.zeros((36, 53), np.float32), "shape [36, 53]"),
            ("lm_head.weight", None, "none"),
            ("model.layers.0.self_attn.o_proj.bias", np.zeros(1, np.float32), "shape [1]"),
        ]
    ):
        tensors = {key: value for key, value in whole.items() if key != name}
        if instead is not None:
            tensors[name] = instead
        with open_checkpoint(write_tensors(tmp_path / str(number), config, tensors)) as checkpoint:
            with pytest.raises(FormatError) as caught:
                DenseModel(checkpoint)
            assert (caught.value.field, caught.value.got) == (name, got)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: np.ones(tensors[name].shape, np.int32)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint, pytest.raises(FormatError) as caught:
        DenseModel(checkpoint).block(0)
    assert (caught.value.field, caught.value.got) == (name, "int32")


def test_names_are_split_into_blocks_and_the_rest(tmp_path: Path) -> None:
    with open_checkpoint(write_checkpoint(tmp_path, "opt", num_hidden_layers=11)) as checkpoint:
        config = model_config(checkpoint.config)
        parts = [weights.block_names(checkpoint, config, layer) for layer in range(11)]
        rest = weights.outside_names(checkpoint, config)
        found = weights.block(checkpoint, config, 1, dtype=np.float64)
    assert sorted([*rest, *(name for part in parts for name in part)]) == sorted(checkpoint.tensors)
    assert all(name.startswith("model.decoder.layers.1.") for name in parts[1])
    assert set(found.linears) == {f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")} | {"fc1", "fc2"}
    assert len(found.small) == 10
    assert all(array.dtype == np.float64 for array in (*found.linears.values(), *found.small.values()))
