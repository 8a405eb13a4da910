# SPDX-License-Identifier: Apache-2.0
"""What a model's ``config.json`` says, checked: a value that would change results but is not implemented is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashllm.errors import FormatError, brief
from flashllm.models.layout import LAYOUTS, OPT_POSITION_OFFSET, OPT_POSITIONS, Layout, layout_of

_MOST = 1 << 24
_MISTRAL_WINDOW = 4096  # if the file does not state it
_LARGEST = sys.float_info.max  # an integer may be larger


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Scaling of the frequencies of rotary positions, as in Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and kinds of a decoder-only model."""

    model_type: str
    """``opt``, ``llama``, ``mistral``, ``qwen2`` or ``qwen3``."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    """Maximum number of tokens in a sequence."""
    norm_eps: float
    tied: bool
    """Whether the embedding is also the head."""
    activation: str
    """``silu`` or ``relu``."""
    rope_theta: float = 10000.0
    rope_linear: float = 1.0
    """Positions are divided by this."""
    rope_llama3: Llama3Scaling | None = None
    qk_norm: bool = False
    """Whether heads of q and k are normalised before the rotation."""

    @property
    def is_opt(self) -> bool:
        """If so, learned positions, LayerNorm and biases; else rotary positions, RMSNorm and gated feed-forward."""
        return self.model_type == "opt"

    @property
    def layout(self) -> Layout:
        """Names of its tensors."""
        return layout_of(self.model_type)


class _Reader:
    """Checked entries of one ``config.json``."""

    def __init__(self, config: Mapping[str, Any], path: str | None) -> None:
        self._config, self._path = config, path

    def refuse(self, field: str, expected: str) -> FormatError:
        return FormatError(field=field, expected=expected, got=brief(self._config.get(field)), path=self._path)

    def size(self, field: str, default: int | None = None) -> int:
        value = self._config.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise self.refuse(field, f"an integer in 1..{_MOST}")
        return value

    def real(self, field: str, default: float | None = None) -> float:
        return self.real_in(self._config, field, field, default)

    def real_in(self, values: Mapping[str, Any], key: str, field: str, default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            raise FormatError(field=field, expected="a positive number", got=brief(values.get(key)), path=self._path)
        return float(value)

    def flag(self, field: str, *, default: bool) -> bool:
        value = self._config.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(field, "true or false")
        return value

    def must_be(self, field: str, honoured: tuple[Any, ...]) -> None:
        """Raise unless the entry is absent or one of ``honoured``."""
        value = self._config.get(field)
        if value is not None and not any(type(value) is type(one) and value == one for one in honoured):
            raise self.refuse(field, " or ".join(str(one) for one in honoured) + ": nothing else is implemented")

    def has(self, field: str) -> bool:
        return field in self._config

    def get(self, field: str) -> Any:
        return self._config.get(field)


def model_config(config: Mapping[str, Any], *, path: str | None = None) -> ModelConfig:
    """Check a ``config.json``; ``path`` is for messages. Raises ``FormatError`` that names the entry."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        expected = f"one of {', '.join(LAYOUTS)}"
        raise FormatError(field="model_type", expected=expected, got=brief(kind), path=path)
    read = _Reader(config, path)
    found = _opt(read) if kind == "opt" else _llama(read, kind)
    if not found.is_opt and found.heads % found.kv_heads:
        raise read.refuse("num_key_value_heads", f"a divisor of the {found.heads} heads")
    if not found.is_opt and found.head_dim % 2:
        raise read.refuse("head_dim", "an even number: halves of a head are rotated")
    return found


def _head_dim(read: _Reader, hidden: int, heads: int) -> int:
    if read.get("head_dim") is not None:
        return read.size("head_dim")
    if hidden % heads:
        raise read.refuse("num_attention_heads", f"a divisor of hidden_size {hidden}")
    return hidden // heads


def _opt(read: _Reader) -> ModelConfig:
    read.must_be("do_layer_norm_before", (True,))
    read.must_be("_remove_final_layer_norm", (False,))
    read.must_be("enable_bias", (True,))
    read.must_be("layer_norm_elementwise_affine", (True,))
    read.must_be("activation_function", ("relu",))
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    read.must_be("word_embed_proj_dim", (hidden,))
    if hidden % heads:
        raise read.refuse("num_attention_heads", f"a divisor of hidden_size {hidden}")
    return ModelConfig(
        model_type="opt",
        layers=read.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,  # whatever the file says of head_dim: OPT has no such entry
        ffn=read.size("ffn_dim"),
        vocab=read.size("vocab_size"),
        positions=read.size("max_position_embeddings"),
        norm_eps=1e-5,
        tied=read.flag("tie_word_embeddings", default=True),
        activation="relu",
    )


def _llama(read: _Reader, kind: str) -> ModelConfig:
    read.must_be("hidden_act", ("silu",))
    read.must_be("partial_rotary_factor", (1.0, 1))
    positions = read.size("max_position_embeddings")
    window = read.get("sliding_window")
    # Qwen 2 and 3 name a window that they use only where this flag says so.
    windowed = read.flag("use_sliding_window", default=False) or kind == "mistral"
    if kind == "mistral" and not read.has("sliding_window"):
        window = _MISTRAL_WINDOW  # null, in contrast, means no window
    if windowed and window is not None and read.size("sliding_window", _MISTRAL_WINDOW) < positions:
        raise read.refuse("sliding_window", f"null, or at least the {positions} positions: windows are not implemented")
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    linear, llama3 = _scaling(read)
    return ModelConfig(
        model_type=kind,
        layers=read.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=_head_dim(read, hidden, heads),
        ffn=read.size("intermediate_size"),
        vocab=read.size("vocab_size"),
        positions=positions,
        norm_eps=read.real("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings", default=False),
        activation="silu",
        rope_theta=_theta(read),
        rope_linear=linear,
        rope_llama3=llama3,
        qk_norm=kind == "qwen3",
    )


def _theta(read: _Reader) -> float:
    parameters = read.get("rope_parameters")  # newer files keep it there
    if isinstance(parameters, dict) and parameters.get("rope_theta") is not None:
        return read.real_in(parameters, "rope_theta", "rope_parameters.rope_theta")
    return read.real("rope_theta", 10000.0)


def _scaling(read: _Reader) -> tuple[float, Llama3Scaling | None]:
    field = "rope_scaling" if read.get("rope_scaling") is not None else "rope_parameters"
    scaling = read.get(field)
    if scaling is None:
        return 1.0, None
    if not isinstance(scaling, dict):
        raise read.refuse(field, "an object")
    if scaling.get("partial_rotary_factor") not in (None, 1.0):
        raise read.refuse(field, "an object without partial_rotary_factor, or with 1: nothing else is implemented")
    kind = scaling.get("rope_type")
    kind = scaling.get("type") if kind is None else kind
    if kind == "default" or (kind is None and scaling.get("factor") is None):
        return 1.0, None
    if kind == "linear":
        return read.real_in(scaling, "factor", f"{field}.factor"), None
    if kind != "llama3":
        raise read.refuse(field, "a rope_type of default, linear or llama3: nothing else is implemented")
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(original, int) or isinstance(original, bool) or not 1 <= original <= _MOST:
        expected = f"an object with an integer original_max_position_embeddings in 1..{_MOST}"
        raise read.refuse(field, expected)
    low = read.real_in(scaling, "low_freq_factor", f"{field}.low_freq_factor")
    high = read.real_in(scaling, "high_freq_factor", f"{field}.high_freq_factor")
    if not low < high:
        raise read.refuse(field, "low_freq_factor below high_freq_factor")
    factor = read.real_in(scaling, "factor", f"{field}.factor")
    return 1.0, Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model must have, with its shape.

    The head is listed unless it is the embedding. Biases that only some models have are in :func:`bias_shapes`.
    """
    layout, hidden = config.layout, config.hidden
    shapes: dict[str, tuple[int, ...]] = {layout.embedding: (config.vocab, hidden)}
    if config.is_opt:
        shapes[OPT_POSITIONS] = (config.positions + OPT_POSITION_OFFSET, hidden)
    for layer in range(config.layers):
        shapes |= {f"{layout.prefix(layer)}.{name}": shape for name, shape in block_shapes(config).items()}
    shapes |= {name: (hidden,) for name in layout.outside if name not in shapes}
    if not config.tied:
        shapes[layout.head] = (config.vocab, hidden)
    return shapes


def bias_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Biases that a checkpoint may have; they are added if it does."""
    if config.is_opt:
        return {}
    shapes = block_shapes(config)
    return {
        weight.removesuffix(".weight") + ".bias": shapes[weight.removeprefix(f"{config.layout.prefix(layer)}.")][:1]
        for layer in range(config.layers)
        for weight in config.layout.linears(layer)
    }


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one block, by name without its prefix."""
    hidden, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.is_opt:
        weights = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (q, hidden), "self_attn.v_proj": (q, hidden),
            "self_attn.out_proj": (hidden, q), "fc1": (config.ffn, hidden), "fc2": (hidden, config.ffn),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in weights.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
        return shapes
    shapes = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (config.ffn, hidden),
        "mlp.up_proj.weight": (config.ffn, hidden),
        "mlp.down_proj.weight": (hidden, config.ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.model_type == "qwen2":
        shapes |= {f"self_attn.{one}_proj.bias": (q if one == "q" else kv,) for one in "qkv"}
    if config.qk_norm:
        shapes |= {f"self_attn.{one}_norm.weight": (config.head_dim,) for one in "qk"}
    return shapes
