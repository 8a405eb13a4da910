# SPDX-License-Identifier: Apache-2.0
"""Small models as GGUF files, written with the package ``gguf``, for tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, GROUPS, FF, VOCAB, BLOCKS = 256, 4, 2, 512, 40, 2
SIZE = HIDDEN // HEADS
BLOCK = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "attn_k.weight": ("self_attn.k_proj.weight", (GROUPS * SIZE, HIDDEN)),
    "attn_v.weight": ("self_attn.v_proj.weight", (GROUPS * SIZE, HIDDEN)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (FF, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (FF, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, FF)),
}
BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", (HIDDEN,)),
    "attn_k.bias": ("self_attn.k_proj.bias", (GROUPS * SIZE,)),
    "attn_v.bias": ("self_attn.v_proj.bias", (GROUPS * SIZE,)),
}
NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", (SIZE,)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", (SIZE,)),
}
PARTS = {"llama": BLOCK, "qwen2": BLOCK | BIASES, "qwen3": BLOCK | NORMS}


def names(arch: str) -> dict[str, tuple[str, Any]]:
    """Name in the file -> Hugging Face name and shape."""
    out: dict[str, tuple[str, Any]] = {"token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN))}
    for layer in range(BLOCKS):
        for part, (public, shape) in PARTS[arch].items():
            out[f"blk.{layer}.{part}"] = f"model.layers.{layer}.{public}", shape
    return out | {"output_norm.weight": ("model.norm.weight", (HIDDEN,))}


def permuted(hf: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k as the converter of llama.cpp leaves them: the halves of each head interleaved."""
    rows = [h * SIZE + half * (SIZE // 2) + i for h in range(heads) for i in range(SIZE // 2) for half in (0, 1)]
    return hf[rows]


def numbers(arch: str = "llama", **others: Any) -> dict[str, Any]:
    return {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": BLOCKS, "feed_forward_length": FF,
        "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, **others,
    }  # fmt: skip


def write(
    path: Path,
    tensors: dict[str, tuple[NDArray[Any], Any]],
    *,
    arch: str = "llama",
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write a file. Tensors are arrays with a gguf type, or None for the array's own type. A key of ``fields`` is
    prefixed with the architecture, unless it begins with ``!``.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (numbers() if fields is None else fields).items():
        full = key.removeprefix("!") if key.startswith("!") else f"{arch}.{key}"
        for kind, add in ((bool, "bool"), (int, "uint32"), (float, "float32"), (str, "string"), (list, "array")):
            if isinstance(value, kind):
                getattr(writer, f"add_{add}")(full, value)
                break
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"tok{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b", "Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ x }}")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(arch: str = "llama", dtype: Any = np.float32) -> tuple[dict[str, tuple[NDArray[Any], Any]], dict[str, Any]]:
    """Tensors to write, and what must be read, by Hugging Face names."""
    stored, wanted = _model(arch, dtype)
    return dict(stored), dict(wanted)


@functools.cache
def _model(arch: str, dtype: Any) -> tuple[dict[str, tuple[NDArray[Any], Any]], dict[str, Any]]:
    rng = np.random.default_rng(7)
    stored: dict[str, tuple[NDArray[Any], Any]] = {}
    wanted: dict[str, Any] = {}
    for name, (public, shape) in names(arch).items():
        values = rng.standard_normal(shape).astype(dtype if len(shape) == 2 else np.float32)
        wanted[public] = values
        heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(name.split(".")[-2]) if arch == "llama" else None
        stored[name] = (values if heads is None else permuted(values, heads)), None
    return stored, wanted
