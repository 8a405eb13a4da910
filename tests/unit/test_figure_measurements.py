# SPDX-License-Identifier: Apache-2.0
"""Figures that compare systems, and the command that measures what figures need."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_rows
import pytest
from click.testing import CliRunner

from experiments.figures import ENTRIES, crossover, kernels, measure, rows, sparsity, speedup
from experiments.figures.rows import H100, H200, Case
from flashllm.bench import environment, results
from flashllm.cli import bench, figures

ROOT = Path(__file__).resolve().parents[2] / "experiments"


def a_row(**changes: Any) -> results.Row:
    return bench_rows.row(**{"gpu": H100, **changes})


def test_the_published_bars_are_those_of_the_file() -> None:
    panels = kernels.load(ROOT)
    published = [panel for panel in panels if panel.hatched]
    assert [panel.n for panel in published] == [8, 16, 32]
    bars = published[1].bars
    assert bars["flashllm"][Case(9216, 36864, 16, 0.8)] == 49.8
    assert bars["sputnik"][Case(12288, 49152, 16, 0.9)] == 21.8
    assert all(len(here) == 36 for panel in published for here in panel.bars.values())
    (line,) = re.findall(r"^\| 28672x7168 \| 90% \|(.*)\|$", kernels.table((published[2],)), re.M)
    assert [float(cell) for cell in line.split("|")] == [48.1, 46.0, 56.1, 85.7]
    times = sparsity.load(ROOT)[-1]
    assert times.published
    assert times.lines["sputnik"] == {0.8: 560.0, 0.85: 433.0, 0.9: 303.0, 0.95: 172.0, 0.98: 90.0, 0.99: 52.0}


def test_systems_of_one_sweep(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    base = a_row(M=36864, K=9216, N=16, sparsity=0.7, sparsity_real=0.7, median_us=50.0, cublas_us=100.0, gpu=H200)
    found = [
        base,
        replace(base, sparsity=0.8, median_us=40.0, format="slot24"),
        replace(base, system="cublas", format="dense", median_us=100.0),
        replace(base, system="sputnik", format="csr", median_us=200.0),
        replace(base, system="sputnik", format="csr", sparsity=0.8, median_us=80.0),
        replace(base, system="mma-2:4", format="2:4", sparsity=0.5, pattern="2:4", median_us=60.0),
        replace(base, system="torch-int4", format="int4", sparsity=0.0, dtype="bf16", median_us=30.0),
        replace(base, system="cusparse", format="csr", check="fail"),
    ]
    for i, row in enumerate(found):  # a sweep that was resumed consists of several files
        assert row.cublas_us is not None
        assert row.median_us is not None
        whole = replace(row, speedup=row.cublas_us / row.median_us)
        results.append(tmp_path / "results" / f"20260101T00000{i % 2}-h200-opt-systems.jsonl", whole)
    other = replace(base, sparsity=0.95, median_us=30.0, commit="0" * 40)
    results.append(tmp_path / "results" / "20260101T000002-h200-zeros-systems.jsonl", other)
    (one,) = rows.compared(tmp_path)
    assert one.gpu == H200
    assert one.commits == (str(base.commit)[:10],)
    assert set(one.systems) == {"flashllm", "cublas", "sputnik", "mma-2:4", "torch-int4"}
    shutil.copytree(ROOT / "reference", tmp_path / "reference")

    measured = kernels.load(tmp_path)[2]
    assert measured.n == 16
    dense, csr = ({case.zeros: flops for case, flops in measured.bars[name].items()} for name in ("cublas", "sputnik"))
    assert dense == {zeros: pytest.approx(108.716, abs=1e-3) for zeros in (0.7, 0.8, 0.9)}
    assert csr == {0.7: pytest.approx(54.358, abs=1e-3), 0.8: pytest.approx(135.895, abs=1e-3)}
    assert sparsity.load(tmp_path)[0].lines == {"flashllm": {0.95: 30.0}}

    panel = crossover.load(tmp_path)[1]
    assert panel.n == 16
    assert panel.dense == {"mma-2:4": pytest.approx(100 / 60), "torch-int4": pytest.approx(100 / 30)}
    assert "| sputnik |  |  | 0.50 | 1.25 |  | 78% |" in crossover.table((panel,))
    assert "| flashllm |  |  | 2.00 | 2.50 |  | below 70% |" in crossover.table((panel,))


def test_where_a_line_crosses() -> None:
    assert crossover.crossover({}) is None
    assert crossover.crossover({0.5: 0.5, 0.7: 2.0}) == pytest.approx(0.6)
    assert crossover.crossover({0.5: 0.5, 0.6: 1.0, 0.7: 2.0}) == pytest.approx(0.6)
    assert crossover.crossover({0.5: 0.25, 0.6: 0.5}) is None
    assert crossover.crossover({0.5: 1.5, 0.6: 2.0}) is None


def _facts(**changes: Any) -> environment.Environment:
    row = a_row()
    values = {field: getattr(row, field) for field in environment.Environment.__dataclass_fields__}
    return environment.Environment(**{**values, **changes})


def test_a_sweep_goes_on_with_its_newest_file_of_this_machine_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = a_row()
    for name, changes in (
        ("20260101T000000-h100-auto-sweep.jsonl", {}),
        ("20260102T000000-h100-auto-sweep.jsonl", {}),
        ("20260103T000000-h100-auto-sweep.jsonl", {"commit": "0" * 40}),
        ("20260104T000000-h200-auto-sweep.jsonl", {"gpu": H200}),
        ("20260105T000000-h100-pdl.jsonl", {}),
    ):
        results.append(tmp_path / name, replace(base, **changes))  # type: ignore[arg-type]
    found = measure.unfinished("auto-sweep", tmp_path, _facts())
    assert found == tmp_path / "20260102T000000-h100-auto-sweep.jsonl"
    assert measure.unfinished("auto-sweep", tmp_path, _facts(dirty=True)) is None

    calls: list[list[str]] = []
    monkeypatch.setattr(environment, "collect", lambda backend: _facts())
    monkeypatch.setattr(bench.command, "main", lambda args, **_: calls.append(args))
    assert measure.measure(measure.AUTO, tmp_path) == found
    assert calls[-1][-2:] == ["--resume", str(found)]
    new = measure.measure(measure.SYSTEMS, tmp_path, quick=True)
    assert new.name.endswith("-h100-80gb-hbm3-opt-systems.jsonl")
    assert calls[-1][-6:] == [*measure.QUICK, "--resume", str(new)]
    assert "--systems" in calls[-1]
    measure.measure(measure.ZEROS, tmp_path, quick=True)
    assert "36864x9216" in calls[-1]
    assert "opt-30b" not in calls[-1]


def test_figures_are_measured_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    run: list[tuple[str, Path, bool]] = []
    # From a GPU that no figure knows, and from a tree with uncommitted changes.
    base = a_row(gpu="NVIDIA GH 1", dirty=True, choice="auto-format", bytes=30_000_000, read_gbps=1000.0)
    measured = [
        replace(base, sparsity=zeros, sparsity_real=zeros, N=n, median_us=40.0, cublas_us=100.0, speedup=2.5)
        for zeros in speedup.ZEROS
        for n in (8, 64)
    ]

    def pretend(sweep: measure.Sweep, folder: Path, *, quick: bool = False) -> Path:
        run.append((sweep.what, folder, quick))
        for row in measured:
            results.append(folder / f"20260101T000000-{sweep.what}.jsonl", row)
        return folder

    refused = CliRunner().invoke(figures.command, ["speedup", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "measuring needs a GPU" in refused.output
    monkeypatch.setattr("flashllm.backends.select", lambda name: SimpleNamespace(name="cuda", reason=""))
    monkeypatch.setattr(measure, "measure", pretend)
    names = ["speedup", "utilisation", "floor", "ladder"]
    done = CliRunner().invoke(figures.command, [*names, "--quick", "--format", "png", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert run == [(sweep.what, tmp_path / "quick" / "results", True) for sweep in (measure.AUTO, *measure.FORMATS)]
    drawn = ["floor-formats.png", "speedup-auto.png", "utilisation-auto.png"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == drawn
    assert f"NVIDIA GH 1, commit {base.commit[:10]} and changes\n" in done.output
    assert done.output.count("NVIDIA GH 1") == 3
    assert "H100" not in done.output
    assert "| 80% | 8 | 2.50 | 2.50 | 2.50 | 1 |" in done.output
    assert "| flashllm | 80% | 8 | 75% |  |\n" in done.output  # the peak of its tensor cores is not known either


@pytest.mark.parametrize("tree", [(None, None), ("c" * 40, True), ("c" * 40, None)])
def test_committed_rows_are_of_committed_trees(
    tree: tuple[str | None, bool | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("flashllm.backends.select", lambda name: SimpleNamespace(name="cuda", reason=""))
    monkeypatch.setattr(environment, "commit_and_dirty", lambda: tree)
    monkeypatch.setattr(measure, "measure", lambda *_, **__: pytest.fail("measured"))
    refused = CliRunner().invoke(figures.command, ["speedup", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "--quick" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spedup"], "expected some of ladder, speedup"),
        (["--from-results", "--quick"], "--quick: expected nothing beside --from-results"),
    ],
)
def test_bad_usage(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(figures.command, arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_every_figure_is_listed() -> None:
    done = CliRunner().invoke(figures.command, ["--list"])
    named = [line.split()[0] for line in done.output.splitlines() if not line.startswith(" ")]
    assert named == list(ENTRIES)
    assert "``" not in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path / "site-packages" / "flashllm")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(figures.command, ["--from-results"])
    assert done.exit_code == 2
    assert "in a checkout of flashllm" in done.output


def test_the_page_on_reproduction_has_the_numbers_of_the_figure() -> None:
    page = (ROOT.parent / "docs" / "reproduction.md").read_text(encoding="utf-8")
    ratios = kernels.advantage(kernels.load(ROOT))
    assert len(ratios) >= 2
    for machine, found in ratios.items():
        for name in dict.fromkeys(name for name, _ in found):
            texts = [f"{found[name, zeros]:.2f}" for zeros in kernels.ZEROS]
            assert f"| {name} | {' | '.join(texts)} |" in page, f"{name}, {machine}"
