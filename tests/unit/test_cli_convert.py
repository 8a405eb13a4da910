# SPDX-License-Identifier: Apache-2.0
"""`flashllm convert`, and `flashllm inspect` on its results: output, files, exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_checkpoints import read, tensors_of, write

import weight_cases as cases
from flashllm.cli.main import command
from flashllm.io.manifest import MANIFEST_FILE
from flashllm.io.sparse_model import SparseModel


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", "llama", tensors_of("llama", "fp16"))


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def _good(*arguments: Any) -> str:
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def _bad(*arguments: Any) -> str:
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    return lines[0]


def test_there_inspected_and_back(tmp_path: Path, model: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    text = _good("convert", model, "-o", out, "--format", "slot24")
    manifest = SparseModel(out).manifest
    totals = manifest.totals()
    lines = text.splitlines()
    assert lines[0] == f"{out}: 2 blocks, 8 matrices: 8 slot24"
    assert f"{100 * totals['sparsity']:.2f} % zeros" in lines[1]
    assert (
        f"{totals['bytes_stored'] / 1e6:,.2f} MB, {100 * totals['bytes_stored'] / totals['bytes_dense']:.1f} %"
        in lines[1]
    )
    assert re.search(r"encoded at \d+\.\d{3} GB/s .* writing \d+\.\d{3} GB/s", lines[2])
    assert "were there already" not in text
    assert "3 of 3 files were there already" in _good("convert", model, "-o", out, "--format", "slot24", "--resume")

    shown = _good("inspect", out)
    assert shown.startswith("model: llama, 2 blocks; --format slot24; flashllm ")
    for kind, shape in (
        ("self_attn.qkv_proj", "80x40"), ("self_attn.o_proj", "40x40"), ("mlp.gate_up_proj", "144x40"),
        ("mlp.down_proj", "40x72"),
    ):  # fmt: skip
        weights = [w for name, w in manifest.weights.items() if name.endswith(kind)]
        least, most = (f"{100 * f(w.sparsity for w in weights):.2f}" for f in (min, max))
        (row,) = (line for line in shown.splitlines() if kind in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == [
            f"model.layers.*.{kind}", "2", shape, "fp16", "slot24", least if least == most else f"{least} .. {most}",
            f"{sum(w.bytes_stored for w in weights) / 1e6:.2f}",
            f"{100 * sum(w.bytes_stored for w in weights) / sum(w.bytes_dense for w in weights):.1f}",
        ]  # fmt: skip
    assert "8 matrices, 8 of them sparse: " in shown
    assert json.loads(_good("inspect", out, "--json")) == json.loads((out / MANIFEST_FILE).read_text())

    text = _good("convert", out, "--to", "hf", "-o", back)
    assert text == f"{back}: 1 file of tensors, {(back / 'model.safetensors').stat().st_size / 1e6:,.2f} MB\n"
    source, again = read(model), read(back)
    assert set(source) == set(again)
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(again[name].view(np.uint16), cases.pruned(source[name]))


def test_matrices_that_stay_dense_are_explained(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    assert "8 matrices: 8 dense" in _good("convert", model, "-o", out, "--n", "4", "--gpu", "A100 40GB")
    shown = _good("inspect", out)
    assert "--format auto for A100 40GB, N = 4;" in shown
    assert "dense: model.layers.*.mlp.down_proj: faster as it is: " in shown


def test_options_reach_the_conversion(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    text = _good("convert", model, "-o", out, "--format", "bitmap", "--no-fuse", "--dtype", "bf16")
    assert "14 matrices: 14 bitmap" in text
    assert re.search(r"^[\d,]+ values changed by rounding$", text, re.MULTILINE)
    assert "values changed by rounding" in _good("inspect", out)
    assert {w.dtype for w in SparseModel(out).manifest.weights.values()} == {"bf16"}


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashllm.convert.run.convert", interrupt)
    result = _run("convert", model, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, "interrupted; the same command with --resume goes on\n")


def test_bad_usage(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    assert "0" in _bad("convert", model, "-o", out, "--n", "0")
    assert "H100 80GB" in _bad("convert", model, "-o", out, "--gpu", "GTX 480")
    assert "Invalid value for '--format'" in _bad("convert", model, "-o", out, "--format", "csr")
    assert "Missing option '-o'" in _bad("convert", model)
    assert "found nothing at" in _bad("convert", tmp_path / "none", "-o", out)
    assert "no GPU" in _bad("convert", model, "-o", out, "--device", "gpu")
    assert "config.json" in _bad("convert", tmp_path, "-o", out)
    assert "flashllm convert" in _bad("convert", model, "--to", "hf", "-o", out)
    assert not out.exists()
    _good("convert", model, "-o", out, "--format", "bitmap")
    assert "--resume" in _bad("convert", model, "-o", out, "--format", "bitmap")
    assert "of another: format 'bitmap', now 'slot24'" in _bad(
        "convert", model, "-o", out, "--format", "slot24", "--resume"
    )
    assert "--to hf` turns them back" in _bad("convert", out, "-o", tmp_path / "more")
    assert "--no-fuse: expected nothing with --to hf" in _bad(
        "convert", out, "--to", "hf", "-o", tmp_path / "b", "--no-fuse"
    )
    assert "new or empty" in _bad("convert", out, "--to", "hf", "-o", model)
    for option in (("--n", "8"), ("--gpu", "H200")):
        message = _bad("convert", model, "-o", tmp_path / "b", "--format", "bitmap", *option)
        assert f"{option[0]}: expected nothing with --format bitmap" in message


def test_inspect_of_other_directories(tmp_path: Path, model: Path) -> None:
    assert "flashllm convert" in _bad("inspect", model)
    out = tmp_path / "out"
    _good("convert", model, "-o", out, "--format", "bitmap")
    for option in (("--tensor", "x"), ("--n", "8"), ("--gpu", "H200"), ("--sample",)):
        assert f"{option[0]}: expected nothing beside a directory" in _bad("inspect", out, *option)
    assert "model.layers.0.mlp.down_proj: 40x72" in _good("inspect", out / "block-00000.safetensors", "--n", "8")
