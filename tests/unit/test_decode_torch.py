# SPDX-License-Identifier: Apache-2.0
"""The PyTorch decoder against float64, for every kind of model, on the CPU; models of the package transformers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine_cases as cases
from flashllm.baselines.pattern_24 import keep_two_of_four
from flashllm.bench import decode, decode_hf, decode_torch, decode_torch_system
from flashllm.bench.decode import Case, Sizes
from flashllm.bench.decode_hf import HfSystem
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_systems import Subject, System
from flashllm.bench.decode_torch import TorchDecoder, prefill_rows, to_torch
from flashllm.bench.decode_torch_system import TorchSystem
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights
from flashllm.bench.environment import Environment
from flashllm.bench.telemetry import Reading
from flashllm.engine.weights import Weights
from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.models import quality
from flashllm.models.config import model_config, tensor_shapes
from flashllm.models.forward import rope_frequencies
from model_cases import KINDS, config_of

torch = pytest.importorskip("torch")

BATCH, PROMPT, OUTPUT = 3, 5, 4
CAPACITY = 20  # not a multiple of the alignment of mask rows


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mapped(weights: Weights, change: Callable[[Any], Any]) -> Weights:
    """``weights`` with every tensor changed."""

    def each(record: Any) -> Any:
        changed = {name: change(t) for name, t in vars(record).items() if isinstance(t, torch.Tensor)}
        return replace(record, **changed)

    made: Weights = each(weights)
    return replace(made, blocks=tuple(each(block) for block in weights.blocks))


def check(decoder: TorchDecoder, model: cases.Reference, bound: float | None) -> list[list[int]]:
    """Logits of every token are close to those in float64, and tokens are those with the largest logits.

    ``bound``: the most that logits may be off; by default the bound of a 16-bit model.
    """
    prompts = cases.random_prompts((PROMPT,) * BATCH)
    for tensor in (one for layer in decoder.cache for one in layer):
        tensor.fill_(1000.0)  # which a mask hides; it would not hide NaN
    decoder.logits.fill_(float("nan"))
    decoder.start(prompts)
    steps = [decoder.logits.numpy().copy()]
    for _ in range(OUTPUT - 1):
        decoder.step()
        steps.append(decoder.logits.numpy().copy())
    outputs = decoder.tokens(PROMPT, OUTPUT)
    assert decoder.tokens(0, PROMPT) == prompts
    sequences = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    bound = model.bound(sequences) if bound is None else bound
    for i, sequence in enumerate(sequences):
        wanted = model.logits(sequence)[PROMPT - 1 : -1]
        found = np.stack([step[i] for step in steps]).astype(np.float64)
        assert quality.largest_difference(found, wanted) <= bound
        assert outputs[i] == found.argmax(axis=1).tolist()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp32_logits_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    model = cases.make_model(tmp_path, kind, "fp16")
    weights = mapped(to_torch(model.load(np, None)), lambda tensor: tensor.float())
    decoder = TorchDecoder(weights, batch=BATCH, capacity=CAPACITY, compiled=False)
    outputs = check(decoder, model, 2e-5)
    assert len({tuple(output) for output in outputs}) == BATCH
    assert check(decoder, model, 2e-5) == outputs  # a second time, over what the first one left


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_in_16_bits_logits_are_as_near_as_those_of_an_engine(kind: str, dtype: DType, tmp_path: Path) -> None:
    model = cases.make_model(tmp_path, kind, dtype)
    weights = to_torch(model.load(np, None))
    check(TorchDecoder(weights, batch=BATCH, capacity=CAPACITY, compiled=False), model, None)


def test_tensors_are_on_the_memory_of_the_weights(tmp_path: Path) -> None:
    given = cases.make_model(tmp_path, "llama", "bf16").load(np, None)
    found = to_torch(replace(given, head=given.embedding))
    assert found.head is found.embedding
    assert found.embedding.dtype == torch.bfloat16
    assert found.blocks[1].down.data_ptr() == given.blocks[1].down.ctypes.data
    assert found.nbytes == replace(given, head=given.embedding).nbytes


def test_a_step_is_one_graph_that_copies_no_input(tmp_path: Path) -> None:
    """PyTorch would copy tensors before every replay of a CUDA graph if it did not know that they stay in place."""
    stays: list[object] = []

    def backend(graph: Any, _inputs: list[Any]) -> Any:
        tensors = [node.meta["tensor_dict"] for node in graph.graph.nodes if node.op == "placeholder"]
        stays.extend(one.get("_dynamo_static_input_type") for one in tensors)
        return graph

    model = cases.make_model(tmp_path, "qwen3", "fp16")
    weights = mapped(to_torch(model.load(np, None)), lambda tensor: tensor.float())
    decoder = TorchDecoder(weights, batch=BATCH, capacity=CAPACITY, compiled=False)
    decoder.step = torch.compile(decoder.step, fullgraph=True, dynamic=False, backend=backend)
    try:
        check(decoder, model, 2e-5)
    finally:
        torch.compiler.reset()
    assert len(stays) == 3 + 2 * (8 + 2) + 5  # tables and norm; of a block tensors and cache; what the decoder keeps
    assert all(stays)


def test_prompts_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_torch, "PREFILL_ROWS", 2 * PROMPT + 1)
    assert prefill_rows(BATCH, PROMPT) == 2 * PROMPT
    assert prefill_rows(BATCH, 99) == 99
    assert prefill_rows(1, PROMPT) == PROMPT
    model = cases.make_model(tmp_path, "mistral", "fp16")
    weights = mapped(to_torch(model.load(np, None)), lambda tensor: tensor.float())
    check(TorchDecoder(weights, batch=BATCH, capacity=CAPACITY, compiled=False), model, 2e-5)


def test_prompts_that_cannot_be_decoded_are_refused(tmp_path: Path) -> None:
    weights = to_torch(cases.make_model(tmp_path, "llama", "fp16").load(np, None))
    decoder = TorchDecoder(weights, batch=2, capacity=4, compiled=False)
    with pytest.raises(ArgumentError, match=r"prompts: expected 2 of equal length, got lengths \[1, 2\]"):
        decoder.start([[1], [1, 2]])
    with pytest.raises(ArgumentError, match=r"prompts\[0\]: expected at most 4 tokens"):
        decoder.start([[1, 2, 3, 4]] * 2)
    with pytest.raises(ArgumentError, match=r"capacity: expected 1\.\.320"):
        TorchDecoder(weights, batch=2, capacity=321, compiled=False)


@pytest.fixture
def _cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch on the CPU, NumPy for CuPy, nothing compiled; 2:4 matrices stay as they are."""
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1 << 40)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda tensor: tensor)
    monkeypatch.setitem(sys.modules, "cupy", np)
    monkeypatch.setattr("flashllm.device.free_memory", lambda: 1 << 40)
    for module in (decode_hf, decode_torch_system):
        monkeypatch.setattr(module, "torch_on_gpu", lambda: torch)
        monkeypatch.setattr(module, "taken_since", lambda free: 1 << 20)
    monkeypatch.setattr("flashllm.bench.telemetry.read", Reading)
    monkeypatch.setattr(decode_torch_system, "free_pool", lambda: None)
    monkeypatch.setattr(decode_hf, "_DEVICE", "cpu")


def a_subject(kind: str, dtype: DType = "fp16") -> Subject:
    config = model_config(config_of(kind, tied=False, hidden_size=40, num_attention_heads=5, head_dim=8,
        num_key_value_heads=1, ffn_dim=56, intermediate_size=56))  # fmt: skip
    facts = Environment(run_id="a", sweep_id="b", commit=None, dirty=None, command="", backend="cuda")
    return Subject(facts=facts, model=kind, config=config, dtype=dtype, read_gbps=1000.0)


@pytest.mark.usefixtures("_cpu_for_gpu")
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_pruned_weights_are_the_dense_ones_with_two_of_four(kind: str) -> None:
    config, blocks = a_subject(kind).config, list[str]()
    dense = random_weights(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, xp=np)
    found = decode_torch_system.two_of_four_weights(config, "fp16", lambda title, done: blocks.append(title))
    assert blocks == ["block 0", "block 1"]
    assert np.array_equal(found.head.numpy(), dense.head)
    assert [vars(block).keys() for block in found.blocks] == [vars(block).keys() for block in dense.blocks]
    for block, given in zip(found.blocks, dense.blocks, strict=True):
        for part in PARTS:
            assert np.array_equal(getattr(block, part).numpy(), keep_two_of_four(getattr(given, part)))
        assert (block.qkv_bias is None) == (given.qkv_bias is None)
        assert np.array_equal(block.ffn_norm.numpy(), given.ffn_norm)


@pytest.mark.usefixtures("_cpu_for_gpu")
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["torch-compile", "hf-static"])
def test_systems_make_a_row_of_each_case(name: str, dtype: DType, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "hf-static":
        pytest.importorskip("transformers")
    subject, made, fill_row = a_subject(kind, dtype), list[Sizes](), decode.fill_row

    def keep_sizes(facts: Environment, case: Case, sizes: Sizes, **fields: Any) -> DecodeRow:
        made.append(sizes)
        return fill_row(facts, case, sizes, **fields)

    monkeypatch.setattr(decode, "fill_row", keep_sizes)
    system: System = HfSystem(subject) if name == "hf-static" else TorchSystem(subject, pruned=False)
    steps = list[int]()
    system.load(lambda title, done: steps.append(done))
    assert sum(steps) == subject.config.layers
    for batch in (1, 3):
        case = Case(batch=batch, prompt=5, output=11)
        row = system.row(case)
        plan = system.plan(case)
        assert (row.system, row.format, row.batch, row.launch, row.dtype) == (name, DENSE, batch, "graph", dtype)
        sizes, tensors = made.pop(), tensor_shapes(subject.config).values()
        assert (sizes.matrices, sizes.cache) == (plan.matrices, plan.cache)
        assert sizes.weights == 2 * sum(math.prod(shape) for shape in tensors)
        assert sizes.head == 2 * 101 * 40
        assert row.seconds
        assert row.ttft_ms
        assert 0 < row.ttft_ms < 1e3 * row.seconds
        assert row.bound_ms is not None
    system.close()


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_have_the_same_tensors(kind: str, tied: bool) -> None:
    pytest.importorskip("transformers")
    config = model_config(config_of(kind, tied=tied))
    model = decode_hf.new_model(config, torch.float16)
    assert {name: tuple(one.shape) for name, one in model.named_parameters()} == tensor_shapes(config)
    assert {one.dtype for one in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=str)
def test_models_of_transformers_rotate_likewise(scaling: dict[str, Any] | None) -> None:
    pytest.importorskip("transformers")
    config = model_config(config_of("llama", rope_theta=5000.0, rope_scaling=scaling))
    model = decode_hf.new_model(config, torch.float32)
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), rope_frequencies(config, np), rtol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_transformers_make_as_many_tokens_as_asked_for(kind: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = decode_hf.new_model(model_config(config_of(kind)), torch.float32)
    prompts = torch.tensor(cases.random_prompts((PROMPT,) * BATCH))
    tokens, times = decode_hf.generate(model, prompts, OUTPUT)
    assert tokens.shape == (BATCH, PROMPT + OUTPUT)
    assert torch.equal(tokens[:, :PROMPT], prompts)
    assert 0 < times.first < times.total
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :]
    assert torch.equal(logits.argmax(dim=-1), tokens[:, PROMPT:])
