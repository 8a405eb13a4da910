# SPDX-License-Identifier: Apache-2.0
"""Translates a GGUF file into Hugging Face's terms: names of tensors, and the keys of ``config.json``.

Metadata that change what the model computes but cannot be expressed in these terms are refused by name: a model that
computes something else is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError, brief
from flashllm.io.gguf_header import GgufHeader, GgufTensor

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which models of Llama 3.1 and later carry as a tensor."""
INTERLEAVED = frozenset({"llama"})
"""Architectures whose rows of q and k llama.cpp permutes, for rotary pairs of neighbours instead of halves."""
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)", re.ASCII)
_CHANGES_RESULT: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
"""Keys that Hugging Face's classes of these architectures lack, and the values that do not change the result."""
_NO_TOKEN = (-1, 2**32 - 1)
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of all Llama 3 models; its ``factor`` differs."""
_MAX_SIZE = 2**31 - 1


def _scalar(header: GgufHeader, key: str) -> Any:
    """The value of ``key``, ``None`` where there is none. Raises ``FormatError`` for an array."""
    value = header.metadata.get(key)
    if isinstance(value, (tuple, np.ndarray)):
        raise FormatError(field=key, expected="one value", got=f"an array of {len(value)}", path=header.path)
    return value


class _Fields:
    """Entries of the metadata below one architecture, checked as they are taken."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.path, self.architecture = header.path, architecture
        self._header = header

    def bad(self, key: str, expected: str, got: object) -> NoReturn:
        shown = got if isinstance(got, str) else brief(got)
        raise FormatError(field=f"{self.architecture}.{key}", expected=expected, got=shown, path=self.path)

    def get(self, key: str) -> Any:
        return _scalar(self._header, f"{self.architecture}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            self.bad(key, "an integer of 1 to 2^31-1", value)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.bad(key, "a positive number", value)
        return _short(float(value))


def architecture_of(header: GgufHeader) -> str:
    """``general.architecture``. Raises ``FormatError`` if it is not supported, or if the file is not a whole model."""
    name = _scalar(header, "general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        expected = f"one of {', '.join(_ARCHITECTURES)}"
        raise FormatError(field="general.architecture", expected=expected, got=brief(name), path=header.path)
    kind = _scalar(header, "general.type")
    if kind not in (None, "model"):
        raise FormatError(field="general.type", expected="'model'", got=brief(kind), path=header.path)
    parts = _scalar(header, "split.count")
    if parts not in (None, 0, 1):
        expected = "a whole model: join its parts with `llama-gguf-split --merge`"
        raise FormatError(field="split.count", expected=expected, got=brief(parts), path=header.path)
    return name


def public_names(header: GgufHeader) -> dict[str, GgufTensor]:
    """The tensors of ``header`` by their Hugging Face names, in order; ``ROPE_FREQS`` is not among them.

    Raises ``FormatError`` for a tensor that has no such name.
    """
    fields = _Fields(header, architecture_of(header))
    blocks = fields.size("block_count")
    out: dict[str, GgufTensor] = {}
    for name, tensor in header.tensors.items():
        if name == ROPE_FREQS:
            continue
        public = _OUTSIDE.get(name) or _block_name(name, fields.architecture, blocks)
        if public is None:
            expected = f"a tensor of {fields.architecture} with blocks 0 to {blocks - 1}"
            raise FormatError(field=name, expected=expected, got="one that this architecture lacks", path=header.path)
        rank = 1 if public.endswith((".bias", "norm.weight")) else 2
        if len(tensor.shape) != rank:
            expected = f"{rank} dimension{'s'[: rank - 1]}"
            raise FormatError(field=name, expected=expected, got=f"shape {tensor.shape}", path=header.path)
        out[public] = tensor
    return out


def _block_name(name: str, architecture: str, blocks: int) -> str | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if int(layer) >= blocks or part not in _INSIDE or (part in _HEAD_NORMS and architecture != "qwen3"):
        return None
    if kind == "bias" and part not in _BIASED:
        return None
    return f"model.layers.{layer}.{_INSIDE[part]}.{kind}"


def config_of(
    header: GgufHeader, tensors: Mapping[str, GgufTensor], rope_freqs: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The content of a ``config.json`` that says the same as the metadata.

    ``tensors`` are those of :func:`public_names`; ``rope_freqs`` is the tensor ``ROPE_FREQS`` where there is one.
    Raises ``FormatError`` for metadata that are missing, are out of range, contradict the tensors, or cannot be
    expressed in ``config.json``.
    """
    fields = _Fields(header, architecture_of(header))
    _refuse_what_changes_the_result(fields)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise FormatError(field="token_embd.weight", expected="a tensor", got="none", path=header.path)
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    if hidden != embedding.shape[1]:
        fields.bad("embedding_length", f"{embedding.shape[1]}, the columns of token_embd.weight", hidden)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[fields.architecture]],
        "model_type": fields.architecture,
        "hidden_size": hidden,
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "intermediate_size": fields.size("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.positive("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16" if any(t.type == "BF16" for t in tensors.values()) else "float16",
    }
    _add_head_size(config, fields)
    _add_window(config, fields)
    scaling = _rope_scaling(config, fields, rope_freqs)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if fields.architecture != "qwen2":  # whose q, k and v always have biases
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    if fields.architecture == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in tensors
    _add_tokens(config, header)
    _check_heads(config, tensors, header.path)
    return config


def rotary_heads(public: str, config: Mapping[str, Any]) -> int | None:
    """Number of heads in the rows of tensor ``public`` if llama.cpp has permuted these, else ``None``."""
    if config["model_type"] not in ("llama", "mistral"):
        return None
    for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if public.endswith((f".self_attn.{part}.weight", f".self_attn.{part}.bias")):
            return int(config[key])
    return None


def _refuse_what_changes_the_result(fields: _Fields) -> None:
    for key, neutral in _CHANGES_RESULT.items():
        value = fields.get(key)
        if value is not None and value not in neutral:
            fields.bad(key, "none: models with it are not read", value)


def _add_head_size(config: dict[str, Any], fields: _Fields) -> None:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        fields.bad("attention.head_count_kv", f"a divisor of {heads} heads", groups)
    size = fields.size("attention.key_length", max(1, config["hidden_size"] // heads))
    if fields.get("attention.key_length") is not None:
        config["head_dim"] = size
    elif config["hidden_size"] % heads:
        fields.bad("attention.head_count", f"a divisor of embedding_length, {config['hidden_size']}", heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, size) != size:
            fields.bad(key, f"{size}, the size of a head", fields.get(key))
    if size % 2:
        fields.bad("attention.key_length", "an even size of a head", size)


def _add_window(config: dict[str, Any], fields: _Fields) -> None:
    window = fields.get("attention.sliding_window")
    if window is None or window == 0:
        return
    size = fields.size("attention.sliding_window")
    if size >= config["max_position_embeddings"]:
        return
    if fields.architecture != "llama":
        fields.bad("attention.sliding_window", "none, or one as long as the context", size)
    config.update(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=size)


def _rope_scaling(
    config: Mapping[str, Any], fields: _Fields, rope_freqs: NDArray[np.float32] | None
) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type")
    found: dict[str, Any] | None = None
    if kind in (None, "linear"):  # llama.cpp takes a factor without a type as linear
        key = "rope.scaling.factor" if fields.get("rope.scaling.factor") is not None else "rope.scale_linear"
        factor = fields.get(key)
        if factor not in (None, 0, 1):
            found = {"rope_type": "linear", "factor": fields.positive(key)}
    elif kind == "yarn":
        found = {"rope_type": "yarn", "factor": fields.positive("rope.scaling.factor")}
        found["original_max_position_embeddings"] = fields.size("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if fields.get(f"rope.scaling.yarn_{key}") is not None:
                found[key] = fields.positive(f"rope.scaling.yarn_{key}")
    elif kind != "none":
        fields.bad("rope.scaling.type", "none, linear or yarn", kind)
    if rope_freqs is None:
        return found
    if found is not None:
        fields.bad("rope.scaling.type", f"none beside the tensor {ROPE_FREQS}", kind)
    return _llama3_scaling(config, rope_freqs, fields.path)


def _llama3_scaling(config: Mapping[str, Any], divisors: NDArray[np.float32], path: str) -> dict[str, Any] | None:
    """The ``rope_scaling`` that gives ``divisors``: none where all are 1, else that of the Llama 3 models."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def refuse(got: str) -> NoReturn:
        expected = f"{size // 2} float32, as the Llama 3 models have them"
        raise FormatError(field=ROPE_FREQS, expected=expected, got=got, path=path)

    if divisors.dtype != np.float32 or divisors.shape != (size // 2,):
        refuse(f"{divisors.dtype} of shape {divisors.shape}")
    if (divisors == 1).all():
        return None
    factor = _short(float(divisors.max()))
    if not 1 < factor < math.inf:
        refuse(f"a factor of {factor}")
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    wanted = _llama3_divisors(config["rope_theta"], size, factor)
    # The file may have been computed in float32, with another order of operations.
    if not np.allclose(divisors, wanted, rtol=1e-4, atol=0):
        refuse("other values")
    return scaling


def _llama3_divisors(theta: float, size: int, factor: float) -> NDArray[np.float64]:
    """What each rotary pair's frequency is divided by: 1 for fast ones, ``factor`` for slow ones, else in between."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    with np.errstate(over="ignore"):
        wavelength = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    share = (_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low)
    share = np.clip(share, 0, 1)
    out: NDArray[np.float64] = 1 / ((1 - share) / factor + share)
    return out


def _add_tokens(config: dict[str, Any], header: GgufHeader) -> None:
    for key in ("bos", "eos", "unknown", "padding"):
        field = f"tokenizer.ggml.{key}_token_id"
        value = _scalar(header, field)
        if value is None or value in _NO_TOKEN:
            continue
        if type(value) is not int or not 0 <= value < config["vocab_size"]:
            expected = f"a token of 0 to {config['vocab_size'] - 1}"
            raise FormatError(field=field, expected=expected, got=brief(value), path=header.path)
        if key in ("bos", "eos"):
            config[f"{key}_token_id"] = value
        elif key == "padding":
            config["pad_token_id"] = value


def _check_heads(config: Mapping[str, Any], tensors: Mapping[str, GgufTensor], path: str) -> None:
    """Check that the rows of q and k are whole heads, on which their permutation depends."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for public, tensor in tensors.items():
        heads = rotary_heads(public, config)
        if heads is not None and tensor.shape[0] != heads * size:
            expected = f"{heads * size} rows, {heads} heads of {size}"
            raise FormatError(field=tensor.name, expected=expected, got=str(tensor.shape[0]), path=path)


def _short(value: float) -> float:
    """The shortest decimal for the same float32: files hold 1e-05 as 9.999999747378752e-06."""
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value
