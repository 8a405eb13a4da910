# SPDX-License-Identifier: Apache-2.0
"""The figure of what pruning costs, and the table of docs/pruning.md, say what the rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.figures import quality
from flashllm.bench import quality_rows

REPOSITORY = Path(__file__).parents[2]
ROWS = sorted((REPOSITORY / "experiments" / "results" / "quality").glob("*-smollm2.jsonl"))


def test_document_has_the_table_of_the_rows() -> None:
    text = (REPOSITORY / "docs" / "pruning.md").read_text(encoding="utf-8")
    shown = text.split("<!-- quality -->\n")[1].split("<!-- end of quality -->")[0]
    table = quality.table(quality.load(REPOSITORY / "experiments"))
    assert shown == "".join(f"{line}\n" for line in table.splitlines() if line.startswith("|"))


def test_methods_come_in_the_order_of_the_literature() -> None:
    curves = quality.load(REPOSITORY / "experiments").pruned
    for zeros in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        assert curves["sparsegpt"][zeros] < curves["wanda"][zeros] < curves["magnitude"][zeros]
    for found in curves.values():
        assert list(found.values()) == sorted(found.values()), "more zeros, worse"


def test_rows_are_of_a_commit_and_checked() -> None:
    for file in ROWS[0].parent.glob("*.jsonl"):
        for row in quality_rows.read(file):
            assert row.commit is not None
            assert row.dirty is False
            assert row.check != "fail"


def test_the_newest_row_of_a_case_is_taken_and_trained_ones_are_apart(tmp_path: Path) -> None:
    row = next(r for r in quality_rows.read(ROWS[0]) if (r.method, r.sparsity) == ("wanda", 0.6))
    folder = tmp_path / "results" / "quality"
    folder.mkdir(parents=True)
    for name, made in (
        ("1-x-smollm2.jsonl", replace(row, ppl=5.0)),
        ("2-x-smollm2.jsonl", replace(row, ppl=4.0)),
        ("2-x-smollm2.jsonl", replace(row, ppl=3.0, finetuned_tokens=10)),
        ("2-x-smollm2.jsonl", replace(row, ppl=None, sparsity=0.9)),
        ("3-x-smollm2-packed.jsonl", replace(row, ppl=1.0)),
    ):
        quality_rows.append(folder / name, made)
    found = quality.load(tmp_path)
    assert found.dense is None
    assert found.pruned == {"wanda": {0.6: 4.0, 0.9: float("inf")}}
    assert found.trained == {"wanda": {0.6: 3.0}}
    text = quality.table(found)
    assert "| Wanda |  | 4.0 | inf |" in text
    assert "| Wanda, trained |  | 3.0 |  |" in text
    pytest.importorskip("matplotlib")
    assert set(quality.plot(found)) == {"quality-smollm2"}
