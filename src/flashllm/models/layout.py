# SPDX-License-Identifier: Apache-2.0
"""Names of a model's tensors, as in Hugging Face checkpoints, and which linear layers may be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashllm.errors import ArgumentError

OPT_POSITIONS = "model.decoder.embed_positions.weight"
"""OPT's position embedding."""
OPT_POSITION_OFFSET = 2
"""Number of its rows before that of position 0."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linear layers of a block that multiply the same input, and so can form one matrix, stacked by rows."""

    name: str
    """Name of the fused matrix, e.g. ``self_attn.qkv_proj``; a single layer keeps its own name."""
    members: tuple[str, ...]
    """E.g. ``self_attn.q_proj``; their weights are ``{prefix}.{member}.weight``."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the tensors of an architecture."""

    block: str
    """Prefix of block ``i``, as a format string for ``i``."""
    groups: tuple[Group, ...]
    """In the order of a forward pass."""
    embedding: str
    head: str
    """A checkpoint lacks it if the embedding serves as head."""
    outside: tuple[str, ...]
    """Other tensors outside the blocks."""

    def prefix(self, layer: int) -> str:
        """The prefix of block ``layer``, e.g. ``model.layers.0``."""
        return self.block.format(layer)

    def linears(self, layer: int) -> tuple[str, ...]:
        """Names of the weights of block ``layer`` that may be pruned, in the order of a forward pass."""
        return tuple(
            f"{self.prefix(layer)}.{member}.weight" for group in self.groups for member in group.members
        )  # fmt: skip


_LLAMA = Layout(
    block="model.layers.{}",
    groups=(
        Group(name="self_attn.qkv_proj", members=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group(name="self_attn.o_proj", members=("self_attn.o_proj",)),
        Group(name="mlp.gate_up_proj", members=("mlp.gate_proj", "mlp.up_proj")),
        Group(name="mlp.down_proj", members=("mlp.down_proj",)),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    outside=("model.norm.weight",),
)
_OPT = Layout(
    block="model.decoder.layers.{}",
    groups=(
        Group(name="self_attn.qkv_proj", members=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group(name="self_attn.out_proj", members=("self_attn.out_proj",)),
        Group(name="fc1", members=("fc1",)),
        Group(name="fc2", members=("fc2",)),
    ),
    embedding="model.decoder.embed_tokens.weight",
    head="lm_head.weight",
    outside=(
        OPT_POSITIONS,
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    ),
)
LAYOUTS: Mapping[str, Layout] = {"opt": _OPT, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
"""By ``model_type`` of ``config.json``."""


def layout_of(model_type: object) -> Layout:
    """The layout of a ``model_type``. Raises ``ArgumentError`` that names the known ones."""
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise ArgumentError("model_type", expected=f"one of {', '.join(LAYOUTS)}", got=repr(model_type))
    return LAYOUTS[model_type]
