# SPDX-License-Identifier: Apache-2.0
"""Training with fixed zeros. Tests that train need PyTorch and transformers, on any device."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.safetensors_file import write_file
from flashllm.prune import finetune as finetuning
from flashllm.prune.finetune import STATE, Settings, finetune
from flashllm.prune.run import Settings as PruneSettings
from flashllm.prune.run import prune
from model_cases import matrix_names, read_tensors, write_checkpoint

# A text that a model can learn: each token is followed by the token 7 further.
TOKENS = np.arange(0, 7 * 4000, 7) % 64


def _train(source: Path, out: Path, *, steps: int = 60, **options: Any) -> finetuning.Trained:
    settings = Settings(steps=steps, batch=4, length=16, learning_rate=3e-3, seed=1)
    return finetune(source, out, TOKENS, settings, device="cpu", **options)


def test_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, learning_rate=1e-3, warmup=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-4, rel=0.02)
    assert Settings(steps=1, warmup=0.0).rate(0) == Settings(steps=1).learning_rate


def test_windows_are_the_same_each_time_and_others_in_each_step() -> None:
    settings = Settings(steps=9, batch=5, length=100)
    first = settings.begins(3, 1000)
    np.testing.assert_array_equal(first, settings.begins(3, 1000))
    assert (first != settings.begins(4, 1000)).any()
    many = np.concatenate([settings.begins(step, 1000) for step in range(400)])
    assert many.min() == 0
    assert many.max() == 899
    assert settings.tokens == 9 * 5 * 100


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch": 0}, {"length": 1}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"warmup": 2}],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Settings(**{"steps": 3, **wrong}).check()


def test_what_it_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "flashllm\[finetune\]"'):
        _train(source, tmp_path / "out")


def test_text_that_cannot_be(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    settings = Settings(steps=1, length=16)
    for tokens in (TOKENS[:16], TOKENS + 10**6, TOKENS.reshape(2, -1), -TOKENS):
        with pytest.raises(ArgumentError, match="tokens: expected more than 16 tokens below"):
            finetune(source, tmp_path / "out", tokens, settings, device="cpu")
    with pytest.raises(ArgumentError, match="length: expected at most"):
        finetune(source, tmp_path / "out", TOKENS, Settings(steps=1, length=10**5), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_it_learns_and_zeros_stay(tmp_path: Path, kind: str, dtype: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", kind, dtype=dtype, zeros=0.5)
    begun = _train(source, tmp_path / "begun", steps=1)
    done = _train(source, tmp_path / "out", text="numbers")
    assert done.finished
    assert done.loss < 0.7 * begun.loss
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert {n: (a.dtype, a.shape) for n, a in before.items()} == {n: (a.dtype, a.shape) for n, a in after.items()}
    for name in matrix_names(source):
        np.testing.assert_array_equal(after[name] == 0, before[name] == 0)
        assert (after[name] != before[name]).any(), "the others are trained"
    record = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert (record["finetuned_tokens"], record["finetuned_on"]) == (60 * 4 * 16, "numbers")
    assert not (tmp_path / "out" / STATE).exists()


def test_a_teacher_is_imitated(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    teacher = write_checkpoint(tmp_path / "dense", "llama")
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.3)
    same = _train(teacher, tmp_path / "same", steps=1, teacher=teacher)
    assert same.loss < 0.02, "the teacher's own distribution; bf16 apart"
    begun = _train(source, tmp_path / "begun", steps=1, teacher=teacher)
    done = _train(source, tmp_path / "out", teacher=teacher)
    assert done.loss < 0.7 * begun.loss


def test_stopped_work_goes_on_to_the_same_end(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    _train(source, tmp_path / "whole", steps=12)

    steps: list[str] = []

    def stop(title: str, blocks: int) -> None:
        steps.append(title)
        if len(steps) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(source, tmp_path / "parts", steps=12, advance=stop)
    assert (tmp_path / "parts" / STATE).is_file()
    with pytest.raises(ArgumentError, match="the same work begun before"):
        _train(source, tmp_path / "parts", steps=13)
    none = _train(source, tmp_path / "parts", steps=12, seconds=0.0)
    assert (none.steps, none.finished) == (5, False)
    assert _train(source, tmp_path / "parts", steps=12).finished
    whole, parts = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "parts")
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    with pytest.raises(ArgumentError, match="a new or empty directory"):
        _train(source, tmp_path / "parts", steps=12)


def test_what_cannot_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    _train(source, tmp_path / "whole", steps=2)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "TensorWriter", full)
        with pytest.raises(OSError, match="disk full"):
            _train(source, tmp_path / "out", steps=2)
    titles: list[str] = []
    assert _train(source, tmp_path / "out", steps=2, advance=lambda title, _: titles.append(title)).finished
    assert titles == ["resumed"], "no step is done again"
    for name, array in read_tensors(tmp_path / "whole").items():
        np.testing.assert_array_equal(array, read_tensors(tmp_path / "out")[name])


def test_a_head_that_is_the_embedding_and_stored_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    tensors = read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_file(source / "model.safetensors", tensors, {"format": "pt"})
    _train(source, tmp_path / "out", steps=2)
    after = read_tensors(tmp_path / "out")
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert (after["lm_head.weight"] != read_tensors(source)["model.embed_tokens.weight"]).any()


def test_what_is_recorded_of_a_model_trained_twice(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", "llama")
    pruning = PruneSettings(method="magnitude", sparsity=0.5)
    with open_checkpoint(source) as checkpoint:
        prune(checkpoint, tmp_path / "pruned", pruning)
        _train(tmp_path / "pruned", tmp_path / "once", steps=1)
        _train(tmp_path / "once", tmp_path / "twice", steps=2)
        with pytest.raises(ArgumentError, match="out: expected a new directory"):  # not over what was trained
            prune(checkpoint, tmp_path / "once", pruning)
    record = json.loads((tmp_path / "twice" / "prune.json").read_text())
    assert record["settings"]["method"] == "magnitude"
    assert record["finetuned_tokens"] == 3 * 4 * 16


def test_devices_and_states_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "model", "llama", zeros=0.5)
    settings = Settings(steps=1, length=16)
    with pytest.raises(ArgumentError, match="device: expected a device of PyTorch"):
        finetune(source, tmp_path / "out", TOKENS, settings, device="toaster")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="finds no GPU for 'cuda'"):
        finetune(source, tmp_path / "out", TOKENS, settings)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for content in (b"", b"no state"):
        (tmp_path / "out" / STATE).write_bytes(content)
        with pytest.raises(FormatError, match=f"{STATE}: file: expected what an earlier call has saved"):
            finetune(source, tmp_path / "out", TOKENS, settings, device="cpu")
