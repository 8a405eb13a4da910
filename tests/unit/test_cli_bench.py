# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from bench_rows import row
from click.testing import CliRunner, Result

from flashllm.bench import results, runner_host, systems, timing
from flashllm.bench.results import Row
from flashllm.cli import bench, profile, table, tune

SMALL = ("--backend", "reference", "--shape", "192x128", "--sparsity", "0.8", "--n", "8")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(timing, "BATCH_MS", 0.01)
    monkeypatch.setattr(timing, "COLD_BYTES", 20_000)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 3)
    monkeypatch.setattr(systems, "_SEARCH_ROUNDS", 1)


def _run(*arguments: str, command: Any = bench.command) -> Result:
    return CliRunner().invoke(command, list(arguments))


def _rows(result: Result) -> list[Row]:
    return [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]


def test_default_run_without_a_gpu() -> None:
    result = _run("--backend", "reference")
    assert result.exit_code == 0
    assert result.stderr.count("no timing: NumPy reference backend") == 1
    assert "2048x1024" in result.stdout
    assert "modelled, not measured" in result.stdout
    assert "speed-up" not in result.stdout


def test_without_gpu_and_compiler_numpy_multiplies_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")
    monkeypatch.setattr("flashllm.backends.emulator.available", lambda: "no g++ found")
    result = _run(*SMALL[2:])
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("no timing: NumPy reference backend (the driver reports no GPU, and no g++ found)")


def test_json_rows_alone_are_on_stdout() -> None:
    result = _run(*SMALL, "--json")
    (only,) = _rows(result)
    assert (only.M, only.K, only.N, only.sparsity, only.backend, only.check) == (192, 128, 8, 0.8, "reference", "pass")
    assert only.median_us is only.speedup is only.cublas_us is only.gpu is None
    assert "floor us" in result.stderr


def test_list_models() -> None:
    result = _run("--list-models")
    assert result.exit_code == 0
    assert "opt-175b" in result.stdout
    assert "8 x 28672x4096" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "gpt-5"),
        ("--sparsity", "80"),
        ("--n", "0"),
        ("--shape", "12"),
        ("--dtype", "fp8"),
        ("--pattern", "stripes"),
        ("--weights", "absent.npy"),
        ("--tensor", "w"),
        ("--model-gpu", "TPU"),
        ("--weights", "absent.npy", "--model", "opt-30b"),
        ("--out", "a", "--resume", "b"),
        ("--pdl", "--launch", "stream"),
        ("--out", "/nowhere/at/all.jsonl"),
        ("--l2", "lukewarm"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", _refuse)
    result = _run("--backend", "reference", *arguments)
    assert result.exit_code == 2
    assert sum(line.startswith("Error:") for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def _refuse(self: Path, *_: Any, **__: Any) -> None:
    raise PermissionError(f"cannot make {self}")


def test_asking_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")
    result = _run("--backend", "cuda")
    assert result.exit_code == 2
    assert "no GPU" in result.stderr


def test_out_resume_and_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(*SMALL, "--out", str(path)).exit_code == 0
    with path.open("ab") as file:
        file.write(b'{"torn')
    more = ("--resume", str(path), "--csv", str(tmp_path / "rows.csv"))
    result = _run(*SMALL[:-2], "--n", "8,16", *more)
    assert result.exit_code == 0
    assert "1 of 2 cases are in" in result.stderr
    rows = results.read(path)
    assert [r.N for r in rows] == [8, 16]
    assert rows[0].sweep_id == rows[1].sweep_id == rows[0].run_id != rows[1].run_id
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    assert _run(*SMALL, *more).exit_code == 0
    assert len(results.read(path)) == 2


def test_resume_starts_an_absent_file_and_refuses_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    assert _run(*SMALL, "--resume", str(path)).exit_code == 0
    assert len(results.read(path)) == 1
    results.append(path, row())
    result = _run(*SMALL, "--resume", str(path))
    assert result.exit_code == 2
    assert "resume: expected rows with backend = reference, as here, got cuda" in result.stderr


def test_save_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(*SMALL, "--save").exit_code == 0
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    assert _run(*SMALL, "--save", "small").exit_code == 0
    assert len(list(tmp_path.glob("*-no-gpu-bench.jsonl"))) == 1
    assert len(list(tmp_path.glob("experiments/results/*-no-gpu-small.jsonl"))) == 1


def test_weights_from_a_file(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(100, 60)) * (np.random.default_rng(1).random((100, 60)) < 0.25)
    np.save(tmp_path / "w.npy", matrix)
    result = _run("--backend", "reference", "--weights", str(tmp_path / "w.npy"), "--n", "3", "--json")
    (only,) = _rows(result)
    assert (only.model, only.pattern, only.sparsity, only.check) == ("w.npy", "file", None, "pass")
    assert only.sparsity_real == pytest.approx(0.75, abs=0.02)
    assert "values rounded to fp16" in result.stderr


def test_a_wrong_result_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.backends.reference.spmm", lambda x, w: np.zeros((8, 192), np.float16))
    result = _run(*SMALL)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_ctrl_c_keeps_the_rows_and_shows_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = runner_host.make_row
    calls: list[int] = []

    def interrupted(*a: Any, **k: Any) -> Row:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(runner_host, "make_row", interrupted)
    path = tmp_path / "rows.jsonl"
    result = _run(*SMALL[:-2], "--n", "8,16", "--out", str(path))
    assert result.exit_code == 130
    assert "192x128" in result.stdout
    assert len(results.read(path)) == 1


def test_ctrl_c_before_the_first_row_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*a: Any, **k: Any) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_host, "make_row", interrupted)
    folder = tmp_path / "new"
    result = _run(*SMALL, "--out", str(folder / "rows.jsonl"), "--csv", str(folder / "rows.csv"))
    assert result.exit_code == 130
    assert not list(folder.iterdir())


def test_gpu_run(gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case = ("--shape", "96x72", "--sparsity", "0.7,0.9", "--n", "8", "--time-cap", "0.01", "--check-rows", "16")
    result = _run(*case, "--out", str(path), "--device", "0")
    assert result.exit_code == 0, result.output
    assert "NVIDIA Pretend, driver 580.1, CUDA 13.0, cuBLAS 13.1.0" in result.stderr
    assert "geometric mean" in result.stdout
    assert [r.system for r in results.read(path)] == ["cublas", "flashllm", "flashllm"]
    again = _run(*case, "--resume", str(path))
    assert again.exit_code == 0
    assert "2 of 2 cases are in" in again.stderr
    assert len(results.read(path)) == 3
    assert _run(*case, "--device", "3").exit_code == 2


def test_overlapping_launches_stand_beside_the_others_and_are_resumed(gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case = ("--shape", "96x72", "--sparsity", "0.7", "--n", "8", "--time-cap", "0.01", "--resume", str(path))
    assert _run(*case).exit_code == 0
    result = _run(*case, "--pdl")
    assert result.exit_code == 0, result.output
    assert "flashllm-pdl" in result.stdout
    assert "cublas" in result.stdout
    assert [(r.system, r.launch) for r in results.read(path)[2:]] == [
        ("cublas", "graph"), ("flashllm", "graph"), ("flashllm-pdl", "graph-pdl"),
    ]  # fmt: skip
    assert "1 of 1 cases are in" in _run(*case, "--pdl").stderr


def test_overlapping_launches_need_hopper(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm.backends import dependent

    monkeypatch.setattr(dependent, "LEAST_CC", (9, 1))
    result = _run("--shape", "96x72", "--sparsity", "0.7", "--n", "8", "--pdl")
    assert result.exit_code == 2
    assert "needs compute capability" in result.stderr


def test_weights_too_big_for_the_gpu(gpu: None) -> None:
    result = _run("--shape", "400000x400000", "--sparsity", "0.8", "--n", "8")
    assert result.exit_code == 2
    assert "benchmark of 400000x400000: needs " in result.stderr
    assert "80,000,000,000 are free" in result.stderr


def test_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.append(path, row())
    result = _run(str(path), command=table.command)
    assert result.exit_code == 0
    assert "| 80 % | 16 | 1.70 |" in result.stdout
    results.append(path, row(N=8, commit=None, dirty=None))
    result = _run(str(path), command=table.command)
    assert result.exit_code == 2
    assert "name their commit" in result.stderr
    assert _run(str(tmp_path / "absent.jsonl"), command=table.command).exit_code == 2


def test_profile_prints_the_ncu_command() -> None:
    result = _run("--shape", "512x256", command=profile.command)
    assert result.exit_code == 0
    assert result.stdout.startswith("ncu --clock-control none --set full --kernel-name")
    assert "flashllm profile --shape 512x256 --sparsity 0.8 --n 16" in result.stdout
    assert _run("--shape", "512x256,8x8", command=profile.command).exit_code == 2


def test_profile_run_needs_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    result = _run("--shape", "512x256", "--run", command=profile.command)
    assert result.exit_code == 2
    assert "not on the PATH" in result.stderr


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")
    assert _run(command=tune.command).exit_code == 2


def test_rows_of_two_methods_never_share_a_table(gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case = ("--shape", "96x72", "--sparsity", "0.7", "--n", "8", "--time-cap", "0.01", "--resume", str(path))
    assert _run(*case).exit_code == 0
    result = _run(*case, "--launch", "stream")
    assert result.exit_code == 0, result.output
    assert len(results.read(path)) == 5
    assert result.stdout.count("cublas ") == 1
    assert "cupy-matmul" in result.stdout
