# SPDX-License-Identifier: Apache-2.0
"""``prune.json`` beside the weights: how a model was pruned, how far that has come, and how it was trained since."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashllm.errors import FormatError, brief
from flashllm.io.files import write_text
from flashllm.io.hf_directory import RECORD_NAME
from flashllm.io.safetensors_file import read_json

RECORD = RECORD_NAME
_MAX_BYTES = 1 << 24
_NUMBER = (int, float)
_NONE = type(None)
_ENTRIES: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,),
    "text": (str, _NONE),
    "seconds": (*_NUMBER, _NONE),
    "device": (str,),
    "finetuned_tokens": (int,),
    "blocks": (dict,),
    "outliers": (list,),
}
_SETTINGS: Mapping[str, tuple[type, ...]] = {"method": (str,), "ratios": (str,), "sparsity": _NUMBER}
_COUNTS: Mapping[str, tuple[type, ...]] = {"zeros": (int,), "elements": (int,)}


def read_record(directory: Path) -> dict[str, Any]:
    """The record in ``directory``, empty where there is none.

    Known entries have the type they are written with; any of them may be absent, except for the counts of a block.
    Raises a ``FormatError`` that names the entry, and ``OSError``.
    """
    path = directory / RECORD
    if not path.is_file():
        return {}
    record = read_json(path, most_bytes=_MAX_BYTES)
    _check(record, _ENTRIES, "", path)
    _check(record.get("settings", {}), _SETTINGS, "settings.", path)
    for layer, counts in record.get("blocks", {}).items():
        if not isinstance(counts, dict) or set(counts) != set(_COUNTS):
            expected = "an object of zeros and elements"
            raise FormatError(field=f"blocks.{layer}", expected=expected, got=brief(counts), path=str(path))
        _check(counts, _COUNTS, f"blocks.{layer}.", path)
    for index, share in enumerate(record.get("outliers", [])):
        _check({"outliers": share}, {"outliers": _NUMBER}, "", path, index)
    return record


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record: whole, or not at all."""
    write_text(directory / RECORD, json.dumps(dict(record), indent=1) + "\n")


def _check(
    values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str, path: Path, index: int | None = None
) -> None:
    for key, allowed in kinds.items():
        if key not in values:
            continue
        value = values[key]
        # A number may be NaN, or an integer too large for the float that arithmetic makes of it.
        finite = type(value) not in _NUMBER or abs(value) <= sys.float_info.max
        if not (type(value) in allowed and finite):
            expected = " or ".join("null" if kind is _NONE else kind.__name__ for kind in allowed)
            raise FormatError(
                field=where + key, index=index, expected=expected + (", finite" if not finite else ""),
                got=brief(value), path=str(path),
            )  # fmt: skip
