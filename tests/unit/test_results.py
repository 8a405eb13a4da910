# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest
from bench_rows import row

from flashllm.bench import environment, results
from flashllm.bench.results import Row
from flashllm.errors import ArgumentError, FormatError

FIELDS = """schema kind run_id sweep_id time_utc commit dirty command backend gpu arch sm_count driver cuda cupy cublas
sm_mhz temp_c power_w model layer M K N dtype sparsity sparsity_real pattern seed system format kernel choice
deterministic l2 launch copies rotated_mb read_gbps bytes median_us p20_us p80_us min_us launches tflops gbps
roofline_fraction cublas_us speedup max_err_over_bound reference check""".split()  # noqa: SIM905


def test_fields_are_those_of_the_schema_in_order() -> None:
    assert [field.name for field in dataclasses.fields(Row)] == FIELDS
    assert list(json.loads(row().to_json())) == FIELDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2), ("M", 1.0), ("M", 0), ("dirty", 1), ("median_us", "60"), ("median_us", float("nan")),
        ("kind", "kernels"), ("dtype", "fp32"), ("check", "ok"), ("l2", "hot"), ("N", True), ("format", "auto"),
        ("kernel", None), ("choice", "best"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FormatError, match=field):
        row(**{field: value})


def test_an_int_is_a_fine_float_and_none_is_fine_where_allowed() -> None:
    assert row(power_w=400, sparsity=None, commit=None, dirty=None, speedup=None).power_w == 400


def test_missing_and_unknown_fields_are_refused() -> None:
    values = dataclasses.asdict(row())
    with pytest.raises(FormatError, match="surprise"):
        results.validate({**values, "surprise": 1})
    del values["seed"]
    with pytest.raises(FormatError, match="seed"):
        results.validate(values, where="file:3")


def test_append_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row(N=n) for n in (8, 16, 32)]
    for item in rows:
        results.append(path, item)
    assert results.read(path) == rows
    assert path.read_bytes().count(b"\n") == 3


def test_append_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: writes.append(data) or real(handle, data))
    results.append(tmp_path / "rows.jsonl", row())
    assert len(writes) == 1
    assert writes[0].endswith(b"\n")


def test_a_torn_last_line_is_left_out_and_can_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.append(path, row())
    with path.open("ab") as file:
        file.write(b'{"schema":1,"ki')
    assert results.read(path) == [row()]
    assert results.drop_torn_line(path)
    assert not results.drop_torn_line(path)
    results.append(path, row(N=8))
    assert [r.N for r in results.read(path)] == [16, 8]


def test_rows_can_go_into_a_pipe_and_nowhere(tmp_path: Path) -> None:
    results.append("/dev/null", row())
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    results.append(tmp_path / "pipe", row())
    assert os.read(reader, 1 << 16).decode() == row().to_json() + "\n"
    os.close(reader)


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f2'}\n\x00\x00\x01",  # zeros, as after a power failure, but no rows before
        b"a text",
        b"a text\nwhose second line has no end",
        b'{"architectures":["OPTForCausalLM"]}',  # JSON on one line, but no row
        b'{"schema":1}\nsomething else',
    ],
)
def test_what_is_no_torn_row_is_never_cut(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for work in (lambda: results.drop_torn_line(path), lambda: results.append(path, row())):
        with pytest.raises(FormatError, match=r"file: expected rows of results, lines that begin with"):
            work()
    assert path.read_bytes() == content


def test_zeros_after_a_power_failure_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.append(path, row())
    with path.open("ab") as file:
        file.write(bytes(100))
    results.append(path, row(N=8))
    assert [r.N for r in results.read(path)] == [16, 8]


@pytest.mark.parametrize("line", ["[]", "{", '{"kind":"kernel"}', "1"])
def test_broken_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row().to_json() + "\n" + line + "\n")
    with pytest.raises(FormatError, match=r"rows\.jsonl:2"):
        results.read(path)


def test_rows_of_another_kind_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind":"e2e","tokens":1}\n' + row().to_json() + "\n")
    assert len(results.read(path)) == 1


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.write_csv(path, [row(), row(N=8, cublas_us=None)])
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert [r["N"] for r in read] == ["16", "8"]
    assert read[1]["cublas_us"] == ""


def test_csv_escapes_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "rows.csv", [row(layer="\udcff.npy")])
    assert "\\udcff.npy" in (tmp_path / "rows.csv").read_text(encoding="utf-8")


def test_latest_keeps_the_last_of_each_case() -> None:
    rows = [row(median_us=1.0), row(N=8), row(median_us=2.0), row(gpu="other")]
    assert [(r.N, r.median_us, r.gpu) for r in results.latest(rows)] == [
        (8, 60.0, "NVIDIA H200"),
        (16, 2.0, "NVIDIA H200"),
        (16, 60.0, "other"),
    ]


def test_the_environment_knows_better_than_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a checkout may lie in a repository that knows nothing about its commit."""
    monkeypatch.setenv("FLASHLLM_COMMIT", "abc")
    monkeypatch.setenv("FLASHLLM_DIRTY", "1")
    assert environment.commit_and_dirty() == ("abc", True)


def test_commit_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("FLASHLLM_COMMIT", "abc")
    monkeypatch.setenv("FLASHLLM_DIRTY", "0")
    assert environment.commit_and_dirty(tmp_path) == ("abc", False)
    monkeypatch.setenv("FLASHLLM_DIRTY", "maybe")
    with pytest.raises(ArgumentError, match="FLASHLLM_DIRTY"):
        environment.commit_and_dirty(tmp_path)
    monkeypatch.delenv("FLASHLLM_COMMIT")
    monkeypatch.delenv("FLASHLLM_DIRTY")
    assert environment.commit_and_dirty(tmp_path) == (None, None)


def test_result_name() -> None:
    name = environment.result_name("NVIDIA H100 80GB HBM3", "bench")
    assert name.endswith("-h100-80gb-hbm3-bench.jsonl")
    assert len(name.split("-")[0]) == len("20261123T063700")
