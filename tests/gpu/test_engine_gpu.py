# SPDX-License-Identifier: Apache-2.0
"""Whole models in an engine on a GPU: the cases of the emulator, captured steps, and a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from numpy.typing import NDArray

from engine_cases import CAPACITY, CASES, PREFILL_ROWS, Model, Reference, check, greedy, make_model, random_prompts
from experiments.real_weights import model_path
from flashllm.convert.run import convert
from flashllm.engine.engine import Engine
from flashllm.engine.forward import run
from flashllm.engine.generate import ModelFiles
from flashllm.engine.products import GpuProducts
from flashllm.engine.runtime import GpuRuntime, Runtime
from flashllm.engine.sampling import SamplingOptions
from flashllm.errors import MissingDependencyError, UnsupportedDeviceError
from flashllm.formats.base import DType
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.sparse_model import SparseModel
from flashllm.models.dense import DenseModel
from flashllm.models.packed import UnpackedModel
from flashllm.prune.run import Settings, prune

Made = Callable[[str, DType], Model]
SMOL_PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a small dragon who")
SMOL_TOKENS = 64


@pytest.fixture
def runtime(cp: Any) -> Iterator[Runtime]:
    made = GpuRuntime()
    yield made
    made.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind, dtype: make_model(root / f"{kind}-{dtype}", kind, dtype))


@pytest.mark.parametrize(("kind", "dtype", "format"), CASES)
def test_against_float64(made: Made, runtime: Runtime, kind: str, dtype: DType, format: str | None) -> None:
    model = made(kind, dtype)
    weights = model.load(runtime.xp, format)
    engine = Engine(weights, runtime, batch=3, capacity=CAPACITY, prefill_rows=PREFILL_ROWS)
    check(engine, model, random_prompts(), greedy())


@pytest.mark.parametrize("format", [None, "bitmap"])
def test_long_sequences(made: Made, runtime: Runtime, format: str | None) -> None:
    """A step's attention has several splits, and prompts have more queries than a prefill block."""
    model = made("mistral", "fp16")
    engine = Engine(model.load(runtime.xp, format), runtime, batch=4, capacity=320)
    assert engine._plan.splits > 1
    check(engine, model, random_prompts((150, 1, 280, 64)), greedy((30, 12, 40, 9)))


def steps(engine: Engine, step: Callable[[], object], count: int) -> list[NDArray[np.float32]]:
    """Logits of the first token and of ``count`` more."""
    options = [SamplingOptions(temperature=0.8, seed=seed, max_new_tokens=count + 1) for seed in range(engine.batch)]
    engine.start(random_prompts(), options)
    found = [engine.runtime.fetch(engine.logits)]
    for _ in range(count):
        step()
        found.append(engine.runtime.fetch(engine.logits))
    return found


@pytest.mark.parametrize("format", [None, "tiled-csl", "slot24"])
@pytest.mark.parametrize("overlap", [False, True], ids=["ordinary", "overlapping"])
def test_a_captured_step_gives_the_bits_of_its_launches(
    cp: Any, made: Made, format: str | None, overlap: bool
) -> None:  # fmt: skip
    try:
        runtime = GpuRuntime(overlap=overlap)
    except (MissingDependencyError, UnsupportedDeviceError) as error:
        pytest.skip(str(error))
    weights = made("llama", "fp16").load(cp, format)
    engine = Engine(weights, runtime, batch=3, capacity=CAPACITY, prefill_rows=PREFILL_ROWS)
    plain = steps(engine, lambda: run(engine.decode_operations()), 12)
    tokens = engine.tokens()
    captured = steps(engine, engine.step, 12)
    assert engine.tokens() == tokens
    for one, other in zip(plain, captured, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
    runtime.close()


def test_overlap_changes_no_bit(cp: Any, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which cuBLAS algorithm is the fastest may differ from run to run, and with it the last bits of the logits.
    monkeypatch.setattr(GpuProducts, "_fastest", lambda self, key, weights: self._default(key))
    try:
        runtimes = [GpuRuntime(overlap=overlap) for overlap in (False, True)]
    except (MissingDependencyError, UnsupportedDeviceError) as error:
        pytest.skip(str(error))
    found = []
    for runtime in runtimes:
        weights = made("llama", "fp16").load(cp, "bitmap")
        engine = Engine(weights, runtime, batch=3, capacity=CAPACITY, prefill_rows=PREFILL_ROWS)
        found.append(steps(engine, engine.step, 20))
        runtime.close()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_a_graph_serves_later_prompts(made: Made, runtime: Runtime) -> None:
    """Products with other numbers of rows may have moved memory in the meantime."""
    model = made("qwen2", "fp16")
    engine = Engine(model.load(runtime.xp, "slot24"), runtime, batch=3, capacity=200)
    for lengths in ((3, 2, 1), (150, 90, 120), (1, 1, 1)):
        check(engine, model, random_prompts(lengths, seed=sum(lengths)), greedy())


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2-135M in fp16: as it is, and half pruned by magnitude, as a Hugging Face directory and packed."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    try:
        source = model_path()
    except click.ClickException as error:
        pytest.skip(error.message)
    root = tmp_path_factory.mktemp("smollm2")
    convert(source, root / "whole", format="dense", dtype="fp16")
    with open_checkpoint(source) as checkpoint:
        prune(checkpoint, root / "pruned", Settings(method="magnitude", sparsity=0.5))
    convert(root / "pruned", root / "packed", format="bitmap")
    return {name: root / name for name in ("whole", "pruned", "packed")}


def reference_of(source: Any, xp: Any) -> Reference:
    exact, narrow = DenseModel(source, xp=xp, dtype=np.float64), DenseModel(source, xp=xp, narrow="fp16")
    return Reference(exact=exact, narrow=narrow)


def check_smol(folder: Path, reference: Reference, runtime: Runtime, *, dense: bool = False) -> Any:
    with ModelFiles(folder, dense=dense) as files:
        prompts = [files.text.encode(prompt) for prompt in SMOL_PROMPTS]
        loaded = files.load(runtime)
    engine = Engine(loaded.weights, runtime, batch=len(prompts), capacity=max(map(len, prompts)) + SMOL_TOKENS)
    return engine, check(engine, reference, prompts, greedy([SMOL_TOKENS] * len(prompts)))


def test_a_real_model(smol: dict[str, Path], runtime: Runtime) -> None:
    reference = reference_of(UnpackedModel(SparseModel(smol["whole"])), runtime.xp)
    engine, sequences = check_smol(smol["whole"], reference, runtime)
    with ModelFiles(smol["whole"]) as files:
        assert files.text.tokenizer is not None
        assert "Paris" in files.text.tokenizer.decode(sequences[0])
    assert engine.counts()[1]


def test_a_real_model_sparse_and_dense(smol: dict[str, Path], runtime: Runtime) -> None:
    """Packed, and with the same zeros in dense matrices: tokens differ only where two are about equally likely."""
    reference = reference_of(open_checkpoint(smol["pruned"]), runtime.xp)
    _, sparse = check_smol(smol["packed"], reference, runtime)
    _, dense = check_smol(smol["packed"], reference, runtime, dense=True)
    bound = reference.bound(sparse)
    for one, other in zip(sparse, dense, strict=True):
        parted = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            first, second = np.sort(reference.logits(one[:parted])[-1])[:-3:-1]
            assert first - second <= bound


def test_a_real_model_against_transformers(smol: dict[str, Path], runtime: Runtime) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = reference_of(open_checkpoint(smol["pruned"]), runtime.xp)
    engine, sequences = check_smol(smol["packed"], reference, runtime)
    scored = engine.score(sequences)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smol["pruned"], attn_implementation="eager")
    theirs = theirs.float().eval()
    bound = reference.bound(sequences)
    for tokens, logits in zip(sequences, scored, strict=True):
        with torch.no_grad():
            wanted = theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        assert np.abs(logits - wanted).max() <= bound
