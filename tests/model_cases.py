# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints in the layout of Hugging Face, and tiny tokenizers, for tests of whole models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flashllm.io.checkpoint import open_checkpoint
from flashllm.models.config import model_config

KINDS = ("opt", "llama", "mistral", "qwen2", "qwen3")
VOCAB = 101
_DTYPES: Mapping[str, Any] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def config_of(kind: str, *, dtype: str = "F16", tied: bool = True, **config: Any) -> dict[str, Any]:
    """The content of ``config.json``, 2 blocks of odd sizes; an entry of ``config`` that is None is absent."""
    common = {"model_type": kind, "vocab_size": VOCAB, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    common |= {"torch_dtype": _TORCH[dtype], "max_position_embeddings": 320, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "opt":
        own: dict[str, Any] = {
            "hidden_size": 39,
            "num_attention_heads": 3,
            "ffn_dim": 57,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "word_embed_proj_dim": config.get("hidden_size", 39),
        }
    else:
        own = {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 3 if kind == "mistral" else 2,
            "intermediate_size": 53,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }
        if kind == "qwen3":  # together, the heads are wider than the hidden state
            own["head_dim"] = 10
    return {key: value for key, value in (common | own | config).items() if value is not None}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, written out here a second time; the head only where it is not the embedding."""
    kind, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, config.get("num_key_value_heads", heads) * size
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "opt":
        top, ffn = "model.decoder", config["ffn_dim"]
        shapes[f"{top}.embed_tokens.weight"] = (vocab, hidden)
        shapes[f"{top}.embed_positions.weight"] = (config["max_position_embeddings"] + 2, hidden)
        shapes |= {f"{top}.final_layer_norm.{part}": (hidden,) for part in ("weight", "bias")}
        rows = {"q_proj": (q, hidden), "k_proj": (q, hidden), "v_proj": (q, hidden), "out_proj": (hidden, q)}
        linears = {f"self_attn.{name}": shape for name, shape in rows.items()}
        linears |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        block = {f"{name}.weight": shape for name, shape in linears.items()}
        block |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            block |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    else:
        top, ffn = "model", config["intermediate_size"]
        shapes["model.embed_tokens.weight"] = (vocab, hidden)
        shapes["model.norm.weight"] = (hidden,)
        rows = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        linears = {f"self_attn.{name}": shape for name, shape in rows.items()}
        linears |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
        block = {f"{name}.weight": shape for name, shape in linears.items()}
        block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if kind == "qwen2":
            block |= {f"self_attn.{one}_proj.bias": rows[f"{one}_proj"][:1] for one in "qkv"}
        if kind == "qwen3":
            block |= {f"self_attn.{one}_norm.weight": (size,) for one in "qk"}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"{top}.layers.{layer}.{name}": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def random_tensors(config: Mapping[str, Any], *, seed: int = 0, zeros: float = 0.0) -> dict[str, NDArray[np.float32]]:
    """Values of about 1 between the layers, and scores of attention that are far from equal.

    ``zeros``: the fraction of the blocks' matrices that is exactly 0.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes_of(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            inside = ".layers." in name
            values *= 1.5 / np.sqrt(shape[1]) if inside or name == "lm_head.weight" else 0.5
            if inside and zeros:
                values[rng.random(shape) < zeros] = 0.0
        elif name.endswith("bias"):
            values *= 0.2
        else:
            values = 1 + 0.2 * values
        tensors[name] = values
    return tensors


def write_tensors(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], *, dtype: str = "F16"
) -> Path:
    """Make ``folder`` with ``config.json`` and ``model.safetensors``, its ``tensors`` rounded to ``dtype``."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file({name: value.astype(_DTYPES[dtype]) for name, value in tensors.items()}, path / "model.safetensors")
    return path


def write_checkpoint(
    folder: str | Path,
    kind: str,
    *,
    dtype: str = "F16",
    tied: bool = True,
    seed: int = 0,
    zeros: float = 0.0,
    **config: Any,
) -> Path:
    """A checkpoint of one of ``KINDS``; ``config`` replaces entries of its ``config.json``. Returns its directory."""
    made = config_of(kind, dtype=dtype, tied=tied, **config)
    return write_tensors(folder, made, random_tensors(made, seed=seed, zeros=zeros), dtype=dtype)


def write_tokenizer(folder: str | Path, *, begin: bool = True) -> Path:
    """``tokenizer.json`` in ``folder``, with ``VOCAB`` tokens: printable ASCII, byte by byte, except for ``th``.

    ``begin``: ``<s>``, token 1, is put before every text. Needs the package ``tokenizers``.
    """
    import tokenizers

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # of byte-level BPE: a space, an end of line
    names = ["<unk>", "<s>", "</s>", *letters, "th", "Ġth"]
    assert len(names) == VOCAB
    numbered = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(numbered, [("t", "h"), ("Ġ", "th")], unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if begin:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    path = Path(folder) / "tokenizer.json"
    made.save(str(path))
    return path


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a checkpoint, by name."""
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def matrix_names(path: Path) -> set[str]:
    """Names of the matrices that may be pruned."""
    with open_checkpoint(path) as checkpoint:
        config = model_config(checkpoint.config)
    return {name for layer in range(config.layers) for name in config.layout.linears(layer)}
