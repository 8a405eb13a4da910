# SPDX-License-Identifier: Apache-2.0
"""What `prune.json` may hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashllm.errors import FormatError
from flashllm.prune.record import RECORD, read_record, write_record

GOOD: dict[str, Any] = {
    "settings": {"method": "wanda", "ratios": "owl", "sparsity": 0.5}, "text": None, "seconds": 3, "device": "2 CPUs",
    "finetuned_tokens": 7, "blocks": {"0": {"zeros": 1, "elements": 2}}, "outliers": [0.1, 0], "more": "is left alone",
}  # fmt: skip


def test_there_and_back(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {}
    for record in (GOOD, {"finetuned_tokens": 1}, {}):
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"settings": 3}, "settings"),
        ({"settings": {"method": None}}, "settings.method"),
        ({"settings": {"sparsity": True}}, "settings.sparsity"),
        ({"text": 3}, "text"),
        ({"seconds": math.nan}, "seconds"),
        ({"device": None}, "device"),
        ({"finetuned_tokens": 1.5}, "finetuned_tokens"),
        ({"finetuned_tokens": 10**400}, "finetuned_tokens"),
        ({"blocks": []}, "blocks"),
        ({"blocks": {"0": 1}}, "blocks.0"),
        ({"blocks": {"0": {"zeros": 1}}}, "blocks.0"),
        ({"blocks": {"0": {"zeros": 1, "elements": None}}}, "blocks.0.elements"),
        ({"outliers": 3}, "outliers"),
        ({"outliers": [0.1, "0.2"]}, "outliers"),
    ],
)
def test_entries_that_are_wrong_are_named(tmp_path: Path, wrong: dict[str, Any], field: str) -> None:
    (tmp_path / RECORD).write_text(json.dumps({**GOOD, **wrong}))
    with pytest.raises(FormatError) as caught:
        read_record(tmp_path)
    assert (caught.value.field, caught.value.path) == (field, str(tmp_path / RECORD))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_content_that_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(FormatError, match=r"prune\.json: file"):
        read_record(tmp_path)
