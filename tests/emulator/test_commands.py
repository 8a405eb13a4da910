# SPDX-License-Identifier: Apache-2.0
"""The commands and ``spmm`` on the emulator, from end to end, on few kernels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from flashllm import ArgumentError, TiledCSL, backends, plan, spmm
from flashllm.backends import emulator
from flashllm.bench.data import random_matrix
from flashllm.cli import bench, verify

CASE = ("--shape", "192x128", "--sparsity", "0.7,0.9", "--n", "8,32")


def _run(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


def test_bench_without_a_gpu_runs_the_kernels(no_gpu: None) -> None:
    result = _run(bench.command, *CASE, "--format", "tiled-csl")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("emulated, not GPU times: the GPU's kernels on this CPU (the driver reports")
    assert "emulated, not GPU times" in result.stdout
    assert "modelled, not measured" in result.stdout
    assert "counted in the emulated kernels" in result.stdout
    # 2 x 2 tiles of 128x64: 8 x 2 x 8 steps of 16 rows, 2 x 2 x 8 of 64.
    assert "128 mma m16n8k16" in result.stdout
    assert "32 wgmma m64n32k16" in result.stdout
    assert "speed-up" not in result.stdout
    assert "WRONG" not in result.stdout


def test_bench_rows_claim_no_times(no_gpu: None) -> None:
    result = _run(bench.command, *CASE, "--format", "tiled-csl", "--backend", "emulator", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["sparsity"], row["N"]) for row in rows] == [(0.7, 8), (0.7, 32), (0.9, 8), (0.9, 32)]
    for row in rows:
        assert (row["backend"], row["check"], row["choice"], row["deterministic"]) == (
            "emulator",
            "pass",
            "auto",
            True,
        )
        assert row["kernel"].startswith("tiled_csl<T=__half")
        assert {row[name] for name in ("median_us", "min_us", "gbps", "tflops", "speedup", "cublas_us")} == {None}


def test_bench_says_which_result_is_wrong(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = emulator.spmm

    def wrong(*a: Any, **k: Any) -> Any:
        y, counts = real(*a, **k)
        y[0, 0] += 1
        return y, counts

    monkeypatch.setattr(emulator, "spmm", wrong)
    result = _run(bench.command, "--shape", "192x128", "--sparsity", "0.7", "--n", "8")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_verify_one_kernel(no_gpu: None) -> None:
    result = _run(verify.command, "--arch", "90a", "--kernel", "T=__half, kN=8, kSlices=2, kVectors=2,", "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) > 40
    assert {case["check"] for case in found} == {"pass"}
    assert {case["operands"] for case in found} == {"integers", "random", "special"}
    assert "the GPU's kernels emulated on this CPU" in result.stderr


def test_bench_of_another_format(no_gpu: None) -> None:
    result = _run(bench.command, *CASE, "--format", "bitmap", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["format"], row["check"]) for row in rows] == [("bitmap", "pass")] * 4
    assert all(row["kernel"].startswith("bitmap<T=__half") for row in rows)


def test_verify_names_the_first_wrong_element(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = emulator.spmm

    def wrong(*a: Any, **k: Any) -> Any:
        y, counts = real(*a, **k)
        if y.shape[0] > 4:
            y[4, 100] = 999
        return y, counts

    monkeypatch.setattr(emulator, "spmm", wrong)
    kernel = ("--kernel", "T=__half, kN=8, kSlices=2, kVectors=4,")
    result = _run(verify.command, "--arch", "90a", "--quick", *kernel)
    assert result.exit_code == 1
    assert "y[4, 100]: got 999, expected" in result.stderr


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_spmm_on_the_emulator(dtype: Any) -> None:
    w = TiledCSL.from_dense(random_matrix(130, 72, density=0.3, dtype=dtype), dtype=dtype)
    x = random_matrix(5, 72, seed=1, dtype=dtype)
    y = spmm(x, w, backend="emulator")
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y.astype(np.float64), spmm(x, w).astype(np.float64), rtol=0.01, atol=0.01)
    out = np.zeros_like(y)
    forced = plan(w, 5, device=emulator.emulated_device("80"))
    assert spmm(x, w, out=out, plan=forced, backend="emulator") is out
    np.testing.assert_allclose(out.astype(np.float64), y.astype(np.float64), rtol=0.01, atol=0.01)
    with pytest.raises(ArgumentError, match="plan: expected a plan for shape"):
        spmm(x[:4], w, plan=forced, backend="emulator")


def test_emulator_is_what_a_machine_without_a_gpu_gets(no_gpu: None) -> None:
    assert backends.select().name == "emulator"
