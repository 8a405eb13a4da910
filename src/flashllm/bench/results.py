# SPDX-License-Identifier: Apache-2.0
"""Rows of results: their fields, types and values, and files of them (JSON Lines)."""

from __future__ import annotations

import csv
import json
import os
import stat
import sys
import tempfile
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashllm.errors import FormatError, brief
from flashllm.io.files import locked
from flashllm.registry import FORMATS

SCHEMA = 1
_BEGINNING = b'{"'  # of every line
_FIRST_FIELD = b'{"schema"'  # of lines that `append` writes
_LARGEST = sys.float_info.max

_VALUES: dict[str, tuple[str, ...]] = {
    "kind": ("kernel", "e2e", "quality", "encode"),
    "dtype": ("fp16", "bf16"),
    "pattern": ("uniform", "row-equal", "per-row", "skewed", "columns", "block", "2:4", "file"),
    # How the kernel was chosen; with "-format", `auto` chose the format too, else it was named.
    "choice": ("auto", "tuned", "forced", "auto-format", "tuned-format"),
    "l2": ("cold", "warm"),
    "launch": ("graph", "graph-pdl", "stream"),
    "check": ("pass", "fail"),
}


_OTHER_FORMATS = ("dense", "csr", "2:4", "2:4+csr", "tca-bme", "int4", "fp8")  # of the systems we compare with


def _allowed(field: str) -> tuple[str, ...] | None:
    """The values that ``field`` may have, or ``None`` for any."""
    return (*_OTHER_FORMATS, *FORMATS) if field == "format" else _VALUES.get(field)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. ``None`` means: does not apply, or could not be read on this machine.

    Times are microseconds of one launch, bytes are bytes, ``*_gbps`` 10^9 bytes per second, ``tflops``
    counted as if W were dense. Without a GPU every time is ``None``.
    """

    schema: int
    kind: str
    run_id: str
    sweep_id: str
    time_utc: str
    commit: str | None
    dirty: bool | None
    command: str
    backend: str
    gpu: str | None
    arch: str | None
    sm_count: int | None
    driver: str | None
    cuda: str | None
    cupy: str | None
    cublas: str | None
    sm_mhz: int | None
    temp_c: int | None
    power_w: float | None
    model: str | None
    layer: str | None
    M: int
    K: int
    N: int
    dtype: str
    sparsity: float | None
    """Requested fraction of zeros; ``None`` for a file. Dense systems run on the sparsest matrix."""
    sparsity_real: float
    pattern: str
    seed: int
    system: str
    format: str
    kernel: str
    choice: str
    deterministic: bool | None
    l2: str | None
    launch: str | None
    copies: int
    rotated_mb: float
    read_gbps: float | None
    bytes: int
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    min_us: float | None
    launches: int
    tflops: float | None
    gbps: float | None
    roofline_fraction: float | None
    cublas_us: float | None
    speedup: float | None
    max_err_over_bound: float | None
    """Largest error in units of the promised bound; ``None``, with ``check`` = fail, if it is not finite."""
    reference: str
    check: str

    def __post_init__(self) -> None:
        validate(asdict(self))

    def to_json(self) -> str:
        """The row as one line of JSON, without the line end."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":"))


@lru_cache(maxsize=1)
def _types() -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(Row)
    found: dict[str, tuple[type, ...]] = {}
    for field in fields(Row):
        hint = hints[field.name]
        found[field.name] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return found


def validate(row: dict[str, Any], *, where: str | None = None) -> None:
    """Check that ``row`` has every field of the schema and no other, each of its type and with an allowed value.

    Raises :class:`FormatError`; ``where`` (a file and line) is put in front of the message.
    """

    def refuse(field: str, expected: str, got: str) -> None:
        raise FormatError(path=where, field=field, expected=expected, got=got)

    expected_types = _types()
    if row.get("schema") != SCHEMA:
        refuse("schema", str(SCHEMA), brief(row.get("schema")))
    for field in expected_types.keys() - row.keys():
        refuse(field, "a value", "no such field")
    for field in row.keys() - expected_types.keys():
        refuse(field, "only fields of the schema", "an unknown field")
    for field, allowed in expected_types.items():
        value = row[field]
        # To Python a bool is an int; to this schema it is not. An int may stand for a float.
        good = type(value) in allowed or (float in allowed and type(value) is int)
        if not good:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            refuse(field, names, brief(value))
        # An integer may be too large for the float that arithmetic makes of it.
        if type(value) in (int, float) and not abs(value) <= _LARGEST:
            refuse(field, "a finite number", brief(value))
        values = _allowed(field)
        if value is not None and values is not None and value not in values:
            refuse(field, f"one of {', '.join(values)}", brief(value))
    if min(row["M"], row["K"], row["N"]) < 1:
        refuse("M, K, N", "positive integers", f"{row['M']}, {row['K']}, {row['N']}")


def from_dict(row: dict[str, Any], *, where: str | None = None) -> Row:
    """A :class:`Row` from its JSON object. Raises :class:`FormatError`."""
    validate(row, where=where)
    return Row(**row)


def ensure_writable(path: Path) -> None:
    """Raise ``OSError`` now, not after the first measurement, if the file cannot be written; make an absent folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No file of that name is made: a run that ends before its first row leaves no empty file.
    with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
        pass


def ensure_rows(path: Path) -> None:
    """As :func:`ensure_writable`, for a file that rows are added to. Raises ``FormatError`` for any other file."""
    ensure_writable(path)
    if path.is_file():  # not a pipe or a terminal
        with path.open("rb") as file:
            _check_beginning(file.read(len(_BEGINNING)), path)


def append(path: str | Path, row: Row) -> None:
    """Add ``row`` to the file, made if absent: one write of one whole line, on disk before this returns.

    Processes may add to one file at the same time. A torn line left there by a crash is removed first. Raises
    ``OSError``, and ``FormatError`` for a last line without its line end that is none of ours.
    """
    data = (row.to_json() + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with locked(handle):
            end = os.fstat(handle).st_size
            if end and os.pread(handle, 1, end - 1) != b"\n":
                end = _cut_torn_line(handle, path)
            if os.write(handle, data) != len(data):
                os.ftruncate(handle, end)
                raise OSError(f"{path}: the disk is full, a row was cut short")
            if stat.S_ISREG(os.fstat(handle).st_mode):  # a pipe or a device is on no disk, and Linux says so
                os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | Path) -> list[Row]:
    """Kernel rows of one file, in order; rows of another ``kind`` are skipped.

    A last line without its line end was cut short by a crash and is left out. Raises :class:`FormatError`
    (file, line, field) for anything else that is not a row, and ``OSError`` when the file cannot be read.
    """
    return [row for _, row in read_numbered(path)]


def read_numbered(path: str | Path) -> list[tuple[int, Row]]:
    """As :func:`read`, each row with the number of its line."""
    data = Path(path).read_bytes()
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(path=where, field="line", expected="a JSON object", got=str(error)) from error
        if not isinstance(value, dict):
            raise FormatError(path=where, field="line", expected="a JSON object", got=type(value).__name__)
        if value.get("kind", "kernel") == "kernel":
            rows.append((number, from_dict(value, where=where)))
    return rows


def drop_torn_line(path: str | Path) -> bool:
    """Cut off a last line that a crash left without its line end; say whether there was one.

    Raises ``FormatError`` where that line, or the file, does not begin as rows do: nothing else is ever cut.
    """
    with Path(path).open("r+b") as file, locked(file.fileno()):  # without the lock, another's row may be half written
        return os.fstat(file.fileno()).st_size > _cut_torn_line(file.fileno(), path)


def _cut_torn_line(handle: int, path: str | Path) -> int:
    """Cut the open file after its last line end and return its new size."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - (1 << 16))
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        _check_beginning(os.pread(handle, len(_BEGINNING), 0), path)
        torn = os.pread(handle, len(_BEGINNING if end else _FIRST_FIELD), end)
        if torn[:1] != b"\0":  # what some file systems leave after a power failure
            _check_beginning(torn, path, expected=_BEGINNING if end else _FIRST_FIELD)
        os.ftruncate(handle, end)
        os.fsync(handle)
    return end


def _check_beginning(found: bytes, path: str | Path, *, expected: bytes = _BEGINNING) -> None:
    if expected[: len(found)] != found:
        what = f"rows of results, lines that begin with {expected.decode()}"
        raise FormatError(path=str(path), field="file", expected=what, got=repr(found))


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` as CSV with a header line; ``None`` becomes an empty cell."""
    # A file name that is not UTF-8 may be in the command line and the layer; JSON escapes it too.
    with Path(path).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row))


Key = tuple[Any, ...]


def case_key(row: Row) -> Key:
    """What makes two rows measurements of the same thing, on whatever machine and at whatever time."""
    return (
        row.system,
        row.format,
        row.backend,
        row.model,
        row.layer,
        row.M,
        row.K,
        row.N,
        row.dtype,
        *zeros_key(row),
        row.pattern,
        row.seed,
        row.l2,
        row.launch,
        row.kernel if row.system == "flashllm-ablation" else None,
    )


def zeros_key(row: Row) -> tuple[float | None, float | None]:
    """The requested fraction of zeros or, for a file, the actual one: another file may have the same name."""
    return row.sparsity, row.sparsity_real if row.sparsity is None else None


def latest(rows: Sequence[Row]) -> list[Row]:
    """Only the last of the rows with the same :func:`case_key` on the same GPU model, in order."""
    last: dict[Key, Row] = {}
    for row in rows:
        key = (row.gpu, *case_key(row))
        last.pop(key, None)
        last[key] = row
    return list(last.values())
