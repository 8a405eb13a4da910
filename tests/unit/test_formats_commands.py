# SPDX-License-Identifier: Apache-2.0
"""Commands on several formats at once: rows, resumed runs, tables, verification, tuning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from bench_rows import row
from click.testing import CliRunner, Result
from test_matmul import H100

import coordinates
from coordinates import Coordinates
from flashllm import TiledCSL, device, registry
from flashllm.backends import emulator
from flashllm.bench import report, results, systems, timing
from flashllm.bench.results import Row
from flashllm.cli import bench, profile, tune, verify
from flashllm.gpus import Gpu, find_gpu, gpu_of
from flashllm.matmul import auto, tune_cache
from flashllm.matmul import tune as tuner
from flashllm.matmul.auto import rank_formats
from products import weight

CASE = ("--shape", "192x128", "--sparsity", "0.8", "--n", "8")
HOST = ("--backend", "reference", *CASE)
BOTH = ("--format", "tiled-csl,coordinates")


@pytest.fixture(autouse=True)
def _second_format(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)


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
    assert result.exit_code == 0, result.output
    return [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]


def test_a_row_for_each_format() -> None:
    rows = _rows(_run(*HOST, *BOTH, "--json"))
    assert [(r.system, r.format, r.check) for r in rows] == [
        ("flashllm", "tiled-csl", "pass"),
        ("flashllm", "coordinates", "pass"),
    ]
    assert rows[0].sparsity_real == rows[1].sparsity_real
    assert rows[0].bytes != rows[1].bytes
    assert [r.choice for r in rows] == ["auto", "auto"]


AUTO = ("--shape", "1024x1024", "--sparsity", "0.5,0.9", "--n", "8,16")


def chosen(gpu: Gpu) -> dict[tuple[float | None, int], str]:
    """The formats of the cases of ``AUTO``."""
    return {(s, n): rank_formats((1024, 1024), 1 - s, n, gpu=gpu).best.format for s in (0.5, 0.9) for n in (8, 16)}


@pytest.mark.parametrize("arguments", [(), ("--format", "auto")])
def test_by_default_each_case_takes_the_format_that_suits_it(arguments: tuple[str, ...]) -> None:
    rows = _rows(_run("--backend", "reference", *AUTO, *arguments, "--json"))
    assert {(r.sparsity, r.N): r.format for r in rows} == chosen(find_gpu("H100 80GB"))
    assert len({r.format for r in rows}) > 1
    assert {r.choice for r in rows} == {"auto-format"}


def test_the_gpu_that_is_modelled_is_the_one_that_formats_are_chosen_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = auto.rank

    def rank(contents: Any, n: Any, *, gpu: Gpu) -> Any:
        asked.append(gpu.name)
        return real(contents, n, gpu=gpu)

    monkeypatch.setattr(auto, "rank", rank)
    assert _run("--backend", "reference", *CASE, "--model-gpu", "L40S").exit_code == 0
    assert set(asked) == {"L40S"}


@pytest.mark.slow
@pytest.mark.skipif(emulator.available() is not None, reason="no compiler for the emulator")
def test_auto_on_the_emulator() -> None:
    case = ("--backend", "emulator", "--shape", "256x256", "--sparsity", "0.8", "--n", "16", "--json")
    (only,) = _rows(_run(*case))
    assert only.format == rank_formats((256, 256), 0.2, 16, gpu=find_gpu("H100 80GB")).best.format
    assert (only.check, only.choice) == ("pass", "auto-format")


def test_auto_on_a_gpu_measures_only_what_it_takes_and_resumes(gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case = (*AUTO, "--time-cap", "0.01", "--check-rows", "16", "--resume", str(path))
    result = _run(*case)
    assert result.exit_code == 0, result.output
    rows = [r for r in results.read(path) if r.system == "flashllm"]
    assert {(r.sparsity, r.N): r.format for r in rows} == chosen(gpu_of(device.device_facts()))
    assert len(rows) == 4
    assert {r.choice for r in rows} == {"auto-format"}
    for r in rows:
        assert f"flashllm {r.format}" in result.stdout
    count = len(results.read(path))
    again = _run(*case)
    assert again.exit_code == 0
    assert "4 of 4 cases are in" in again.stderr
    assert len(results.read(path)) == count
    there = sum(r.format in ("tiled-csl", "bitmap") for r in rows)
    rest = _run(*case, "--format", "tiled-csl,bitmap")
    assert f"{there} of 8 cases are in" in rest.stderr, "rows of a format count, whoever chose it"


def test_means_of_chosen_formats_are_one_mean() -> None:
    def mixed(n: int, name: str, speedup: float) -> Row:
        return row(N=n, format=name, speedup=speedup, choice="auto-format")

    rows = [mixed(8, "slot24", 2.0), mixed(16, "bitmap", 8.0)]
    text = report.markdown(rows, full=True)
    assert "\n| 80 % | all | 4.00 | 2.00 | 8.00 | 2 |" in text
    assert "| slot24 | opt-30b fc1 |" in text
    assert "| bitmap | opt-30b fc1 |" in text
    both = report.markdown([*rows, row(format="tiled-csl", speedup=3.0)])
    assert "| auto | 80 % | all | 4.00 | 2.00 | 8.00 | 2 |" in both
    assert "| tiled-csl | 80 % | all | 3.00 | 3.00 | 3.00 | 1 |" in both


@pytest.mark.parametrize("text", ["csr", "tiled-csl,dense", ",", ""])
@pytest.mark.parametrize("command", [bench.command, verify.command])
def test_unknown_formats_are_bad_usage(text: str, command: Any) -> None:
    result = _run("--backend", "reference", "--format", text, command=command)
    assert result.exit_code == 2
    assert result.stderr.count("Error: format: expected ") == 1


def test_resuming_adds_the_formats_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(*HOST, "--format", "tiled-csl", "--out", str(path)).exit_code == 0
    again = _run(*HOST, *BOTH, "--resume", str(path))
    assert again.exit_code == 0
    assert "1 of 2 cases are in" in again.stderr
    assert [r.format for r in results.read(path)] == ["tiled-csl", "coordinates"]
    assert again.stdout.count("192x128") == 2, "rows of two formats do not replace each other"
    assert _run(*HOST, *BOTH, "--resume", str(path)).exit_code == 0
    assert len(results.read(path)) == 2


def test_a_packed_file_keeps_its_format(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    Coordinates.from_dense(weight("uniform", (100, 60), 0.3, "bf16")).save(path)
    common = ("--backend", "reference", "--weights", str(path), "--n", "3", "--json")
    (own,) = _rows(_run(*common))
    assert (own.format, own.dtype, own.pattern) == ("coordinates", "bf16", "file")
    (other,) = _rows(_run(*common, "--format", "tiled-csl"))
    assert (other.format, other.sparsity_real) == ("tiled-csl", own.sparsity_real)


def test_gpu_run_times_all_formats_beside_one_cublas(gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case = ("--shape", "96x72", "--sparsity", "0.7,0.9", "--n", "8", "--time-cap", "0.01", "--check-rows", "16")
    result = _run(*case, *BOTH, "--out", str(path))
    assert result.exit_code == 0, result.output
    assert [(r.system, r.format, r.sparsity) for r in results.read(path)] == [
        ("cublas", "dense", 0.9),
        ("flashllm", "tiled-csl", 0.7), ("flashllm", "coordinates", 0.7),
        ("flashllm", "tiled-csl", 0.9), ("flashllm", "coordinates", 0.9),
    ]  # fmt: skip
    assert all(r.check == "pass" and r.speedup for r in results.read(path))
    assert "flashllm coordinates" in result.stdout
    third = _run(*case, "--format", "coordinates", "--ablation", "--json")
    assert [r.kernel.partition(":")[0] for r in _rows(third) if r.system == "flashllm-ablation"] == [
        *("by-column", "twice"),
        *("by-column", "twice"),
    ]


def test_an_ablation_is_of_the_format_that_has_one(gpu: None) -> None:
    case = ("--shape", "96x72", "--sparsity", "0.5", "--n", "16", "--time-cap", "0.01", "--check-rows", "16")
    rows = _rows(_run(*case, "--ablation", "--json"))
    assert {r.format for r in rows if r.system.startswith("flashllm")} == {"tiled-csl"}
    assert len([r for r in rows if r.system == "flashllm-ablation"]) == 3


def test_only_what_is_missing_is_packed(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    case = ("--shape", "96x72", "--sparsity", "0.7", "--n", "8", "--time-cap", "0.01", "--resume", str(path))
    assert _run(*case, "--format", "tiled-csl").exit_code == 0
    monkeypatch.setattr(TiledCSL, "from_dense", None)
    result = _run(*case, *BOTH)
    assert result.exit_code == 0, result.output
    assert [r.format for r in results.read(path)] == ["dense", "tiled-csl", "dense", "coordinates"]


def test_tables_name_the_format_where_there_are_several() -> None:
    rows = [row(N=n, format=name, speedup=s) for n in (8, 16) for name, s in (("tiled-csl", 2.0), ("coordinates", 8.0))]
    text = report.markdown(rows, full=True)
    assert "| format | zeros | N |" in text
    assert "| tiled-csl | 80 % | all | 2.00 | 2.00 | 2.00 | 2 |" in text
    assert "| coordinates | 80 % | all | 8.00 | 8.00 | 8.00 | 2 |" in text
    assert "| coordinates | opt-30b fc1 |" in text
    one = report.markdown([r for r in rows if r.format == "tiled-csl"], full=True)
    assert "format" not in one
    assert "\n| 80 % | all | 2.00 |" in one
    assert len(results.latest(rows)) == 4


def test_verify_checks_all_formats_or_those_asked_for() -> None:
    def formats(*arguments: str) -> dict[str, set[str]]:
        result = _run("--backend", "reference", "--json", *arguments, command=verify.command)
        assert result.exit_code == 0, result.output
        found: dict[str, set[str]] = {}
        for line in map(json.loads, result.stdout.splitlines()):
            found.setdefault(line["format"], set()).add(line["encoding"])
        return found

    assert set(formats("--quick")) == set(registry.FORMATS)
    assert formats("--format", "coordinates") == {"coordinates": {"default", "by-column"}}
    table = _run("--backend", "reference", "--quick", "--format", "coordinates", command=verify.command).stdout
    assert "numpy coordinates" in table


def test_verify_on_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.jit.compile.compile_many", lambda jobs, **_: [])
    monkeypatch.setattr(Coordinates, "to_device", lambda self: self)
    result = _run("--quick", "--format", "coordinates", command=verify.command)
    assert result.exit_code == 0, result.output
    assert "coordinates kRepeat=1" in result.stdout


def test_profile_passes_the_format_on() -> None:
    result = _run("--shape", "512x256", "--format", "coordinates", command=profile.command)
    assert "--format coordinates" in result.stdout
    assert _run("--shape", "512x256", *BOTH, command=profile.command).exit_code == 2


def test_tune_takes_the_candidates_of_every_format(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(fake_gpu.Array):
        """Passes for a CuPy array."""

    Device.__module__ = "cupy"

    def packed(made: Any, dense: Any, dtype: str) -> Any:
        host = real[made.FORMAT](np.asarray(dense), dtype=dtype)
        return host.with_arrays({name: array.view(Device) for name, array in host.arrays().items()})

    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("flashllm.device.device_facts", lambda index=None: H100)
    monkeypatch.setattr(sys.modules["cupy"].cuda, "Device", lambda: fake_gpu.Stream())
    monkeypatch.setattr(tuner, "spmm", lambda *_, **__: None)
    real = {made.FORMAT: made.from_dense for made in (TiledCSL, Coordinates)}
    for made in (TiledCSL, Coordinates):
        monkeypatch.setattr(made, "from_dense", classmethod(packed))
    result = _run("--shape", "256x192", "--sparsity", "0.8", "--n", "16", *BOTH, command=tune.command)
    assert result.exit_code == 0, result.output
    assert "% tiled-csl" in result.stdout
    assert "% coordinates" in result.stdout
    choices = tune_cache._parse(tune_cache.path_for(H100))
    assert [key.split()[0] for key in choices] == ["coordinates", "tiled-csl"]
    found = tune_cache.measured("tiled-csl", (256, 192), 16, dtype="fp16", density=0.2, device=H100)
    assert found is not None
    assert found.median_us == 1000 / tuner._MAX_COPIES
    assert rank_formats((256, 192), 0.2, 16, gpu=gpu_of(H100), formats=["tiled-csl"]).best.source == "measured"


@pytest.mark.parametrize("arguments", [(), ("--format", "auto")])
def test_tune_measures_every_format_by_default(
    gpu: None, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    tuned: list[tuple[str, tuple[int, ...]]] = []

    def record(w: Any, n: Any) -> list[Any]:
        tuned.append((w.format, tuple(n)))
        return []

    monkeypatch.setattr(tuner, "tune", record)
    result = _run("--shape", "256x192", "--sparsity", "0.8", "--n", "8,16", *arguments, command=tune.command)
    assert result.exit_code == 0, result.output
    assert tuned == [(name, (8, 16)) for name in registry.FORMATS]
