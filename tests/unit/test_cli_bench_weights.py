# SPDX-License-Identifier: Apache-2.0
"""``flashllm bench --weights``: every kind of file, and one line that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import fake_gpu
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from flashllm.bench import results, systems, timing
from flashllm.cli import bench
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import ContainerWriter, save_weights

MATRIX = np.where(np.random.default_rng(0).random((150, 70)) < 0.25, 1.5, 0.0).astype(np.float32)
FILES = {"w.npy": None, "w.npz": None, "two.safetensors": "a", "packed.safetensors": "b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "w.npy", MATRIX)
    sp.save_npz(tmp_path / "w.npz", sp.csr_array(MATRIX))
    save_file({"a": MATRIX.astype(ml_dtypes.bfloat16), "b": MATRIX}, tmp_path / "two.safetensors")
    save_weights(tmp_path / "packed.safetensors", {name: TiledCSL.from_dense(MATRIX) for name in ("a", "b")})
    return tmp_path


def _run(path: Path, tensor: str | None, *more: str, backend: str = "reference") -> Result:
    named = ("--tensor", tensor) if tensor else ()
    arguments = ("--backend", backend, "--weights", str(path), *named, "--n", "3", *more)
    return CliRunner().invoke(bench.command, arguments)


def _fault(result: Result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(folder: Path, name: str) -> None:
    result = _run(folder / name, FILES[name], "--json")
    assert result.exit_code == 0, result.output
    only = json.loads(result.stdout)
    assert (only["M"], only["K"], only["model"], only["layer"]) == (150, 70, name, FILES[name])
    assert (only["pattern"], only["sparsity"], only["check"]) == ("file", None, "pass")
    assert only["sparsity_real"] == round(1 - np.count_nonzero(MATRIX) / MATRIX.size, 6)


@pytest.mark.parametrize("name", FILES)
def test_absent_and_truncated_files(folder: Path, name: str) -> None:
    absent = folder / "nowhere" / name
    assert _fault(_run(absent, FILES[name])) == f"Error: --weights: expected a file, found none at '{absent}'"
    raw = (folder / name).read_bytes()
    for length in (0, 5, len(raw) // 2, len(raw) - 1):
        (folder / name).write_bytes(raw[:length])
        assert f"{name}: " in _fault(_run(folder / name, FILES[name]))


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("w.npy", "a", "tensor: expected None for a .npy file, got 'a'"),
        ("w.npz", "a", "tensor: expected None for a .npz file, got 'a'"),
        ("two.safetensors", "c", "tensor: expected one of 'a', 'b', got 'c'"),
        ("two.safetensors", None, "tensor: expected a name, as two.safetensors holds several: 'a', 'b', got None"),
        ("packed.safetensors", "a.words", "tensor: expected one of 'a', 'b', got 'a.words'"),
        ("packed.safetensors", None, "tensor: expected one of 'a', 'b', got None"),
    ],
)
def test_wrong_tensor(folder: Path, name: str, tensor: str | None, expected: str) -> None:
    assert _fault(_run(folder / name, tensor)) == f"Error: {expected}"


def test_a_dense_matrix_of_a_converted_block(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    with ContainerWriter(path, weights=[], tensors=["a.weight", "b.weight"]) as writer:
        for name in ("a.weight", "b.weight"):
            writer.add_tensor(name, MATRIX.astype(np.float16))
    result = _run(path, "b.weight", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sparsity_real"] == round(1 - np.count_nonzero(MATRIX) / MATRIX.size, 6)
    assert "tensor: expected a name, as block.safetensors holds several: 'a.weight', 'b.weight'" in _fault(
        _run(path, None)
    )


def test_values_that_overflow(folder: Path) -> None:
    np.save(folder / "w.npy", MATRIX * 1e5)
    count = np.count_nonzero(MATRIX)
    assert f"expected finite fp16 values, got {count:,} NaN or infinite, {count:,} by" in _fault(
        _run(folder / "w.npy", None)
    )
    assert _run(folder / "w.npy", None, "--dtype", "bf16").exit_code == 0


def test_another_matrix_under_the_same_name_is_another_case(tmp_path: Path) -> None:
    path, rows = tmp_path / "w.npy", tmp_path / "rows.jsonl"
    matrix = np.eye(16, dtype=np.float16)
    for content, known in ((matrix, False), (matrix, True), (matrix + matrix[::-1], False)):
        np.save(path, content)
        result = _run(path, None, "--resume", str(rows))
        assert result.exit_code == 0, result.output
        assert ("1 of 1 cases are in" in result.stderr) is known
    assert [row.sparsity_real for row in results.latest(results.read(rows))] == [15 / 16, 14 / 16]


@pytest.mark.parametrize("name", FILES)
def test_gpu_run(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(timing, "BATCH_MS", 0.01)
    monkeypatch.setattr(timing, "COLD_BYTES", 20_000)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 3)
    monkeypatch.setattr(systems, "_SEARCH_ROUNDS", 1)
    rows = folder / "rows.jsonl"
    result = _run(folder / name, FILES[name], "--time-cap", "0.01", "--out", str(rows), backend="cuda")
    assert result.exit_code == 0, result.output
    assert [(r.system, r.sparsity, r.check) for r in results.read(rows)] == [
        ("cublas", None, "pass"),
        ("flashllm", None, "pass"),
    ]
    assert "speed-up over cuBLAS" in result.stdout
