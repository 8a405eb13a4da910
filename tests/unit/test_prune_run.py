# SPDX-License-Identifier: Apache-2.0
"""Pruning a whole checkpoint: what is written, what stays, and going on after an interruption."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flashllm.cli import prune as prune_command
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.bits import bfloat16
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.safetensors_file import write_file
from flashllm.models import forward, weights
from flashllm.models.config import model_config
from flashllm.prune import run as pruning
from flashllm.prune.run import RECORD, Settings, prune
from model_cases import config_of, matrix_names, random_tensors, read_tensors, write_checkpoint, write_tensors

KINDS = ("llama", "opt", "qwen2", "qwen3")
TOKENS = np.random.default_rng(0).integers(0, 90, (3, 24))


def _prune(source: Path, out: Path, method: str, sparsity: float = 0.5, **options: Any) -> pruning.Pruned:
    ratios = options.pop("ratios", "uniform")
    with open_checkpoint(source) as checkpoint:
        settings = Settings(method=method, sparsity=sparsity, ratios=ratios)
        return prune(checkpoint, out, settings, tokens=TOKENS, **options)


def _interrupt(source: Path, out: Path, method: str, **options: Any) -> None:
    """The same, ended after the first block."""

    def stop(title: str, blocks: int) -> None:
        if title == "block 0" and blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prune(source, out, method, advance=stop, **options)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_where_asked_and_everything_else_is_kept(tmp_path: Path, kind: str, dtype: str) -> None:
    source = write_checkpoint(tmp_path / "model", kind, dtype=dtype)
    found = _prune(source, tmp_path / "out", "wanda", 0.6)
    before, after, matrices = read_tensors(source), read_tensors(tmp_path / "out"), matrix_names(source)
    assert set(before) == set(after)
    zeros = elements = 0
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        if name in matrices:
            per_row = np.count_nonzero(array == 0, axis=1)
            assert (per_row >= round(0.6 * array.shape[1])).all()
            kept = array != 0
            np.testing.assert_array_equal(array[kept].view(np.uint16), before[name][kept].view(np.uint16))
            zeros, elements = zeros + int(per_row.sum()), elements + array.size
        else:
            np.testing.assert_array_equal(array.view(np.uint16), before[name].view(np.uint16))
    assert (found.zeros, found.elements) == (zeros, elements)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == ("float16" if dtype == "F16" else "bfloat16")
    assert config["model_type"] == kind


def test_each_block_sees_what_the_pruned_ones_before_give(tmp_path: Path) -> None:
    """The second block's Wanda mask follows from the first block as it was stored."""
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    _prune(source, tmp_path / "out", "wanda", 0.7)
    with open_checkpoint(source) as old, open_checkpoint(tmp_path / "out") as new:
        config = model_config(old.config)
        hidden = forward.embed(config, weights.outside(old, config), TOKENS)
        first = weights.block(new, config, 0)
        hidden = forward.block(config, first.small, hidden, forward.multiply_by(first.linears))
        second = weights.block(old, config, 1)
        x = forward._rms_norm(hidden, second.small["input_layernorm.weight"], config.norm_eps)
        scores = abs(second.linears["self_attn.q_proj"]) * np.sqrt((x * x).sum(axis=(0, 1)))
        q = new.read("model.layers.1.self_attn.q_proj.weight").astype(np.float32)
    dropped, kept = np.where(q == 0, scores, -np.inf), np.where(q != 0, scores, np.inf)
    assert (dropped.max(axis=1) <= kept.min(axis=1) * (1 + 1e-5)).all()


def test_fp32_becomes_fp16_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F32")
    _prune(source, tmp_path / "out", "magnitude", 0.25)
    assert {array.dtype for array in read_tensors(tmp_path / "out").values()} == {np.dtype(np.float16)}
    config = config_of("llama", dtype="F32")
    tensors = {name: array * np.float32(1e7) for name, array in random_tensors(config).items()}
    large = write_tensors(tmp_path / "large", config, tensors, dtype="F32")
    with pytest.raises(FormatError, match="65520"):
        _prune(large, tmp_path / "large-out", "magnitude", 0.25)
    assert not (tmp_path / "large-out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("method", "ratios"), [("sparsegpt", "uniform"), ("wanda", "owl"), ("magnitude", "global")])
def test_interrupted_work_is_continued_to_the_same_end(tmp_path: Path, method: str, ratios: str) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    _prune(source, tmp_path / "whole", method, ratios=ratios)
    _interrupt(source, tmp_path / "parts", method, ratios=ratios)
    with pytest.raises(FileNotFoundError):  # not yet a checkpoint
        open_checkpoint(tmp_path / "parts")
    (first,) = (tmp_path / "parts").glob("model-00002-*")
    stamp = first.stat().st_mtime_ns
    found = _prune(source, tmp_path / "parts", method, ratios=ratios)
    assert first.stat().st_mtime_ns == stamp, "the block that was done is left alone"
    assert abs(found.sparsity - 0.5) < 0.02
    whole, parts = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "parts")
    for name, array in whole.items():
        np.testing.assert_array_equal(array.view(np.uint16), parts[name].view(np.uint16))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    _interrupt(source, tmp_path / "out", "magnitude")
    for name in (".model-00003-of-00003.safetensors.77-0123abcd.tmp", f".{RECORD}.77-0123abcd.tmp", ".mine.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    _prune(source, tmp_path / "out", "magnitude")
    assert [file.name for file in (tmp_path / "out").iterdir() if file.suffix == ".tmp"] == [".mine.tmp"]


def test_runs_into_one_directory_wait_for_each_other(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    began, found = threading.Event(), []

    def second() -> None:
        began.set()
        found.append(_prune(source, tmp_path / "out", "magnitude"))

    other = threading.Thread(target=second)

    def start(title: str, blocks: int) -> None:
        if title == "block 0" and blocks:
            other.start()
            began.wait()
            time.sleep(0.2)
            assert not found

    first = _prune(source, tmp_path / "out", "magnitude", advance=start)
    other.join()
    assert (found[0].zeros, found[0].elements) == (first.zeros, first.elements)


def test_other_work_in_the_directory_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    _prune(source, tmp_path / "out", "magnitude", 0.5)
    with pytest.raises(ArgumentError, match="out: expected a new directory, or the same work"):
        _prune(source, tmp_path / "out", "magnitude", 0.6)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="a new or empty directory"):
        _prune(source, tmp_path / "full", "magnitude")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_another_model_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    """Else half of one model and half of the other would be the result."""
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    _interrupt(source, tmp_path / "out", "magnitude")
    config = config_of("llama", dtype="F16")
    other = write_tensors(tmp_path / "other", config, random_tensors(config, seed=9), dtype="F16")
    with pytest.raises(ArgumentError, match=r"the same work begun before, got .* another model or text"):
        _prune(other, tmp_path / "out", "magnitude")
    path = tmp_path / "out" / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "blocks": {"0": {"zeros": 1, "elements": "2"}}}))
    with pytest.raises(FormatError, match=r"prune\.json: blocks\.0\.elements: expected int, got '2'"):
        _prune(source, tmp_path / "out", "magnitude")


def test_a_global_threshold_is_for_one_type(tmp_path: Path) -> None:
    """The bits of fp16 and bf16, which are counted, do not compare."""
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    tensors = read_tensors(source)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(bfloat16())
    write_file(source / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ArgumentError, match="ratios: expected uniform"):
        _prune(source, tmp_path / "out", "magnitude", ratios="global")
    assert not (tmp_path / "out").exists()
    _prune(source, tmp_path / "uniform", "magnitude")
    assert read_tensors(tmp_path / "uniform")[name].dtype == bfloat16()


def test_progress_counts_every_block(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    for _ in range(2):  # the second time all is there
        counts: list[int] = []
        _prune(source, tmp_path / "out", "wanda", ratios="owl", advance=lambda _, done: counts.append(done))  # noqa: B023
        assert sum(counts) == 4


def test_global_ratios_prune_the_smallest_of_the_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    found = _prune(source, tmp_path / "out", "magnitude", 0.4, ratios="global")
    matrices = matrix_names(source)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    old = np.concatenate([abs(before[name]).reshape(-1) for name in sorted(matrices)])
    new = np.concatenate([abs(after[name]).reshape(-1) for name in sorted(matrices)])
    assert old[new == 0].max() <= new[new != 0].min()
    assert found.zeros == round(0.4 * found.elements)


def test_owl_prunes_blocks_differently(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    found = _prune(source, tmp_path / "out", "wanda", 0.6, ratios="owl")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    shares = [entry["zeros"] / entry["elements"] for entry in record["blocks"].values()]
    assert len(record["outliers"]) == 2
    assert max(shares) - min(shares) > 0.1
    assert found.sparsity == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("method", "ratios", "message"),
    [("wanda", "global", "ratios"), ("magnitude", "owl", "a method that calibrates"), ("none", "uniform", "method")],
)
def test_settings_that_cannot_be(tmp_path: Path, method: str, ratios: str, message: str) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    with pytest.raises(ArgumentError, match=message):
        _prune(source, tmp_path / "out", method, ratios=ratios)
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    with open_checkpoint(source) as checkpoint:
        settings = Settings(method="wanda", sparsity=0.5)
        with pytest.raises(ArgumentError, match="tokens: expected text to calibrate"):
            prune(checkpoint, tmp_path / "out", settings)
        with pytest.raises(ArgumentError, match="tokens below"):
            prune(checkpoint, tmp_path / "out", settings, tokens=np.full((1, 4), 10**6))
        for wrong in (np.full((1, 4), -1), np.zeros((0, 4), np.int64), np.zeros(4, np.int64)):
            with pytest.raises(ArgumentError, match="tokens below"):
                prune(checkpoint, tmp_path / "out", settings, tokens=wrong)
        for other in (np.full((1, 4), 1.5), [[1, 2]]):
            with pytest.raises(ArgumentError, match="tokens: expected a NumPy array of integers"):
                prune(checkpoint, tmp_path / "out", settings, tokens=other)  # type: ignore[arg-type]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight: expected a tensor of shape"):
        _prune(source, tmp_path / "out", "magnitude")


def test_command(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    out = tmp_path / "out"
    options = [str(source), "--sparsity", "0.5", "-o", str(out)]
    run = CliRunner().invoke
    result = run(prune_command.command, options)
    assert result.exit_code == 2
    assert "--calib: wanda needs a text" in result.output
    result = run(prune_command.command, [*options, "--method", "magnitude", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "weights are zeros, 50.0" in result.output
    assert run(prune_command.command, [*options, "--method", "magnitude", "--ratios", "owl"]).exit_code == 2
    for option in (("--calib", __file__), ("--part", "0:1"), ("--samples", "3"), ("--length", "9")):
        result = run(prune_command.command, [*options, "--method", "magnitude", *option])
        assert result.exit_code == 2
        assert f"{option[0]}: expected nothing with --method magnitude" in result.output
    assert run(prune_command.command, [str(tmp_path / "none"), *options[1:], "--method", "magnitude"]).exit_code == 2


def test_a_gpu_that_is_full_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("Out of memory allocating 1,024 bytes")  # as CuPy's, which derives from it

    source = write_checkpoint(tmp_path / "model", "llama", dtype="F16")
    monkeypatch.setattr(weights, "block", full)
    options = [str(source), "--sparsity", "0.5", "-o", str(tmp_path / "out"), "--method", "magnitude"]
    result = CliRunner().invoke(prune_command.command, [*options, "--device", "cpu"])
    assert result.exit_code == 2
    assert "Out of memory allocating 1,024 bytes" in result.output
