# SPDX-License-Identifier: Apache-2.0
"""Weight shapes of the decode step of well-known models."""

from __future__ import annotations

from dataclasses import dataclass

from flashllm.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix ``W[m, k]`` (m outputs, k inputs) of a block; ``count`` of them per block."""

    name: str
    m: int
    k: int
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weight matrices of one transformer block, QKV and gate + up fused, and the number of blocks."""

    name: str
    blocks: int
    layers: tuple[Layer, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one dense block at 2 bytes per weight."""
        return sum(2 * layer.m * layer.k * layer.count for layer in self.layers)


def _opt(name: str, blocks: int, hidden: int) -> Model:
    return Model(
        name=name,
        blocks=blocks,
        layers=(
            Layer(name="qkv", m=3 * hidden, k=hidden),
            Layer(name="out", m=hidden, k=hidden),
            Layer(name="fc1", m=4 * hidden, k=hidden),
            Layer(name="fc2", m=hidden, k=4 * hidden),
        ),
    )


def _gated(
    name: str, blocks: int, *, hidden: int, ffn: int, qkv: int, attention: int | None = None, experts: int = 1
) -> Model:
    return Model(
        name=name,
        blocks=blocks,
        layers=(
            Layer(name="qkv", m=qkv, k=hidden),
            Layer(name="out", m=hidden, k=attention or hidden),
            Layer(name="gate-up", m=2 * ffn, k=hidden, count=experts),
            Layer(name="down", m=hidden, k=ffn, count=experts),
        ),
    )


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _opt("opt-13b", 40, 5120),
        _opt("opt-30b", 48, 7168),
        _opt("opt-66b", 64, 9216),
        _opt("opt-175b", 96, 12288),
        _gated("llama-2-7b", 32, hidden=4096, ffn=11008, qkv=12288),
        _gated("llama-2-13b", 40, hidden=5120, ffn=13824, qkv=15360),
        _gated("llama-2-70b", 80, hidden=8192, ffn=28672, qkv=10240),
        _gated("llama-3.1-8b", 32, hidden=4096, ffn=14336, qkv=6144),
        _gated("llama-3.1-70b", 80, hidden=8192, ffn=28672, qkv=10240),
        _gated("llama-3.1-405b", 126, hidden=16384, ffn=53248, qkv=18432),
        _gated("qwen2.5-32b", 64, hidden=5120, ffn=27648, qkv=7168),
        _gated("qwen3-32b", 64, hidden=5120, ffn=25600, qkv=10240, attention=8192),
        _gated("qwen2.5-72b", 80, hidden=8192, ffn=29568, qkv=10240),
        _gated("mixtral-8x7b", 32, hidden=4096, ffn=14336, qkv=6144, experts=8),
        _gated("smollm2-135m", 30, hidden=576, ffn=1536, qkv=960),
    )
}

PAPER_MODELS: tuple[str, ...] = ("opt-30b", "opt-66b", "opt-175b")
"""The three models of the Flash-LLM paper's kernel figure: 12 shapes."""


def find_model(name: str) -> Model:
    """The model called ``name`` (in any case). Raises :class:`ArgumentError` with the known names."""
    model = MODELS.get(name.strip().lower())
    if model is None:
        raise ArgumentError("model", expected=f"one of {', '.join(MODELS)}", got=repr(name))
    return model
