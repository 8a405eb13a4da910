# SPDX-License-Identifier: Apache-2.0
"""Files of rows (JSON Lines) whose fields are those of a dataclass, each of the declared type."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from flashllm.bench import results
from flashllm.errors import FormatError, brief
from flashllm.io.files import open_regular
from flashllm.io.safetensors_file import parse_json

RowType = TypeVar("RowType")


class FlatRow:
    """Base of rows: dataclasses whose fields JSON can hold."""

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(cast(Any, self)), allow_nan=False, separators=(",", ":"))


def append(path: Path, row: FlatRow) -> None:
    """Add ``row`` to a file, as :func:`flashllm.bench.results.append` does. Raises ``OSError``."""
    results.append(path, cast(Any, row))  # all it needs of a row is its line


def read(path: Path, made: type[RowType], *, schema: int, kind: str) -> list[RowType]:
    """Rows of a file, in order; a last line that a crash has cut short is left out.

    Raises ``FormatError``, which names the line and the field, and ``OSError``.
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
        given = parse_json(text, field="row", path=where)
        _check(given, made, kind, where)
        if given["schema"] != schema or given["kind"] != kind:
            got = f"schema {brief(given['schema'])}, kind {brief(given['kind'])}"
            raise FormatError(field="schema", expected=f"{schema}, kind {kind}", got=got, path=where)
        rows.append(made(**given))
    return rows


def _check(given: dict[str, Any], made: type[Any], kind: str, where: str) -> None:
    hints = get_type_hints(made)
    names = {field.name for field in fields(made)}
    if set(given) != names:
        got = brief(sorted(set(given) ^ names))
        raise FormatError(field="row", expected=f"the fields of a row of kind {kind}", got=got, path=where)
    for name, value in given.items():
        kinds = get_args(hints[name]) or (hints[name],)
        # To Python a bool is an int; here it is not. An int may stand for a float.
        if not (type(value) in kinds or (float in kinds and type(value) is int)):
            expected = " or ".join(one.__name__ for one in kinds)
            raise FormatError(field=name, expected=expected, got=brief(value), path=where)
        # An integer may be too large for the float that arithmetic makes of it.
        if type(value) in (int, float) and not abs(value) <= sys.float_info.max:
            raise FormatError(field=name, expected="a finite number", got=brief(value), path=where)
