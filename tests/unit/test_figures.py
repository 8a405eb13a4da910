# SPDX-License-Identifier: Apache-2.0
"""Figures from committed rows: which rows they take, the numbers in their tables, and the files."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.figures import ENTRIES, floor, ladder, rows, speedup, style
from experiments.figures.entry import draw, entry, stamp
from experiments.figures.rows import H100, H200, Case, Logged
from flashllm.bench import results
from flashllm.cli import figures
from flashllm.errors import FormatError

FILES = (
    "speedup-auto", "floor-formats", "utilisation-auto", "ablation-tiled-csl", "kernels-opt", "sparsity-sweep",
    "crossover-systems", "bytes-systems", "quality-smollm2", "decode-throughput", "decode-step", "fit-memory",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "experiments"


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Every figure reads all files of rows; here each file is read only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "read", functools.cache(results.read))
        yield


@pytest.fixture(scope="module")
def data() -> ladder.Ladder:
    return ladder.load(ROOT)


def a_row(**changes: Any) -> results.Row:
    file = next(iter(sorted((ROOT / "results").glob("*h100*bitmap-opt-sweep.jsonl"))))
    return replace(next(row for row in results.read(file) if row.system == "flashllm"), **changes)


def cells(text: str, title: str, kernel: str, step: str) -> list[str]:
    """The numbers of a line of the table below ``title``."""
    below = text.split(f"\n{title}\n\n")[1].split("\n\n")[0]
    (line,) = re.findall(rf"^\| {re.escape(kernel)} \| {re.escape(step)}[^|]* \|(.*)\|$", below, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_of_repeated_measurements_the_newest_counts(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    base = a_row(
        M=128, K=64, N=8, sparsity=0.5, median_us=10.0, cublas_us=20.0, speedup=2.0, read_gbps=1000.0, bytes=5_000_000
    )
    files: dict[str, list[results.Row]] = {
        "20260102T000000-b.jsonl": [
            replace(base, median_us=8.0, speedup=2.51, commit="new"),
            replace(base, N=16, commit="new", dirty=True),
        ],
        "20260101T000000-a.jsonl": [base, replace(base, N=32, commit="old")],
        "20260103T000000-c.jsonl": [
            replace(base, median_us=1.0, **other)  # type: ignore[arg-type]
            for other in (
                {"check": "fail"}, {"gpu": "NVIDIA H200"}, {"l2": "warm"},
                {"launch": "stream"}, {"system": "flashllm-ablation"}, {"pattern": "block"}, {"dtype": "bf16"},
                {"format": "slot24"}, {"sparsity": None}, {"cublas_us": None}, {"read_gbps": None},
            )
        ],
    }  # fmt: skip
    for name, found in files.items():
        for row in found:
            results.append(tmp_path / "results" / name, row)
    newest = rows.newest(tmp_path, "bitmap")
    assert {case: (row.us, row.commit) for case, row in newest.items()} == {
        Case(128, 64, 8, 0.5): (8.0, "new"),
        Case(128, 64, 16, 0.5): (10.0, "new and changes"),
        Case(128, 64, 32, 0.5): (10.0, "old"),
    }
    assert newest[Case(128, 64, 8, 0.5)].floor_us == 5.0
    assert newest[Case(128, 64, 8, 0.5)].speedup == 2.51  # the row's own, from times with more digits
    assert rows.newest(tmp_path, "bitmap", gpu="NVIDIA H200").keys() == {Case(128, 64, 8, 0.5)}


def test_the_table_has_the_committed_numbers(data: ladder.Ladder) -> None:
    text = ladder.table(data)
    title = "28672x7168, N = 8, us"
    steps = {"1 a ring for each warp": ["94.6", "68.7", "65.9", "63.5"], "21 runs": ["89.4", "62.6", "", "50.4"]}
    for step, times in steps.items():  # as in docs/kernels/bitmap.md
        assert cells(text, title, "bitmap", step) == times
    assert cells(text, title, "slot24", "4 a feeder") == ["", "73.9", "53.1", "44.9"]
    assert cells(text, title, "bitmap", "4 wgmma") == [""] * 4
    assert cells(text, "7168x7168, N = 32, us", "bitmap", "9 one ring")[:2] == ["31.6", "28.7"]

    original = json.loads((ROOT / "reference" / "h100_originals.json").read_text())["rows"]
    for zeros, cell in zip((0.7, 0.8, 0.9), cells(text, title, "Flash-LLM, published", "")[1:], strict=True):
        (row,) = (
            r for r in original
            if (r["M"], r["K"], r["N"], r["sparsity"], r["system"]) == (28672, 7168, 8, zeros, "flash-llm-original")
        )  # fmt: skip
        assert cell == f"{row['us']:.1f} ({row['cublas_us'] / row['us']:.2f} x, cuBLAS {row['cublas_us']:.1f})"

    found: dict[str, results.Row] = {}
    for file in sorted((ROOT / "results").glob("*.jsonl")):
        for row in results.read(file):
            if (row.gpu, row.M, row.K, row.N, row.sparsity) == (H100, 28672, 7168, 8, 0.8) and row.system == "flashllm":
                found[row.format] = row
    for column, form in zip(data.columns, ladder.FORMATS, strict=True):
        last = found[form.name]
        assert last.median_us is not None
        assert last.roofline_fraction is not None
        assert last.cublas_us is not None
        cell = cells(text, title, column.title, "rows, ")[2]
        assert cell == f"{last.median_us:.1f} ({last.cublas_us / last.median_us:.2f} x, cuBLAS {last.cublas_us:.1f})"
        floor = last.median_us * last.roofline_fraction
        assert float(cells(text, title, column.title, "DRAM floor")[2]) == pytest.approx(floor, abs=0.06)


def test_the_map_says_what_the_table_of_the_sweep_says() -> None:
    """The same numbers as in README.md, which `flashllm table` fills."""
    text = speedup.table(speedup.load(ROOT))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    sections = text.split("\n\nNVIDIA ")[1:]
    for gpu, section in zip((H100, H200), sections, strict=True):
        assert f"NVIDIA {section}".startswith(f"{gpu}, commit ")
        commit = section.split("commit ")[1][:10]
        (there,) = (part for part in readme.split("<!-- results: ") if f"{gpu}, driver" in part and commit in part)
        lines = re.findall(
            r"^\| (\d+)% \| (\d+) \| ([\d.]+ \| [\d.]+ \| [\d.]+ \| \d+) \| ([a-z0-9, -]+) \|$", section, re.M
        )
        assert len(lines) == 20
        for zeros, n, numbers, formats in lines:
            assert f"\n| {zeros} % | {n} | {numbers} |\n" in there
            assert set(formats.split(", ")) <= {"tiled-csl", "bitmap", "slot24"}


def test_the_map_takes_rows_that_were_chosen_in_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    base = a_row(N=8, sparsity=0.5, median_us=10.0, cublas_us=20.0, speedup=2.0, choice="auto-format")
    for name, row in (
        ("1-h100-auto-sweep", replace(base, M=128, K=64)),
        ("1-h100-auto-sweep", replace(base, M=256, K=64, speedup=3.0, format="bitmap")),
        ("1-h100-auto-sweep", replace(base, M=384, K=64, speedup=20.0, choice="auto")),
        ("2-h100-opt-systems", replace(base, M=256, K=64, speedup=4.0, format="slot24")),
        ("2-h100-opt-systems", replace(base, M=256, K=64, speedup=0.5, format="csr", system="sputnik")),
        ("3-h100-pdl", replace(base, M=128, K=64, speedup=20.0)),
    ):
        results.append(tmp_path / "results" / f"{name}.jsonl", row)
    (found,) = speedup.load(tmp_path)
    (cell,) = found.cells.values()
    assert cell.speedups == (2.0, 4.0)
    assert cell.formats == ("bitmap", "slot24")
    assert cell.mean == pytest.approx(8**0.5)


def test_committed_rows_are_of_committed_trees() -> None:
    for file in sorted((ROOT / "results").glob("*.jsonl")):
        for row in results.read(file):
            assert row.commit, file.name
            assert row.dirty is False, file.name


def test_no_kernel_is_faster_than_its_bytes() -> None:
    panels = floor.load(ROOT)
    assert [panel.gpu for panel in panels] == [H100, H200]
    for panel in panels:
        for name, cases in panel.formats.items():
            assert len(cases) >= 72, name
            assert all(row.us > row.floor_us for row in cases.values()), name
    means = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", floor.table(panels), re.M)
    assert len(means) > 60
    for bytes_, time, ratio in means:
        assert float(time) / float(bytes_) == pytest.approx(float(ratio), abs=0.02)


def test_every_step_that_is_drawn_has_times(data: ladder.Ladder) -> None:
    for column in data.columns:
        for label, times in column.steps:
            assert any(case[:2] in ladder.SHAPES and case.N in ladder.BATCHES for case in times), label


def test_the_variant_of_a_step() -> None:
    def logged(variant: str, M: int, us: float, zeros: float = 0.5) -> Logged:
        return Logged(step="s", variant=variant, case=Case(M, 64, 8, zeros), us=us)

    entries = [
        *(logged("a", M, us) for M, us in ((1, 10.0), (2, 40.0))),
        *(logged("b1", M, us) for M, us in ((1, 12.0), (2, 30.0))),  # the least geometric mean
        *(logged("b2", M, us) for M, us in ((1, 13.0), (2, 31.0), (1, 9.0))),  # the last time of a case counts
        logged("c", 1, 1.0),  # not on all shapes
        logged("c", 2, 5.0, zeros=0.9),
    ]

    def times(**options: Any) -> list[tuple[str, float]]:
        found = ladder.fastest(ladder.Step(step="s", label="", **options), entries)
        return [(entry.variant, entry.us) for _, entry in sorted(found.items())]

    assert times() == [("b2", 9.0), ("b2", 31.0), ("c", 5.0)]
    assert times(without="b2") == [("b1", 12.0), ("b1", 30.0), ("c", 5.0)]
    assert times(only="b*", without="b2") == [("b1", 12.0), ("b1", 30.0)]
    assert times(only="none") == []


def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "kernel_log", tmp_path / "kernel_log")
    log = tmp_path / "kernel_log" / "slot24_h100.json"
    text = log.read_text()
    log.write_text(text.replace('"8 runs"', '"8 walks"'))
    with pytest.raises(KeyError, match="slot24_h100: no step '8 runs'"):
        ladder.load(tmp_path)
    log.write_text(text.replace('"rows"', '"row"'))
    with pytest.raises(FormatError, match=r"slot24_h100\.json"):
        ladder.load(tmp_path)


def test_variants_with_wrong_results_are_left_out() -> None:
    logged = rows.log(ROOT, "slot24_h100")
    assert "3 every warp for itself" in {entry.step for entry in logged}
    assert "no decoding" in (ROOT / "kernel_log" / "slot24_h100.json").read_text()
    assert "no decoding" not in {entry.variant for entry in logged}


def test_labels_are_moved_apart() -> None:
    assert style.spread([], 1) == []
    assert style.spread([3.0, 1.0], 1) == [3.0, 1.0]
    assert style.spread([5.0, 5.0, 20.0], 2) == [4.0, 6.0, 20.0]
    places = [1.0, 9.0, 1.1, 1.2, 3.6, 9.0]
    moved = style.spread(places, 1)
    apart = sorted(moved)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(apart))
    assert sum(moved) == pytest.approx(sum(places))
    assert sorted(range(6), key=lambda i: moved[i]) == sorted(range(6), key=lambda i: places[i])


@pytest.mark.parametrize("name", ENTRIES)
def test_committed_figures_show_the_committed_rows(name: str) -> None:
    """If this fails: make figures ARGS="--out docs/figures --format png --format svg"."""
    figure = entry(name)
    assert figure.name == name
    expected = stamp(figure, figure.load(ROOT)).encode()
    files = [file for file in (REPOSITORY / "docs" / "figures").iterdir() if file.name.startswith(f"{name}-")]
    assert {file.suffix for file in files} == {".png", ".svg"}
    for file in files:
        assert expected in file.read_bytes(), f"{file.name} is not of these rows"


def test_files_are_written(data: ladder.Ladder, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    out = tmp_path / "new" / "one"
    done = CliRunner().invoke(figures.command, ["--from-results", "--format", "png", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert ladder.table(data) in done.output
    done = CliRunner().invoke(figures.command, ["speedup", "--from-results", "--out", str(out)])
    assert done.exit_code == 0, done.output
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    ladders = {f"ladder-{M}x{K}.png" for M, K in ladder.SHAPES}
    names = ladders | {f"{name}.png" for name in FILES} | {f"speedup-auto.{suffix}" for suffix in starts}
    assert {file.name for file in out.iterdir()} == names
    for name in names:
        written = (out / name).read_bytes()
        assert written.startswith(starts[name[-3:]])
        assert len(written) > 10_000

    again = draw(speedup.ENTRY, speedup.load(ROOT), tmp_path / "two")
    assert [file.name for file in again] == [f"speedup-auto.{suffix}" for suffix in starts]
    for file in again:
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_command_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    done = CliRunner().invoke(figures.command, ["--from-results", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert 'pip install -e ".[plot]"' in done.output
    assert not (tmp_path / "out").exists()
