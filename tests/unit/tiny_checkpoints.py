# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tiny models with zeros, and a check of what converting back must give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import weight_cases as cases
from flashllm.convert.back import to_hugging_face
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.manifest import DENSE
from flashllm.io.safetensors_file import write_file
from flashllm.io.sparse_model import SparseModel
from flashllm.models.config import model_config, tensor_shapes

LAYERS = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt", "num_hidden_layers": LAYERS, "hidden_size": 40, "ffn_dim": 72, "num_attention_heads": 4,
        "vocab_size": 50, "max_position_embeddings": 30, "torch_dtype": "float16",
    },
    "llama": {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 40, "intermediate_size": 72,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 30,
        "torch_dtype": "float16",
    },
}  # fmt: skip
NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj"


def tensors_of(kind: str, dtype: str, density: float = 0.3) -> dict[str, NDArray[Any]]:
    """All tensors of a tiny model; matrices of linear layers have zeros of both signs, NaN and infinities."""
    found = {}
    for seed, (name, shape) in enumerate(tensor_shapes(model_config(CONFIGS[kind])).items()):
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        pattern = "uniform" if ".layers." in name and len(shape) == 2 else "full"
        found[name] = cases.matrix(pattern, rows, columns, density, seed, dtype).reshape(shape)
    return found


def write(directory: Path, kind: str, tensors: Mapping[str, NDArray[Any]], **config: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIGS[kind], **config}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    write_file(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def read(directory: Path) -> dict[str, NDArray[Any]]:
    with open_checkpoint(directory) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def check_back(sparse: Path, out: Path, tensors: Mapping[str, NDArray[Any]], **options: Any) -> None:
    """The directory turns back into ``tensors``, with every zero positive in packed linear layers."""
    to_hugging_face(sparse, out, **options)
    back = read(out)
    assert set(back) == set(tensors)
    manifest = SparseModel(sparse).manifest
    packed = {m.name for w in manifest.weights.values() if w.format != DENSE for m in w.members}
    for name, array in tensors.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        wanted = cases.pruned(array) if name in packed else array.view(np.uint16)
        np.testing.assert_array_equal(back[name].view(np.uint16), wanted, err_msg=name)
