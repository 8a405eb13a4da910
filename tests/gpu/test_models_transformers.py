# SPDX-License-Identifier: Apache-2.0
"""Logits of whole models against the package transformers: tiny random ones of every kind, in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.io.checkpoint import open_checkpoint
from flashllm.models import quality
from flashllm.models.dense import DenseModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, SEQUENCES, LENGTH = 101, 2, 140  # more tokens than the queries that attention takes at once
COMMON = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 53,
    "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"hidden_size": 39, "num_attention_heads": 3, "ffn_dim": 57}),
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama-3": ("llama", {**LLAMA, "tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**LLAMA, "num_key_value_heads": 3, "sliding_window": None}),
    "qwen2": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 10}),
}


def _random_model(kind: str, config: dict[str, Any]) -> Any:
    """An fp32 model with values of about 1 between layers: a new model's are so small that attention just averages."""
    made = transformers.AutoConfig.for_model(kind, **COMMON, **config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                values = 1 + 0.2 * values if name.endswith("norm.weight") else 0.2 * values
            elif "layers" in name or "lm_head" in name:
                values *= 1.5 / math.sqrt(parameter.shape[1])
            parameter.copy_(values)
    return model


def _logits(model: DenseModel, tokens: NDArray[np.int64]) -> NDArray[Any]:
    hidden, outside = quality.run_blocks(model, model.xp.asarray(tokens))
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = [part.get() if hasattr(part, "get") else part for _, part in quality.head(model, outside, rows)]
    return np.concatenate(parts).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, cp: Any, case: str) -> None:
    model = _random_model(*CASES[case])
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, LENGTH))
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
    largest = float(np.abs(wanted).max())
    assert wanted.shape == (SEQUENCES, LENGTH, VOCAB)
    assert largest > 1
    with open_checkpoint(tmp_path) as checkpoint:
        for xp in (np, cp):
            found = _logits(DenseModel(checkpoint, xp=xp), tokens)
            assert found.dtype == np.float32
            assert np.abs(found - wanted).max() < 1e-4 * largest, xp.__name__
