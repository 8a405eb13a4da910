# SPDX-License-Identifier: Apache-2.0
"""Configurations of well-known models, for measurements with random weights: the sizes in their ``config.json``."""

from __future__ import annotations

from typing import Any

from flashllm.errors import ArgumentError
from flashllm.models.config import ModelConfig, model_config

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
    }


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }


def _llama2(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    return _llama(layers, hidden, heads, kv_heads, ffn, vocab=32000, positions=4096)


def _llama3(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    rope = {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE}
    return _llama(layers, hidden, heads, 8, ffn, vocab=128256, positions=131072, **rope)


def _qwen(
    kind: str, layers: int, hidden: int, heads: int, ffn: int, *, vocab: int, positions: int = 32768, **more: Any
) -> dict[str, Any]:
    made = _llama(layers, hidden, heads, 8, ffn, vocab=vocab, positions=positions, rope_theta=1000000.0, **more)
    return {**made, "model_type": kind, "rms_norm_eps": 1e-6}


CONFIGS: dict[str, dict[str, Any]] = {
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "llama-2-7b": _llama2(32, 4096, 32, 32, 11008),
    "llama-2-13b": _llama2(40, 5120, 40, 40, 13824),
    "llama-2-70b": _llama2(80, 8192, 64, 8, 28672),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28672),
    "llama-3.1-405b": _llama3(126, 16384, 128, 53248),
    "qwen2.5-32b": _qwen("qwen2", 64, 5120, 40, 27648, vocab=152064),
    "qwen2.5-72b": _qwen("qwen2", 80, 8192, 64, 29568, vocab=152064),
    "qwen3-32b": _qwen("qwen3", 64, 5120, 64, 25600, vocab=151936, positions=40960, head_dim=128),
}
"""By name, as in :data:`flashllm.bench.models.MODELS`, which lists their matrices."""


def known_config(name: str) -> ModelConfig:
    """The configuration of model ``name`` (in any case). Raises ``ArgumentError`` with the known names."""
    found = CONFIGS.get(name.strip().lower())
    if found is None:
        raise ArgumentError("model", expected=f"one of {', '.join(CONFIGS)}", got=repr(name))
    return model_config(found)
