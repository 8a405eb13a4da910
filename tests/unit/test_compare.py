# SPDX-License-Identifier: Apache-2.0
"""`flashllm compare`: which cases match, what counts as noise, what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import row
from click.testing import CliRunner, Result

from flashllm.bench import compare, results
from flashllm.bench.results import Row
from flashllm.cli.main import command
from flashllm.errors import ArgumentError


def timed(us: float, **changes: Any) -> Row:
    """A row of ``us`` microseconds, with launches that do not differ."""
    return row(**{"median_us": us, "p20_us": us, "p80_us": us, "min_us": us, **changes})


def verdicts(before: list[Row], after: list[Row], **options: Any) -> list[str]:
    return [change.verdict for change in compare.compare(before, after, **options).changes]


def save(path: Path, *rows: Row) -> str:
    path.unlink(missing_ok=True)
    for one in rows:
        results.append(path, one)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["compare", *arguments])


@pytest.mark.parametrize(
    ("after", "verdict"), [(60.0, "same"), (61.1, "same"), (61.3, "slower"), (58.9, "same"), (58.7, "faster")]
)
def test_a_change_beyond_the_threshold_counts(after: float, verdict: str) -> None:
    assert verdicts([timed(60.0)], [timed(after)]) == [verdict]
    assert verdicts([timed(60.0)], [timed(after)], threshold=0.2) == ["same"]


def test_the_spread_of_the_launches_is_noise() -> None:
    spread = {"p20_us": 57.0, "p80_us": 63.0}
    (change,) = compare.compare([row(median_us=60.0, **spread)], [timed(62.5)]).changes
    assert change.noise == pytest.approx(0.05)
    assert change.verdict == "same"
    assert verdicts([row(median_us=60.0, **spread)], [timed(63.5)]) == ["slower"]
    assert verdicts([row(median_us=60.0, **spread)], [row(median_us=63.5, p20_us=60.0, p80_us=66.0)]) == ["same"]


def test_relative_times_take_out_what_slowed_both() -> None:
    before, after = timed(60.0, cublas_us=100.0), timed(66.0, cublas_us=110.0)
    assert verdicts([before], [after]) == ["slower"]
    assert verdicts([before], [after], relative=True) == ["same"]
    assert verdicts([before], [timed(60.0, cublas_us=90.0)], relative=True) == ["slower"]
    dense = timed(100.0, system="cublas", format="dense")
    assert len(compare.compare([before, dense], [after, dense], relative=True).changes) == 1


def test_wrong_results_come_first_however_fast() -> None:
    before = [timed(60.0, N=n) for n in (8, 16, 32)]
    after = [timed(60.0, N=8), timed(90.0, N=16), timed(30.0, N=32, check="fail")]
    assert verdicts(before, after) == ["wrong", "slower", "same"]


def test_cases_match_by_all_that_makes_them() -> None:
    """But not by commit, time or command. Of repeated measurements, the last counts."""
    before = [timed(60.0), timed(50.0, commit="d" * 40, time_utc="2026-11-24T00:00:00Z")]
    found = compare.compare(before, [timed(50.0, command="flashllm bench --n 16")])
    assert [(change.before.median_us, change.verdict) for change in found.changes] == [(50.0, "same")]
    for field, value in (
        ("N", 8),
        ("M", 7168),
        ("dtype", "bf16"),
        ("sparsity", 0.7),
        ("pattern", "skewed"),
        ("format", "bitmap"),
        ("gpu", "NVIDIA H100"),
        ("launch", "stream"),
        ("layer", "fc2"),
    ):
        other = timed(1.0, **{field: value})
        found = compare.compare(before, [timed(50.0), other])
        assert found.only_after == (other,), field
        assert found.only_before == ()


def test_chosen_formats_match_each_other_and_no_named_one() -> None:
    chosen = timed(60.0, format="bitmap", choice="auto-format")
    other = timed(50.0, format="slot24", choice="tuned-format")
    named = timed(55.0, format="slot24")
    found = compare.compare([chosen, named], [other, named])
    assert sorted((change.to_dict()["format"], change.verdict) for change in found.changes) == [
        ("auto", "faster"),
        ("slot24", "same"),
    ]


def test_the_later_choice_of_several_in_one_set_counts() -> None:
    both = [timed(60.0, format="bitmap", choice="auto-format"), timed(40.0, format="slot24", choice="auto-format")]
    (change,) = compare.compare(both, [both[1]]).changes
    assert change.before.median_us == 40.0


@pytest.mark.parametrize(
    ("before", "after", "got"),
    [
        ([], [timed(1.0)], "no timed row in the first"),
        ([timed(1.0)], [timed(1.0, median_us=None)], "no timed row in the second"),
        ([timed(1.0)], [timed(1.0, gpu="NVIDIA H100")], "rows of NVIDIA H200 and of NVIDIA H100"),
        ([timed(1.0)], [timed(1.0, N=8), timed(1.0, N=32)], "1 and 2 cases, all different"),
    ],
)
def test_nothing_in_common_is_an_error(before: list[Row], after: list[Row], got: str) -> None:
    with pytest.raises(ArgumentError, match=f"results: expected timed rows of a case in both, got {got}"):
        compare.compare(before, after)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_thresholds_are_fractions(threshold: float) -> None:
    with pytest.raises(ArgumentError, match="threshold: expected a fraction from 0 to below 1, got"):
        compare.compare([timed(1.0)], [timed(1.0)], threshold=threshold)


def test_means_are_geometric_and_apart_for_cublas() -> None:
    dense = {"system": "cublas", "format": "dense"}
    before = [timed(10.0), timed(10.0, N=8), timed(10.0, **dense)]
    after = [timed(20.0), timed(5.0, N=8), timed(11.0, **dense)]
    text = compare.lines(compare.compare(before, after))
    assert text[0] == "3 cases in both: 0 wrong, 2 slower, 1 faster, 0 same; 0 only before, 0 only after."
    assert text[1] == "time, after / before, all systems but cuBLAS: geometric mean 1.000."
    assert text[2] == "time, after / before, cuBLAS: geometric mean 1.100."
    assert len(text) == 3 + 3 + 3


def test_command_shows_changes_and_fails_where_something_is_slower(tmp_path: Path) -> None:
    before = save(tmp_path / "a.jsonl", timed(60.0), timed(60.0, N=8), timed(60.0, N=32))
    after = save(tmp_path / "b.jsonl", timed(66.0), timed(60.0, N=8), timed(50.0, N=32))
    done = run(before, after)
    assert done.exit_code == 1
    slower = "| flashllm tiled-csl, opt-30b fc1 28672x7168 N=16, 0.8 uniform, fp16 | 60.00 | 66.00 | +10.0 % | 2.0 % | "
    assert f"{slower}slower |" in done.stdout
    assert "faster |" in done.stdout
    assert "same |" not in done.stdout
    assert "same |" in run(before, after, "--all").stdout
    assert run(before, after, "--threshold", "0.11").exit_code == 0
    assert run(after, after).exit_code == 0


def test_command_fails_for_missing_and_wrong_cases_but_not_for_cublas(tmp_path: Path) -> None:
    dense = {"system": "cublas", "format": "dense"}
    whole = save(tmp_path / "a.jsonl", timed(60.0), timed(60.0, N=8), timed(100.0, **dense))
    part = save(tmp_path / "b.jsonl", timed(60.0), timed(120.0, **dense))
    done = run(whole, part)
    assert done.exit_code == 1
    assert "missing: flashllm tiled-csl, opt-30b fc1 28672x7168 N=8" in done.stderr
    done = run(whole, part, "--allow-missing")
    assert done.exit_code == 0
    assert "| cublas, opt-30b fc1 28672x7168 N=16, dense, fp16 | 100.00 | 120.00 |" in done.stdout
    wrong = save(tmp_path / "c.jsonl", timed(60.0), timed(50.0, N=8, check="fail"), timed(100.0, **dense))
    assert run(whole, wrong).exit_code == 1


def test_command_prints_json(tmp_path: Path) -> None:
    before = save(tmp_path / "a.jsonl", timed(60.0))
    after = save(tmp_path / "b.jsonl", timed(30.0))
    (line,) = run(before, after, "--json").stdout.splitlines()
    found = json.loads(line)
    assert (found["before_us"], found["after_us"], found["ratio"], found["verdict"]) == (60.0, 30.0, 0.5, "faster")
    assert (found["M"], found["N"], found["system"], found["format"]) == (28672, 16, "flashllm", "tiled-csl")


def test_command_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    before = save(tmp_path / "a.jsonl", timed(60.0))
    other = save(tmp_path / "b.jsonl", timed(60.0, gpu="NVIDIA H100"))
    done = run(before, other)
    assert done.exit_code == 2
    assert "rows of NVIDIA H200 and of NVIDIA H100" in done.stderr
    assert run(before, str(tmp_path / "none.jsonl")).exit_code == 2
    assert run(before, before, "--threshold", "1").exit_code == 2
    broken = tmp_path / "c.jsonl"
    broken.write_text('{"schema": 1}\n')
    assert run(before, str(broken)).exit_code == 2
