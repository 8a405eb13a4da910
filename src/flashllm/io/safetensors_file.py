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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import FormatError, brief
from flashllm.formats.base import DType
from flashllm.formats.bits import bfloat16
from flashllm.io.files import open_regular, read_utf8, replacing

MAX_HEADER_BYTES = 32 << 20
"""Parsed JSON takes up to 25 times the memory of its text; a model of 100,000 tensors has a header of 10 MB."""
_MAX_RANK = 64  # NumPy's limit
_MAX_ELEMENTS = 2**60 - 1
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
}
_READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U32": "<u4", "I32": "<i4", "U16": "<u2", "U8": "|u1"}
DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "uint16": "U16",
    "uint8": "U8",
}
"""Names of the NumPy dtypes that are written, as the layout spells them."""
LAYOUT_NAMES: Mapping[DType, str] = {"fp16": "F16", "bf16": "BF16"}
"""Names of the value types of weights, as the layout spells them."""


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


class TensorFile:
    """An open file; use it in a ``with`` block.

    Header and tensors come from the same file even if another process replaces it in the meantime.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and check its header. Raises ``FormatError``, or ``OSError`` for an unreadable file."""
        self._file = open_regular(path)
        try:
            self.header = _read_header(self._file, str(path))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, entry: TensorEntry, *, mmap: bool = False) -> NDArray[Any]:
        """The tensor, copied to memory or (``mmap``) mapped read-only; BF16 comes as ml_dtypes.bfloat16."""
        path = self.header.path
        if entry.dtype != "BF16" and entry.dtype not in _READABLE:
            expected = ", ".join([*_READABLE, "BF16"])
            raise FormatError(field=f"{entry.name}.dtype", expected=expected, got=entry.dtype, path=path)
        dtype = bfloat16() if entry.dtype == "BF16" else np.dtype(_READABLE[entry.dtype])
        size = entry.stop - entry.start
        if size == 0:
            return np.empty(entry.shape, dtype)
        if mmap:
            # The start can be any byte in a file of mixed types; NumPy copes, and our own containers keep
            # 8-byte alignment.
            raw = np.memmap(self._file, np.uint8, "r", entry.start, (size,))
            return np.asarray(raw).view(dtype).reshape(entry.shape)
        self._file.seek(entry.start)
        flat = np.fromfile(self._file, np.uint8, size)
        if flat.size != size:
            raise FormatError(field=entry.name, expected=f"{size} bytes", got=f"{flat.size} bytes", path=path)
        return flat.view(dtype).reshape(entry.shape)


def read_header(path: str | Path) -> Header:
    """The checked header of ``path``. Raises ``FormatError``, or ``OSError`` for an unreadable file."""
    with TensorFile(path) as file:
        return file.header


def parse_json(text: str, *, field: str, path: str) -> dict[str, Any]:
    """The JSON object in ``text``, in which no name may occur twice. Raises ``FormatError``."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(field=field, expected="a JSON object", got=str(error), path=path) from error
    if not isinstance(value, dict):
        raise FormatError(field=field, expected="a JSON object", got=type(value).__name__, path=path)
    return value


def read_json(path: str | Path, *, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises ``FormatError`` for anything else and for a larger file, and ``OSError``."""
    return parse_json(read_utf8(path, most_bytes=most_bytes), field="file", path=str(path))


def _read_header(file: BinaryIO, where: str) -> Header:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise FormatError(field="file", expected="at least 8 bytes", got=str(size), path=where)
    length = int.from_bytes(file.read(8), "little")
    limit = min(size - 8, MAX_HEADER_BYTES)
    if not 2 <= length <= limit:
        raise FormatError(field="header length", expected=f"2..{limit}", got=str(length), path=where)
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x}"
        raise FormatError(field="header", index=error.start, expected="UTF-8", got=got, path=where) from error
    header = parse_json(text, field="header", path=where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(field="__metadata__", expected="a map of strings", got=brief(metadata), path=where)
    tensors = {name: _entry(name, value, 8 + length, size, where) for name, value in header.items()}
    _check_layout(tensors, 8 + length, size, where)
    return Header(path=where, metadata=metadata, tensors=tensors)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"the name {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} more than once")
    return out


def _entry(name: str, value: Any, base: int, size: int, path: str) -> TensorEntry:
    def bad(part: str, expected: str, got: Any) -> NoReturn:
        raise FormatError(field=f"{name}.{part}" if part else name, expected=expected, got=brief(got), path=path)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad("", "an object of dtype, shape and data_offsets", value)
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        bad("dtype", f"one of {', '.join(sorted(ITEM_BYTES))}", dtype)
    if not isinstance(shape, list) or not all(_is_size(d) for d in shape):
        bad("shape", "a list of non-negative integers", shape)
    if len(shape) > _MAX_RANK:
        bad("shape", f"at most {_MAX_RANK} dimensions", f"{len(shape)} dimensions")
    # Zeros are left out, as in NumPy's own limit.
    if max(shape, default=0) > _MAX_ELEMENTS or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        bad("shape", "fewer than 2^60 elements", shape)
    if not isinstance(span, list) or len(span) != 2 or not all(_is_size(d) for d in span):
        bad("data_offsets", "two non-negative integers", span)
    if not span[0] <= span[1] <= size - base:
        bad("data_offsets", f"rising and at most {size - base}", span)
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if span[1] - span[0] != wanted:
        bad("data_offsets", f"{wanted} bytes for {dtype} {brief(shape)}", span)
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


def write_file(path: str | Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a file so that ``path`` holds either what it held before or the whole new content."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Writing wide types first keeps every tensor aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, array in ordered:
            file.write(bytes_of(array))


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The elements of ``array`` in row-major order, without a copy where it is stored so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
