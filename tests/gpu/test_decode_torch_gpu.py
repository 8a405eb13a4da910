# SPDX-License-Identifier: Apache-2.0
"""Decoders in PyTorch on a GPU: compiled steps against float64 and against our engine, 2:4 matrices, rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine_cases as cases
from flashllm.bench import decode_rows
from flashllm.bench.decode import SYSTEMS
from flashllm.bench.decode_session import Sweep
from flashllm.bench.decode_torch import TorchDecoder, to_torch
from flashllm.bench.decode_torch_system import skipped_graphs, two_of_four_weights
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights
from flashllm.engine.engine import Engine
from flashllm.engine.runtime import GpuRuntime
from flashllm.formats.base import DType
from flashllm.models import known, quality
from flashllm.models.known import CONFIGS, known_config

torch = pytest.importorskip("torch")

BATCH, PROMPT, OUTPUT = 3, 5, 8
CAPACITY = 20
_16_BIT_SUMS = 2.0
"""Multiple of the bound of an engine, whose residual stream is fp32."""
OTHERS = ("torch-compile", "hf-static", "torch-2:4")


@pytest.fixture(autouse=True)
def _compiled_anew(cp: Any) -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("a PyTorch without CUDA")
    yield
    torch.compiler.reset()
    torch.cuda.empty_cache()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"vocab_size": 2000, "max_position_embeddings": 64, "num_hidden_layers": 2,
        "hidden_size": 128, "num_attention_heads": 4}  # fmt: skip
    gated = {"num_key_value_heads": 2, "intermediate_size": 192, "head_dim": 32}
    own = {"ffn_dim": 256, "word_embed_proj_dim": 128}
    monkeypatch.setitem(known.CONFIGS, "tiny-opt", {**CONFIGS["opt-13b"], **sizes, **own})
    monkeypatch.setitem(known.CONFIGS, "tiny-qwen3", {**CONFIGS["qwen3-32b"], **sizes, **gated})


def decode(decoder: TorchDecoder, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray[Any, Any]:
    """Logits [count, batch, vocab] after the prompts and after each token of the output except the last."""
    decoder.logits.fill_(float("nan"))
    decoder.start(prompts)
    steps = [decoder.logits.double().cpu().numpy()]
    for _ in range(count - 1):
        decoder.step()
        steps.append(decoder.logits.double().cpu().numpy())
    return np.stack(steps)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["opt", "qwen2", "qwen3"])
def test_compiled_steps_give_the_tokens_of_our_engine(kind: str, dtype: DType, cp: Any, tmp_path: Path) -> None:
    """Except after a choice between two tokens whose logits are closer than rounding might make them."""
    model = cases.make_model(tmp_path, kind, dtype)
    weights = model.load(cp, None)
    prompts = cases.random_prompts((PROMPT,) * BATCH)
    engine = Engine(weights, GpuRuntime(), batch=BATCH, capacity=CAPACITY)
    ours = engine.generate(prompts, cases.greedy((OUTPUT,) * BATCH))
    skipped = skipped_graphs()
    decoder = TorchDecoder(to_torch(weights), batch=BATCH, capacity=CAPACITY)
    for _ in range(2):  # the second time every step is a replay
        found = decode(decoder, prompts, OUTPUT)
        outputs = decoder.tokens(PROMPT, OUTPUT)
        sequences = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        bound = _16_BIT_SUMS * model.bound(sequences)
        for i, sequence in enumerate(sequences):
            wanted = model.logits(sequence)[PROMPT - 1 : -1]
            assert quality.largest_difference(found[:, i], wanted) <= bound
            assert outputs[i] == found[:, i].argmax(axis=1).tolist()
            parted = next((j for j in range(OUTPUT) if outputs[i][j] != ours[i][j]), None)
            if parted is not None:
                assert abs(wanted[parted, outputs[i][parted]] - wanted[parted, ours[i][parted]]) <= bound
    assert skipped_graphs() == skipped


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("batch", [3, 8])
def test_packed_matrices_give_what_the_same_dense_ones_give(batch: int, cp: Any) -> None:
    config = known_config("tiny-qwen3")
    try:
        packed = two_of_four_weights(config, "fp16", lambda title, done: None)
    except RuntimeError as error:
        pytest.skip(f"PyTorch has no 2:4 matrices here: {error}")
    dense = replace(
        packed,
        blocks=tuple(
            replace(block, **{part: getattr(block, part).to_dense() for part in PARTS}) for block in packed.blocks
        ),
    )
    whole = to_torch(random_weights(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, xp=cp))
    assert torch.equal(packed.embedding, whole.embedding)
    for block, given in zip(dense.blocks, whole.blocks, strict=True):
        kept = block.up != 0
        assert torch.equal(block.up[kept], given.up[kept])
        assert bool((kept.reshape(-1, 4).sum(dim=1) == 2).all())
    prompts = np.random.default_rng(1).integers(0, config.vocab, (batch, PROMPT)).tolist()
    wanted = decode(TorchDecoder(dense, batch=batch, capacity=CAPACITY, compiled=False), prompts, 1)
    decoder = TorchDecoder(packed, batch=batch, capacity=CAPACITY)
    found = decode(decoder, prompts, OUTPUT)
    assert np.abs(found[0] - wanted[0]).max() <= 0.02 * np.abs(wanted[0]).max()
    sequences = [[*prompt, *output] for prompt, output in zip(prompts, decoder.tokens(PROMPT, OUTPUT), strict=True)]
    again = TorchDecoder(dense, batch=batch, capacity=CAPACITY, compiled=False)
    for j in range(1, OUTPUT):  # what steps have found is what prompts of the same tokens give
        wanted = decode(again, [sequence[: PROMPT + j] for sequence in sequences], 1)
        assert np.abs(found[j] - wanted[0]).max() <= 0.02 * np.abs(wanted[0]).max()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("model", "dtype"), [("tiny-opt", "fp16"), ("tiny-qwen3", "fp16"), ("tiny-qwen3", "bf16")])
def test_rows_of_all_systems(model: str, dtype: DType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    notes: list[str] = []
    sweep = Sweep(model=model, sparsities=[0.8], systems=["dense", *OTHERS], batches=[3, 8], prompt=PROMPT,
        output=OUTPUT, dtype=dtype)  # fmt: skip
    rows = list(sweep.rows(note=notes.append))
    assert all("torch-2:4" in note for note in notes), notes
    wanted = [(system, batch) for system in ("dense", *OTHERS) for batch in (3, 8)]
    for note in notes:  # of one batch, or of all
        wanted = [
            (system, batch)
            for system, batch in wanted
            if system != "torch-2:4" or ("batch" in note and f"batch {batch}:" not in note)
        ]
    assert [(row.system, row.batch) for row in rows] == [(SYSTEMS[system], batch) for system, batch in wanted]
    for row in rows:
        assert row.seconds is not None
        assert row.ttft_ms is not None
        assert row.tpot_ms is not None
        assert 0 < row.ttft_ms < 1e3 * row.seconds
        assert row.tpot_ms * (OUTPUT - 1) + row.ttft_ms == pytest.approx(1e3 * row.seconds, rel=0.02, abs=0.2)
        assert 0 < row.matrices_gb < row.weights_gb < (row.peak_gb or 0)
        assert row.workspace_gb >= 0
        assert row.launch is not None
        assert row.launch.startswith("graph"), row.system
        assert (row.step_ms is None) == (row.system != "flashllm-dense")
        decode_rows.append(tmp_path / "rows.jsonl", row)
    assert decode_rows.read(tmp_path / "rows.jsonl") == rows
    dense = {row.system: row for row in rows if row.batch == 8}
    assert dense["torch-compile"].matrices_gb == dense["hf-static"].matrices_gb == dense["flashllm-dense"].matrices_gb
