# SPDX-License-Identifier: Apache-2.0
"""What is read from a model's ``config.json``, and what is refused, by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flashllm.errors import ArgumentError, FormatError
from flashllm.models.config import Llama3Scaling, ModelConfig, bias_shapes, model_config, tensor_shapes
from flashllm.models.layout import LAYOUTS, layout_of
from model_cases import KINDS, config_of, shapes_of

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read(kind: str, **config: Any) -> ModelConfig:
    return model_config(config_of(kind, **config))


def refused(kind: str, **config: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        model_config(config_of(kind, **config), path="dir")
    assert str(caught.value).startswith(f"dir: {caught.value.field}: expected ")
    return caught.value


def test_of_opt() -> None:
    assert read("opt") == ModelConfig(
        model_type="opt", layers=2, hidden=39, heads=3, kv_heads=3, head_dim=13, ffn=57, vocab=101, positions=320,
        norm_eps=1e-5, tied=True, activation="relu",
    )  # fmt: skip
    assert read("opt").is_opt
    assert read("opt", tie_word_embeddings=None).tied
    assert not read("opt", tied=False).tied
    # No implementation of OPT looks at an entry of that name.
    assert read("opt", head_dim=26).head_dim == 13
    optional = {"do_layer_norm_before": None, "word_embed_proj_dim": None, "activation_function": None}
    assert read("opt", **optional) == read("opt")


def test_of_the_others() -> None:
    wanted = ModelConfig(
        model_type="llama", layers=2, hidden=36, heads=6, kv_heads=2, head_dim=6, ffn=53, vocab=101, positions=320,
        norm_eps=1e-5, tied=True, activation="silu", rope_theta=10000.0,
    )  # fmt: skip
    assert read("llama") == wanted
    assert not wanted.is_opt
    bare = read(
        "llama", num_key_value_heads=None, rms_norm_eps=None, rope_theta=None, tie_word_embeddings=None, hidden_act=None
    )
    assert (bare.kv_heads, bare.norm_eps, bare.rope_theta, bare.tied) == (6, 1e-6, 10000.0, False)
    qwen3 = read("qwen3")
    assert (qwen3.head_dim, qwen3.qk_norm) == (10, True)
    assert not any(read(kind).qk_norm for kind in KINDS if kind != "qwen3")
    assert read("mistral", rope_theta=1000000).rope_theta == 1e6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors(kind: str, tied: bool) -> None:
    config = config_of(kind, tied=tied)
    found = model_config(config)
    assert tensor_shapes(found) == shapes_of(config)
    weights = {name for layer in range(2) for name in found.layout.linears(layer)}
    assert weights < set(tensor_shapes(found))
    biases = bias_shapes(found)
    if kind == "opt":
        assert biases == {}
    else:
        assert set(biases) == {name.replace(".weight", ".bias") for name in weights}
        assert all(shape == shapes_of(config)[name.replace(".bias", ".weight")][:1] for name, shape in biases.items())


def test_the_layout_of_an_unknown_kind() -> None:
    assert set(LAYOUTS) == set(KINDS)
    for kind in ("gpt2", None, ["opt"]):
        with pytest.raises(ArgumentError, match="model_type"):
            layout_of(kind)


@pytest.mark.parametrize("kind", ["gpt2", "", None, 3, ["llama"], {"opt": 1}])
def test_an_unknown_kind(kind: Any) -> None:
    with pytest.raises(FormatError) as caught:
        model_config({**config_of("llama"), "model_type": kind})
    assert caught.value.field == "model_type"
    assert all(one in caught.value.expected for one in KINDS)


SIZES = {
    "opt": (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim", "vocab_size", "max_position_embeddings",
    ),
    "llama": (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, names in SIZES.items() for field in names])
def test_sizes(kind: str, field: str) -> None:
    for value in (None, 0, -1, True, 4.0, "4", [4], math.nan, 1 << 40, 10**500):
        error = refused(kind, **{field: value})
        assert (error.field, error.expected) == (field, "an integer in 1..16777216")


def test_sizes_that_need_not_be_there() -> None:
    for value in (0, True, 2.0, "2"):
        assert refused("llama", num_key_value_heads=value).field == "num_key_value_heads"
        assert refused("qwen3", head_dim=value).field == "head_dim"


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_numbers(field: str) -> None:
    for value in (0, 0.0, -1e-5, True, "1e-5", math.nan, math.inf, [1.0], 10**500):
        error = refused("llama", **{field: value})
        assert (error.field, error.expected) == (field, "a positive number")


def test_flags() -> None:
    for value in (0, 1, "true", []):
        assert refused("llama", tie_word_embeddings=value).field == "tie_word_embeddings"
        assert refused("opt", tie_word_embeddings=value).field == "tie_word_embeddings"
        assert refused("qwen2", use_sliding_window=value).field == "use_sliding_window"


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("opt", "do_layer_norm_before", False),
        ("opt", "do_layer_norm_before", 1),
        ("opt", "_remove_final_layer_norm", True),
        ("opt", "enable_bias", False),
        ("opt", "layer_norm_elementwise_affine", False),
        ("opt", "activation_function", "gelu"),
        ("opt", "word_embed_proj_dim", 13),
        ("opt", "word_embed_proj_dim", 39.0),
        ("llama", "hidden_act", "gelu"),
        ("mistral", "hidden_act", ["silu"]),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("llama", "rope_scaling", "linear"),
        ("llama", "rope_scaling", [1]),
    ],
)
def test_what_is_not_honoured(kind: str, field: str, value: Any) -> None:
    assert refused(kind, **{field: value}).field == field


def test_heads_that_do_not_divide() -> None:
    assert refused("llama", num_key_value_heads=4).field == "num_key_value_heads"
    assert refused("llama", num_key_value_heads=12).field == "num_key_value_heads"
    assert refused("llama", num_attention_heads=5).field == "num_attention_heads"
    assert refused("opt", num_attention_heads=5).field == "num_attention_heads"
    assert refused("qwen3", head_dim=9).field == "head_dim"
    assert refused("llama", num_attention_heads=12).field == "head_dim"  # of 3 elements


def test_windows() -> None:
    assert refused("mistral", sliding_window=319).field == "sliding_window"
    # Mistral has no such flag: it uses a window that it names.
    assert refused("mistral", sliding_window=319, use_sliding_window=False).field == "sliding_window"
    assert refused("mistral", sliding_window=True).field == "sliding_window"
    for window in (None, 320, 4096):
        assert read("mistral", sliding_window=window) == read("mistral")
    # A file without the entry means 4096; null means none.
    assert refused("mistral", max_position_embeddings=4097).field == "sliding_window"
    long = {**config_of("mistral", max_position_embeddings=4097), "sliding_window": None}
    assert model_config(long).positions == 4097
    for kind in ("qwen2", "qwen3"):
        assert read(kind, sliding_window=32, use_sliding_window=False) == read(kind)
        assert read(kind, sliding_window=32) == read(kind)
        assert read(kind, sliding_window=None, use_sliding_window=True) == read(kind)
        assert refused(kind, sliding_window=32, use_sliding_window=True).field == "sliding_window"


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_kinds_of_rope_scaling(field: str, key: str) -> None:
    for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "", 3, ["linear"]):
        assert refused("llama", **{field: {key: kind, "factor": 2.0}}).field == field
    assert read("llama", **{field: {key: "default", "factor": 2.0}}) == read("llama")
    assert read("llama", **{field: {}}) == read("llama")
    # Only the kind would say what to do with the factor.
    assert refused("llama", **{field: {"factor": 2.0}}).field == field
    linear = read("llama", **{field: {key: "linear", "factor": 2}})
    assert (linear.rope_linear, linear.rope_llama3) == (2.0, None)
    for factor in (None, 0, -1.0, True, "2", math.inf, math.nan):
        assert refused("llama", **{field: {key: "linear", "factor": factor}}).field == f"{field}.factor"


def test_both_names_of_the_kind() -> None:
    assert read("llama", rope_scaling={"rope_type": None, "type": "linear", "factor": 2.0}).rope_linear == 2.0
    assert read("llama", rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 2.0}).rope_linear == 2.0


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_llama_3(field: str) -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    assert read("llama", **{field: LLAMA3}).rope_llama3 == scaling
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        for value in (None, 0, -1.0, True, "8", math.nan, math.inf, 10**400):
            assert refused("llama", **{field: {**LLAMA3, key: value}}).field == f"{field}.{key}"
    for value in (None, 0, 8192.0, True, "8192", 10**400):
        error = refused("llama", **{field: {**LLAMA3, "original_max_position_embeddings": value}})
        assert error.field == field
        assert "original_max_position_embeddings" in error.expected
    for high in (1.0, 0.5):
        assert refused("llama", **{field: {**LLAMA3, "high_freq_factor": high}}).field == field


def test_newer_files_keep_all_of_rope_together() -> None:
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    assert read("llama", **newer) == read("llama", rope_theta=5e5, rope_scaling=LLAMA3)
    plain = read("llama", rope_theta=None, rope_parameters={"rope_theta": 1000000, "rope_type": "default"})
    assert plain == read("llama", rope_theta=1e6)
    for theta in (0, True, "1", math.inf):
        error = refused("llama", rope_parameters={"rope_theta": theta, "rope_type": "default"})
        assert error.field == "rope_parameters.rope_theta"
    assert refused("llama", rope_parameters=3).field == "rope_parameters"
