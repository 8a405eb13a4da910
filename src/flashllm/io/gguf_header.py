# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file, checked: metadata, and where each tensor lies.

The layout of GGUF versions 2 and 3, little-endian: ``GGUF``, version, number of tensors and of metadata entries; the
entries, each a key, a type and a value; for each tensor its name, dimensions (the fastest first), type and offset; then
the tensors' data, each at a multiple of the alignment. Every number here is only the file's claim, so each is checked
against what is left of the file before it is used, and the memory that the header may take is bounded.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np

from flashllm.errors import FormatError, brief

MAX_HEADER_BYTES = 64 << 20
"""Limit for metadata and tensor descriptions; a vocabulary of 256,000 tokens with its merges takes about 12 MB."""
MAX_STRINGS = 1 << 21
"""Limit for all arrays of strings together."""
_MAX_ENTRIES = 1 << 16
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 255  # llama.cpp itself allows 63
_MAX_RANK = 4
_MAX_ELEMENTS = 2**60
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_ITEM_BYTES = {kind: np.dtype(name).itemsize for kind, name in _SCALARS.items()}


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How a type stores numbers: ``block`` consecutive numbers of a row take ``size`` bytes."""

    code: int
    """The number of the type in the file."""
    block: int
    size: int


TYPES: Mapping[str, Quantity] = {
    "F32": Quantity(code=0, block=1, size=4),
    "F16": Quantity(code=1, block=1, size=2),
    "Q4_0": Quantity(code=2, block=32, size=18),
    "Q4_1": Quantity(code=3, block=32, size=20),
    "Q8_0": Quantity(code=8, block=32, size=34),
    "Q6_K": Quantity(code=14, block=256, size=210),
    "BF16": Quantity(code=30, block=1, size=2),
}
"""The tensor types that can be read."""
_KNOWN = {quantity.code: name for name, quantity in TYPES.items()}
_UNREAD = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor as the file describes it."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in NumPy; the file has them the other way round."""
    type: str
    """A name of ``TYPES``."""
    start: int
    """Byte position in the file."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """The checked header of a file."""

    path: str
    version: int
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings as in Python; arrays of strings are tuples, arrays of numbers NumPy arrays."""
    tensors: Mapping[str, GgufTensor]
    """In the order of the file's descriptions."""


def read_gguf_header(file: BinaryIO, path: str) -> GgufHeader:
    """The header of an open file. Raises a ``FormatError`` that names ``path`` and the field."""
    size = os.fstat(file.fileno()).st_size
    if size < 24:
        raise FormatError(field="file", expected="at least 24 bytes", got=str(size), path=path)
    # Mapped: what follows the header is never touched.
    with mmap.mmap(file.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as view:
        cursor = _Cursor(view, path)
        version = _version(cursor)
        tensor_count = cursor.count("tensor count", _MAX_ENTRIES, 24)
        entry_count = cursor.count("metadata count", _MAX_ENTRIES, 13)
        metadata = _metadata(cursor, entry_count)
        alignment = _alignment(metadata, path)
        described = [_description(cursor, index) for index in range(tensor_count)]
        end = cursor.position
    base = end + -end % alignment
    tensors = _place(described, base=base, size=size, alignment=alignment, path=path)
    return GgufHeader(path=path, version=version, metadata=metadata, tensors=tensors)


class _Cursor:
    """Reads values one after the other, but nothing beyond the end."""

    def __init__(self, view: mmap.mmap, path: str) -> None:
        self._view, self._path = view, path
        self.position = 0
        self._strings = 0

    def bad(self, field: str, expected: str, got: object) -> NoReturn:
        shown = got if isinstance(got, str) else brief(got)
        raise FormatError(field=field, expected=expected, got=shown, path=self._path)

    def take(self, length: int, field: str) -> bytes:
        """The next ``length`` bytes."""
        left = len(self._view) - self.position
        if length > left:
            self.bad(field, f"at most the {left:,} bytes left of the header", f"{length:,} bytes")
        self.position += length
        return self._view[self.position - length : self.position]

    def number(self, kind: int, field: str) -> Any:
        """A scalar of type ``kind``."""
        value = np.frombuffer(self.take(_ITEM_BYTES[kind], field), _SCALARS[kind])[0].item()
        if kind == _BOOL:
            if value not in (0, 1):
                self.bad(field, "a boolean, 0 or 1", value)
            return bool(value)
        return value

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def count(self, field: str, most: int, item_bytes: int) -> int:
        """A number of items that take at least ``item_bytes`` each."""
        found = self.u64(field)
        most = min(most, (len(self._view) - self.position) // item_bytes)
        if found > most:
            self.bad(field, f"at most {most:,}, as fit into the header", f"{found:,}")
        return found

    def string(self, field: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(field)
        if length > most:
            self.bad(field, f"a string of at most {most:,} bytes", f"{length:,}")
        raw = self.take(length, field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.bad(field, "UTF-8", f"byte {raw[error.start]:#04x} at {error.start}")

    def array(self, field: str) -> Any:
        kind = self.u32(field)
        if kind == _STRING:
            return self._strings_of(field)
        if kind not in _SCALARS:
            got = "an array in an array" if kind == _ARRAY else f"type {kind}"
            self.bad(field, "an array of numbers, booleans or strings", got)
        count = self.count(field, MAX_HEADER_BYTES, _ITEM_BYTES[kind])
        values = np.frombuffer(self.take(count * _ITEM_BYTES[kind], field), _SCALARS[kind])
        if kind == _BOOL:
            if values.size and values.max() > 1:
                self.bad(field, "booleans, 0 or 1", int(values.max()))
            return values.view(np.bool_)
        return values

    def _strings_of(self, field: str) -> tuple[str, ...]:
        count = self.count(field, MAX_STRINGS - self._strings, 8)
        self._strings += count
        # Reading token by token with `string` would take a second for a large vocabulary.
        view, position, end = self._view, self.position, len(self._view)
        length_at = struct.Struct("<Q").unpack_from
        out: list[str] = []
        for index in range(count):
            start = position + 8
            stop = start + length_at(view, position)[0] if start <= end else end + 1
            if stop > end:
                self.bad(f"{field}[{index}]", f"a string in the {max(0, end - start):,} bytes left", "a longer one")
            try:
                out.append(str(view[start:stop], "utf-8"))
            except UnicodeDecodeError as error:
                self.bad(f"{field}[{index}]", "UTF-8", f"byte {error.object[error.start]:#04x} at {error.start}")
            position = stop
        self.position = position
        return tuple(out)


def _version(cursor: _Cursor) -> int:
    magic = cursor.take(4, "magic")
    if magic != _MAGIC:
        cursor.bad("magic", repr(_MAGIC), magic)
    version = cursor.u32("version")
    if version not in _VERSIONS:
        got = str(version)
        if version & 0xFFFF == 0 and version:
            got = "a big-endian file"
        cursor.bad("version", "2 or 3, little-endian", got)
    return version


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"metadata[{index}].key", _MAX_KEY_BYTES)
        if not key or key in out:
            cursor.bad(f"metadata[{index}].key", "distinct, non-empty keys", key)
        kind = cursor.u32(f"{key}: type")
        if kind == _STRING:
            out[key] = cursor.string(key)
        elif kind == _ARRAY:
            out[key] = cursor.array(key)
        elif kind in _SCALARS:
            out[key] = cursor.number(kind, key)
        else:
            cursor.bad(f"{key}: type", "a type of 0 to 12", kind)
    return out


def _alignment(metadata: Mapping[str, Any], path: str) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            field="general.alignment", expected=f"a power of two up to {_MAX_ALIGNMENT:,}", got=brief(value), path=path
        )
    return value


def _description(cursor: _Cursor, index: int) -> GgufTensor:
    """Tensor ``index`` as described; ``start`` still counts from the start of the data."""
    field = f"tensors[{index}]"
    name = cursor.string(f"{field}.name", _MAX_NAME_BYTES)
    if not name:
        cursor.bad(f"{field}.name", "a name", "none")
    rank = cursor.u32(f"{name}: dimensions")
    if not 1 <= rank <= _MAX_RANK:
        cursor.bad(f"{name}: dimensions", f"1 to {_MAX_RANK}", rank)
    sizes = [cursor.u64(f"{name}: shape") for _ in range(rank)]
    code = cursor.u32(f"{name}: type")
    offset = cursor.u64(f"{name}: offset")
    if code not in _KNOWN:
        got = _UNREAD.get(code, f"type {code}")
        cursor.bad(f"{name}: type", f"one of {', '.join(TYPES)}", got)
    if min(sizes) < 1 or math.prod(sizes) >= _MAX_ELEMENTS:
        cursor.bad(f"{name}: shape", "positive dimensions, fewer than 2^60 elements", sizes)
    kind = TYPES[_KNOWN[code]]
    if sizes[0] % kind.block:
        cursor.bad(f"{name}: shape", f"rows of a multiple of {kind.block} elements, as {_KNOWN[code]} has", sizes[0])
    nbytes = math.prod(sizes) // kind.block * kind.size
    return GgufTensor(name=name, shape=tuple(reversed(sizes)), type=_KNOWN[code], start=offset, nbytes=nbytes)


def _place(described: list[GgufTensor], *, base: int, size: int, alignment: int, path: str) -> dict[str, GgufTensor]:
    """The tensors by name, with positions in the file."""
    tensors: dict[str, GgufTensor] = {}
    for tensor in described:
        field = f"{tensor.name}: offset"
        if tensor.name in tensors:
            raise FormatError(field=tensor.name, expected="names given once", got="twice", path=path)
        if tensor.start % alignment:
            expected = f"a multiple of the alignment, {alignment}"
            raise FormatError(field=field, expected=expected, got=str(tensor.start), path=path)
        start = base + tensor.start
        if start + tensor.nbytes > size:
            expected = f"an end in the {size:,} bytes of the file"
            raise FormatError(field=field, expected=expected, got=f"{start + tensor.nbytes:,}", path=path)
        tensors[tensor.name] = GgufTensor(
            name=tensor.name, shape=tensor.shape, type=tensor.type, start=start, nbytes=tensor.nbytes
        )
    end, before = base, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            expected = f"a start after {before}, at {end - base:,} or later"
            raise FormatError(
                field=f"{tensor.name}: offset", expected=expected, got=f"{tensor.start - base:,}", path=path
            )
        end, before = tensor.start + tensor.nbytes, tensor.name
    return tensors
