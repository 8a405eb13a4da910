# SPDX-License-Identifier: Apache-2.0
"""Files of rows of `flashllm eval`: written whole, read back, and refused where they are damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashllm.bench import quality_rows
from flashllm.bench.quality_rows import QualityRow
from flashllm.errors import FormatError


def row(**changes: Any) -> QualityRow:
    values: dict[str, Any] = {
        "schema": 1, "kind": "quality", "run_id": "r", "time_utc": "2026-11-30T00:00:00Z", "commit": None,
        "dirty": None, "command": "flashllm eval", "backend": "numpy", "gpu": None, "model": "m",
        "model_type": "llama", "method": "wanda", "ratios": "owl", "sparsity": 0.5, "sparsity_real": 0.5,
        "calibration": "text 0:0.5", "prune_seconds": 1.5, "prune_device": "cpu", "finetuned_tokens": 0,
        "format": "dense", "dtype": "fp16", "text": "t", "text_sha256": "0" * 64, "windows": 8, "length": 512,
        "tokens": 4088, "ppl": 12.5, "bits_per_byte": 0.9, "seconds": 3.25, "logit_error": None,
        "logit_error_dense": None, "check": None,
    }  # fmt: skip
    return QualityRow(**{**values, **changes})


def test_rows_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    wanted = [row(), row(ppl=None, logit_error=0.25, check="pass"), row(sparsity=1, model="é \n")]
    for one in wanted:
        quality_rows.append(path, one)
    assert quality_rows.read(path) == wanted
    assert path.read_bytes().count(b"\n") == 3
    # A line that a crash has cut short is not a row, and is removed before the next one is added.
    with path.open("ab") as file:
        file.write(b'{"schema":1,')
    assert quality_rows.read(path) == wanted
    quality_rows.append(path, row())
    assert quality_rows.read(path) == [*wanted, row()]


def test_a_row_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        quality_rows.append(tmp_path / "rows", row(ppl=math.inf))
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "4088"), ("tokens", 1.5), ("tokens", True), ("tokens", None), ("ppl", "12"), ("ppl", False),
        ("ppl", math.nan), ("ppl", -math.inf), ("ppl", 10**400), ("seconds", None), ("text", 5), ("gpu", 1),
        ("dirty", 1), ("check", 0), ("schema", 2), ("kind", "kernel"), ("model", ["m"]),
    ],
)  # fmt: skip
def test_rows_that_are_damaged(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "rows"
    quality_rows.append(path, row())
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**dataclasses.asdict(row()), field: value}) + "\n")
    with pytest.raises(FormatError) as caught:
        quality_rows.read(path)
    assert caught.value.path == f"{path}:2"
    assert caught.value.field == ("schema" if field == "kind" else field)


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    whole = dataclasses.asdict(row())
    short = {key: value for key, value in whole.items() if key != "ppl"}
    twice = row().to_json()[:-1] + ',"ppl":1.0}'
    for line in ("", "{", "[]", "3", "\x00", "[" * 100000, json.dumps(short), json.dumps({**whole, "x": 1}), twice):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(FormatError) as caught:
            quality_rows.read(path)
        assert (caught.value.field, caught.value.path) == ("row", f"{path}:1")
    path.write_bytes(b'{"model":"\xff"}\n')
    with pytest.raises(FormatError, match="UTF-8"):
        quality_rows.read(path)
    with pytest.raises(FormatError, match="a regular file"):
        quality_rows.read(tmp_path)
