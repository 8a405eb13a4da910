# SPDX-License-Identifier: Apache-2.0
"""Tables on consoles of any width: names may fold, numbers are never cut."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
from bench_rows import row

from flashllm.backends.emulator_counts import Counts
from flashllm.bench import report, roofline, tables
from flashllm.bench.report_counts import counts_table

if TYPE_CHECKING:
    from rich.console import RenderableType

KERNEL = (
    "slot24<T=__half, kN=8, kPartRows=32, kGroupValues=2, kRing=96, kStages=2, kWindows=2, kMinBlocks=3, kAligned=true>"
)
CASE = {"M": 106496, "K": 16384, "N": 64, "format": "slot24", "kernel": KERNEL, "median_us": 12345.67}
ROWS = [
    row(**{**CASE, "system": "cublas", "format": "dense", "kernel": "Lt#2 W[M,K] y[N,M]"}),
    row(**CASE),
    row(**CASE, system="flashllm-pdl", cublas_us=None, speedup=None),
    row(**{**CASE, "system": "sputnik", "format": "csr", "kernel": f"sputnik<{'Y' * 200}>"}, speedup=0.12),
]


def shown(parts: Iterable[RenderableType], width: int) -> list[str]:
    """The lines that one console shows."""
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    tables.show(console, parts, file_width=1)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_numbers_are_never_cut(width: int) -> None:
    lines = shown(report.timing_table(ROWS), width)
    assert "…" not in "".join(lines)
    timed = [line.replace("│", " ").split() for line in lines if "12345.67" in line]
    zeros = ("dense", "0.8", "0.8", "0.8")
    speedups = ("1", "1.70", "-", "0.12")
    expected = [
        ["64", zero, "12345.67", "109.6", "2750", "61.0", speedup, "0.980", "ok"]
        for zero, speedup in zip(zeros, speedups, strict=True)
    ]
    assert [words[-9:] for words in timed] == expected
    if width >= 80:
        assert max(map(len, lines)) <= width


def test_overlapping_launches_are_named_without_their_kernel() -> None:
    text = "\n".join(shown(report.timing_table(ROWS), 200))
    assert "flashllm-pdl " in text
    assert "slot24<" not in text


def test_a_file_has_its_own_width() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "N")
    table.columns[0].overflow = "fold"
    table.add_row("k" * 100, "64")
    console = Console(file=io.StringIO(), width=30)
    tables.show(console, [table, "below"], file_width=120)
    assert "k" * 100 in console.file.getvalue()  # type: ignore[attr-defined]
    assert console.file.getvalue().endswith("below\n")  # type: ignore[attr-defined]


def test_tables_without_a_gpu_fit_a_terminal_of_80_columns() -> None:
    rows = [row(**{**CASE, "format": name}, rotated_mb=1234.5, copies=1) for name in ("slot24", "tiled-csl")]
    counters = Counter(mma_sp_m16n8k32=487_424, global_read_bytes=188_580_000, barriers=24)
    counts = Counts.from_values(counters)
    parts = [*report.model_table(rows, roofline.find_gpu("h200")), *counts_table([(one, counts) for one in rows])]
    lines = shown(parts, 80)
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 80
    for number in ("1234.50", "188.58", "487,424"):
        assert sum(number in line for line in lines) == 2
