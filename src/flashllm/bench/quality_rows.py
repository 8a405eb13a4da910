# SPDX-License-Identifier: Apache-2.0
"""Rows of how well a model predicts a text: their fields, and files of them (JSON Lines)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from flashllm.bench import results
from flashllm.errors import FormatError, brief
from flashllm.io.files import open_regular
from flashllm.io.safetensors_file import parse_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One evaluation. ``None``: does not apply, or is not known."""

    schema: int
    kind: str
    """``quality``."""
    run_id: str
    time_utc: str
    commit: str | None
    dirty: bool | None
    command: str
    backend: str
    """``numpy``, ``cuda``, or what multiplied packed matrices on the CPU: ``reference``, ``emulator``."""
    gpu: str | None
    model: str
    """Name of its directory or file."""
    model_type: str
    method: str | None
    """What pruned it; ``none`` for a model as it came."""
    ratios: str | None
    sparsity: float | None
    """Fraction of zeros asked for."""
    sparsity_real: float
    """Of the linear layers of blocks."""
    calibration: str | None
    """Text that it was pruned with, and its part."""
    prune_seconds: float | None
    """That pruning took, on ``prune_device``."""
    prune_device: str | None
    """The GPU's name, or ``2 CPUs``."""
    finetuned_tokens: int
    """Trained on since, with the zeros fixed."""
    format: str
    """``dense``, or formats of the packed matrices, with commas."""
    dtype: str
    text: str
    """Name of the file and its part."""
    text_sha256: str
    """Of the tokens of all windows, as little-endian int64."""
    windows: int
    length: int
    tokens: int
    """Predicted."""
    ppl: float | None
    """``None`` where it is no float."""
    bits_per_byte: float | None
    """``None`` where it is no float."""
    seconds: float
    logit_error: float | None
    """Largest difference to logits in float64 of the same weights, over one window; ``None`` where it is no float."""
    logit_error_dense: float | None
    """The same of dense 16-bit products."""
    check: str | None
    """``pass`` where ``logit_error`` is a float and at most twice ``logit_error_dense``, else ``fail``."""

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":"))


def append(path: Path, row: QualityRow) -> None:
    """Add ``row`` to a file, as :func:`flashllm.bench.results.append` does. Raises ``OSError``."""
    results.append(path, cast(Any, row))  # of a row it needs its line alone


def read(path: Path) -> list[QualityRow]:
    """Rows of a file, in order; a last line that a crash has cut short is left out.

    Raises ``FormatError`` that names line and field, ``OSError``.
    """
    with open_regular(path) as file:
        lines = file.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(field="row", expected="UTF-8", got=str(error.reason), path=where) from error
        rows.append(_row(parse_json(text, field="row", path=where), where))
    return rows


def _row(given: dict[str, Any], where: str) -> QualityRow:
    hints = get_type_hints(QualityRow)
    names = {field.name for field in fields(QualityRow)}
    if set(given) != names:
        got = brief(sorted(set(given) ^ names))
        raise FormatError(field="row", expected="the fields of a quality row", got=got, path=where)
    for name, value in given.items():
        kinds = get_args(hints[name]) or (hints[name],)
        # bool is an int to Python, never here; an int is a fine float.
        if not (type(value) in kinds or (float in kinds and type(value) is int)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise FormatError(field=name, expected=expected, got=brief(value), path=where)
        # An integer may be too large for the float that arithmetic makes of it.
        if type(value) in (int, float) and not abs(value) <= sys.float_info.max:
            raise FormatError(field=name, expected="a finite number", got=brief(value), path=where)
    if given["schema"] != SCHEMA or given["kind"] != "quality":
        got = f"schema {brief(given['schema'])}, kind {brief(given['kind'])}"
        raise FormatError(field="schema", expected=f"{SCHEMA}, kind quality", got=got, path=where)
    return QualityRow(**given)
