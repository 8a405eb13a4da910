# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from typing import Any

import pytest
from bench_rows import row

from flashllm.bench import report, roofline
from flashllm.bench.results import Row
from flashllm.errors import ArgumentError


def _text(parts: list[Any]) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _rows() -> list[Row]:
    rows = []
    for n in (8, 16):
        rows.append(row(N=n, system="cublas", format="dense", kernel="GemmEx", median_us=100.0, speedup=1.0))
        rows += [row(N=n, layer=layer, speedup=s) for layer, s in (("fc1", 1.0), ("fc2", 4.0))]
    return rows


def test_means_are_geometric_and_leave_wrong_results_out() -> None:
    rows = [*_rows(), row(N=8, speedup=1000.0, check="fail"), row(N=8, speedup=None)]
    means = {(m.sparsity, m.n): m for m in report.speedup_means(rows)}
    assert means[0.8, 8].geometric == pytest.approx(2.0)
    assert (means[0.8, None].cases, means[0.8, 8].lowest, means[0.8, 8].highest) == (4, 1.0, 4.0)
    assert report.speedup_means([]) == []


def test_timing_table_names_systems_and_wrong_results() -> None:
    text = _text(report.timing_table([*_rows(), row(N=32, check="fail", max_err_over_bound=None)]))
    assert "cublas GemmEx" in text
    assert "WRONG" in text
    assert "geometric mean" in text
    assert "opt-30b fc1" in text


def test_model_table_never_shows_a_speed_up() -> None:
    text = _text(report.model_table([row(gpu=None, median_us=None, speedup=None)], roofline.find_gpu("h200")))
    assert "modelled, not measured" in text
    assert "speed-up" not in text


def test_markdown_of_committed_rows() -> None:
    text = report.markdown(_rows(), full=True)
    assert "| 80 % | all | 2.00 | 1.00 | 4.00 | 4 |" in text
    assert text.count("opt-30b fc2") == 2
    assert "commit cccccccccc" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": None, "dirty": None}, "name their commit"),
        ({"dirty": True}, "local changes"),
        ({"check": "fail"}, "passed their check"),
        ({"gpu": "NVIDIA A100"}, "one gpu"),
        ({"launch": "stream"}, "one launch"),
        ({"l2": "warm"}, "one l2"),
    ],
)
def test_markdown_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        report.markdown([*_rows(), row(N=64, **changes)])


def test_markdown_needs_rows_and_takes_dirty_ones_on_request() -> None:
    with pytest.raises(ArgumentError, match="got none"):
        report.markdown([])
    assert report.markdown([row(dirty=True)], allow_dirty=True)


def test_roofline() -> None:
    assert roofline.product_bytes(4, 8, 2, 100) == 100 + 2 * 2 * 8 + 2 * 2 * 4
    assert roofline.floor_us(3_060_000_000, 3060.0) == pytest.approx(1000.0)
    assert roofline.gbps(3_060_000_000, 1000.0) == pytest.approx(3060.0)
    assert roofline.tflops(1000, 1000, 1000, 1000.0) == pytest.approx(2.0)
    with pytest.raises(ArgumentError, match="H100 80GB"):
        roofline.find_gpu("H1000")
