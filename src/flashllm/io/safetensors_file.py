# SPDX-License-Identifier: Apache-2.0
"""Strict reading and atomic writing of the safetensors layout.

The layout: 8 bytes of little-endian header length, a JSON header, then the tensors without gaps. The
header is checked against the size of the file before anything is allocated; errors name the file and the
entry; tensors can be mapped instead of read, and are written straight from their arrays.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError
from flashllm.formats.bits import bfloat16

MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
}
_READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U32": "<u4", "I32": "<i4"}
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``stop`` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The checked header of a file."""

    path: str
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def read_header(path: str | Path) -> Header:
    """The checked header of ``path``. Raises ``FormatError``, or ``OSError`` for an unreadable file."""
    where = str(path)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise FormatError(field="file", expected="at least 8 bytes", got=str(size), path=where)
        length = int.from_bytes(file.read(8), "little")
        limit = min(size - 8, MAX_HEADER_BYTES)
        if not 2 <= length <= limit:
            raise FormatError(field="header length", expected=f"2..{limit}", got=str(length), path=where)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(field="header", expected="a JSON object in UTF-8", got=str(error), path=where) from error
    if not isinstance(header, dict):
        raise FormatError(field="header", expected="a JSON object", got=type(header).__name__, path=where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(field="__metadata__", expected="a map of strings", got=_short(metadata), path=where)
    tensors = {name: _entry(name, value, 8 + length, size, where) for name, value in header.items()}
    _check_layout(tensors, 8 + length, size, where)
    return Header(path=where, metadata=metadata, tensors=tensors)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name that occurs twice")
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _entry(name: str, value: Any, base: int, size: int, path: str) -> TensorEntry:
    def bad(part: str, expected: str, got: Any) -> NoReturn:
        raise FormatError(field=f"{name}.{part}" if part else name, expected=expected, got=_short(got), path=path)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad("", "an object of dtype, shape and data_offsets", value)
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        bad("dtype", f"one of {', '.join(sorted(_ITEM_BYTES))}", dtype)
    if not isinstance(shape, list) or not all(_is_size(d) for d in shape):
        bad("shape", "a list of non-negative integers", shape)
    if not isinstance(span, list) or len(span) != 2 or not all(_is_size(d) for d in span):
        bad("data_offsets", "two non-negative integers", span)
    if not span[0] <= span[1] <= size - base:
        bad("data_offsets", f"rising and at most {size - base}", span)
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    if span[1] - span[0] != wanted:
        bad("data_offsets", f"{wanted} bytes for {dtype} {_short(shape)}", span)
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), start=base + span[0], stop=base + span[1])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_layout(tensors: dict[str, TensorEntry], base: int, size: int, path: str) -> None:
    end = base
    for entry in sorted(tensors.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            expected = f"a start at {end - base}, without gap or overlap"
            raise FormatError(
                field=f"{entry.name}.data_offsets", expected=expected, got=str(entry.start - base), path=path
            )
        end = entry.stop
    if end != size:
        raise FormatError(field="file", expected=f"{end} bytes, as the header says", got=str(size), path=path)


def read_tensor(header: Header, entry: TensorEntry, *, mmap: bool = False) -> NDArray[Any]:
    """The tensor, copied to memory or (``mmap``) mapped read-only; BF16 comes as ml_dtypes.bfloat16."""
    if entry.dtype != "BF16" and entry.dtype not in _READABLE:
        expected = ", ".join([*_READABLE, "BF16"])
        raise FormatError(field=f"{entry.name}.dtype", expected=expected, got=entry.dtype, path=header.path)
    dtype = bfloat16() if entry.dtype == "BF16" else np.dtype(_READABLE[entry.dtype])
    if entry.stop == entry.start:
        return np.empty(entry.shape, dtype)
    if mmap:
        # The start can be any byte in a file of mixed types; NumPy copes, and our own containers keep
        # 8-byte alignment.
        raw = np.memmap(header.path, np.uint8, "r", entry.start, (entry.stop - entry.start,))
        return np.asarray(raw).view(dtype).reshape(entry.shape)
    count = (entry.stop - entry.start) // dtype.itemsize
    with Path(header.path).open("rb") as file:
        file.seek(entry.start)
        flat = np.fromfile(file, np.uint8, entry.stop - entry.start)
    if flat.size != count * dtype.itemsize:
        raise FormatError(field=entry.name, expected=f"{count} items", got="a shorter file", path=header.path)
    return flat.view(dtype).reshape(entry.shape)


def write_file(path: str | Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a file so that ``path`` holds either what it held before or the whole new content."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide types first keeps every tensor aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, array in ordered:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)
