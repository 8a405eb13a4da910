# SPDX-License-Identifier: Apache-2.0
"""Mutations of scipy ``.npz`` and NumPy ``.npy`` files."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.matrices import read_matrix
from hostile import TRAP, Container, Table, changed

_MASK = np.random.default_rng(5).random((30, 50)) < 0.2
_MASK[4, :5] = True
_DENSE = np.where(_MASK, np.arange(1500).reshape(30, 50) % 50 + 1, 0).astype(np.float32)
_CSR = sp.csr_array(_DENSE)
_CSC = sp.csc_array(_DENSE)
_COO = sp.coo_array(_DENSE)
_U64, _I64 = np.uint64, np.int64


def header(text: str | bytes, *, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """An .npy header with any text; ``length`` is the length that it states for itself."""
    raw = text if isinstance(text, bytes) else text.encode("latin-1")
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes(version) + size.to_bytes(2 if version[0] == 1 else 4, "little") + raw


def describe(descr: str = "'<f4'", shape: str = "(4, 4)", *, fortran: str = "False", **more: Any) -> bytes:
    """An .npy header with a dtype and a shape given as source text."""
    return header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n", **more)


def npy(array: Any) -> bytes:
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array))
    return file.getvalue()


def arrays(layout: str = "csr", **changes: Any) -> dict[str, bytes]:
    """Entries of a sound archive, some replaced (by an array or by bytes) or, with ``None``, left out."""
    held: dict[str, Any] = {"format": np.array(layout.encode()), "shape": np.array((30, 50))}
    if layout == "coo":
        held |= {"row": _COO.row, "col": _COO.col, "data": _COO.data}
    else:
        matrix = _CSR if layout == "csr" else _CSC
        held |= {"indptr": matrix.indptr, "indices": matrix.indices, "data": matrix.data}
    held |= changes
    return {
        f"{name}.npy": value if isinstance(value, bytes) else npy(value)
        for name, value in held.items()
        if value is not None
    }


def write_zip(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    """An archive of ``entries``."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def write_npz(path: Path, layout: str = "csr", method: int = zipfile.ZIP_DEFLATED, **changes: Any) -> None:
    """An archive of ``arrays``."""
    write_zip(path, arrays(layout, **changes), method)


def directory(name: str, offset: int, value: int, size: int = 4) -> Callable[[bytes], bytes]:
    """Replaces a number at ``offset`` of the central directory's record of ``name``.npy."""

    def change(raw: bytes) -> bytes:
        at = raw.rfind(name.encode() + b".npy") - 46 + offset
        return raw[:at] + value.to_bytes(size, "little") + raw[at + size :]

    return change


def ending(offset: int, value: int, size: int) -> Callable[[bytes], bytes]:
    """Replaces a number at ``offset`` of the record that ends the archive."""

    def change(raw: bytes) -> bytes:
        at = raw.rfind(b"PK\5\6") + offset
        return raw[:at] + value.to_bytes(size, "little") + raw[at + size :]

    return change


def _twice(path: Path) -> None:
    write_npz(path, twic=_CSR.data)
    path.write_bytes(path.read_bytes().replace(b"twic.npy", b"data.npy"))


def _far_offset(path: Path) -> None:
    """ZIP64: the position of the entry is 2^64 - 1."""
    info = zipfile.ZipInfo("data.npy")
    info.extra = struct.pack("<HHQ", 0x7777, 8, 2**64 - 1)
    entries = arrays(data=None)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr(info, npy(_CSR.data))
    raw = path.read_bytes()
    at = raw.rfind(b"data.npy")
    raw = raw[:at] + raw[at:].replace(b"\x77\x77\x08\x00", b"\x01\x00\x08\x00", 1)
    path.write_bytes(directory("data", 42, 2**32 - 1)(raw))


def _sized(**lies: Any) -> Callable[[Path], None]:
    """A ``data`` entry whose header states more than it holds."""
    return partial(write_npz, data=describe("'<f4'", **lies))


_npz = Table()
_add = _npz.add
for _name in ("format", "shape", "indptr", "indices", "data"):
    _add(f"{_name} missing", _name, partial(write_npz, **{_name: None}))
    _add(f"{_name} is a pickled object", _name, partial(write_npz, **{_name: describe("'|O'", "(1,)") + TRAP}))
    _add(f"{_name} is a bare pickle", _name, partial(write_npz, **{_name: TRAP}))
    _add(f"{_name} is no array", _name, partial(write_npz, **{_name: b"text"}))
    _add(f"{_name} empty", _name, partial(write_npz, **{_name: b""}))
    _add(f"{_name} cut", _name, partial(write_npz, **{_name: arrays()[f"{_name}.npy"][:-1]}))
    _add(f"{_name} a byte too long", _name, partial(write_npz, **{_name: arrays()[f"{_name}.npy"] + b"\0"}))
_add("format unknown", "format", partial(write_npz, format=np.array(b"dia")))
_add("format a number", "format", partial(write_npz, format=np.array(3)))
_add("format a list", "format", partial(write_npz, format=np.array([b"csr", b"csr"])))
_add("format not ASCII", "format", partial(write_npz, format=np.array("ćsr\x1b[2J")))
_add("format of no characters", "format", partial(write_npz, format=describe("'|S0'", "()")))
_add("format of a million characters", "format", partial(write_npz, format=np.array(b"c" * 10**6)))
_add("shape of three", "shape", partial(write_npz, shape=np.array([1, 2, 3])))
_add("shape of floats", "shape", partial(write_npz, shape=np.array([30.0, 50.0])))
_add("shape NaN", "shape", partial(write_npz, shape=np.array([np.nan, 50.0])))
_add("shape negative", "shape", partial(write_npz, shape=np.array([-30, 50])))
_add("shape with zero", "shape", partial(write_npz, shape=np.array([0, 50])))
_add("shape past int32", "shape", partial(write_npz, shape=np.array([2**40, 50])))
_add("shape past int64", "shape", partial(write_npz, shape=np.array([2**64 - 1, 50], np.uint64)))
_add("shape of exabytes", "shape", partial(write_npz, layout="coo", shape=np.array([2**31 - 1, 2**31 - 1])))
_add("shape of many rows", "shape", partial(write_npz, layout="coo", shape=np.array([2**31 - 1, 50])))
_add("shape of many columns", "shape", partial(write_npz, shape=np.array([30, 2**31 - 1])))
_add("shape over max_bytes", "shape", partial(write_npz, shape=np.array([30, 5000])), max_bytes=20_000)
_add("shape of more rows", "indptr", partial(write_npz, shape=np.array([31, 50])))
_add("shape of fewer columns", "indices", partial(write_npz, shape=np.array([30, 10])))
_add("data complex", "data", partial(write_npz, data=_CSR.data.astype(np.complex64)))
_add("data text", "data", partial(write_npz, data=_CSR.data.astype("U8")))
_add("data half", "data", partial(write_npz, data=_CSR.data.astype(np.float16)))
_add("data big-endian", "data", partial(write_npz, data=_CSR.data.astype(">f4")))
_add("data long double", "data", partial(write_npz, data=_CSR.data.astype(np.longdouble)))
_add("data records", "data", partial(write_npz, data=_CSR.data.view([("x", "f4")])))
_add("data times", "data", partial(write_npz, data=_CSR.data.astype("M8[s]")))
_add("data without width", "data", partial(write_npz, data=describe("'|V0'", f"({10**15},)")))
_add("data two-dimensional", "data", partial(write_npz, data=_CSR.data.reshape(1, -1)))
_add("data short", "indices", partial(write_npz, data=_CSR.data[:-1]))
_add("data claims terabytes", "data", _sized(shape="(10000000000000,)"))
_add("data of a negative size", "data", _sized(shape="(-1,)"))
_add("data of 8000 digits", "data", _sized(shape=f"({'9' * 4000}, {'9' * 4000})"))
_add("data of 65 dimensions", "data", _sized(shape=f"({'1, ' * 65})"))
_add("data with a long header", "data", partial(write_npz, data=header(b" " * 10**6, version=(2, 0), length=2**32 - 1)))
_add("data of .npy version 9", "data", partial(write_npz, data=describe(version=(9, 0))))
_add("indices of floats", "indices", partial(write_npz, indices=_CSR.indices.astype(float)))
_add("index too large", "indices", partial(write_npz, indices=changed(_CSR.indices, 4, 50)), 4)
_add("index far too large", "indices", partial(write_npz, indices=changed(_CSR.indices, 4, 2**31 - 1)), 4)
_add("index negative", "indices", partial(write_npz, indices=changed(_CSR.indices, 4, -1)), 4)
_add("index that wraps", "indices", partial(write_npz, indices=changed(_CSR.indices.astype(_U64), 4, 2**64 - 1)), 4)
_add("index past 32 bits", "indices", partial(write_npz, indices=changed(_CSR.indices.astype(_I64), 4, 2**32 + 3)), 4)
_add("indices short", "indices", partial(write_npz, indices=_CSR.indices[:-1]))
_add("indptr falls", "indptr", partial(write_npz, indptr=changed(_CSR.indptr, 4, 0)), 4)
_add("indptr negative", "indptr", partial(write_npz, indptr=changed(_CSR.indptr, 1, -5)), 1)
_add("indptr starts late", "indptr", partial(write_npz, indptr=changed(_CSR.indptr, 0, 1)), 0)
_add("indptr too far", "indptr", partial(write_npz, indptr=changed(_CSR.indptr, 30, 10**6)), 30)
_add("indptr that wraps", "indptr", partial(write_npz, indptr=changed(_CSR.indptr.astype(_U64), 30, 2**64 - 1)), 30)
_add("indptr short", "indptr", partial(write_npz, indptr=_CSR.indptr[:-1]))
_add("CSC index too large", "indices", partial(write_npz, layout="csc", indices=changed(_CSC.indices, 4, 30)), 4)
_add("CSC read as CSR", "indptr", partial(write_npz, layout="csc", format=np.array(b"csr")))
_add("row too large", "row", partial(write_npz, layout="coo", row=changed(_COO.row, 7, 30)), 7)
_add("row negative", "row", partial(write_npz, layout="coo", row=changed(_COO.row, 7, -(2**31))), 7)
_add("column too large", "col", partial(write_npz, layout="coo", col=changed(_COO.col, 0, 50)), 0)
_add("columns short", "col", partial(write_npz, layout="coo", col=_COO.col[:-1]))
_add("rows missing", "row", partial(write_npz, layout="coo", row=None))
_add("bomb of gigabytes", "file", partial(write_npz, zeros=np.zeros(2_500_000)), max_bytes=10_000_000)
_add("bomb beside the matrix", "file", partial(write_npz, **{"../zeros": bytes(20_000_000)}), max_bytes=10_000_000)
_add("path upwards", "data", lambda path: write_zip(path, arrays(data=None) | {"../data.npy": npy(_CSR.data)}))
_add("path from the root", "data", lambda path: write_zip(path, arrays(data=None) | {"/data.npy": npy(_CSR.data)}))
_add("path in a folder", "data", lambda path: write_zip(path, arrays(data=None) | {"a/data.npy": npy(_CSR.data)}))
_add("name in capitals", "data", lambda path: write_zip(path, arrays(data=None) | {"DATA.npy": npy(_CSR.data)}))
_add("a folder for an array", "data", lambda path: write_zip(path, arrays(data=None) | {"data.npy/": b""}))
_add("a name twice", "data", _twice)
_add("position past 64 bits", "data", _far_offset)
_add("LZMA", "format", partial(write_npz, method=zipfile.ZIP_LZMA))
_add("an .npy under this name", "file", lambda path: path.write_bytes(npy(_DENSE)))
for _name, _field, _change in (
    ("cut in half", "file", lambda raw: raw[: len(raw) // 2]),
    ("cut before the directory", "file", lambda raw: raw[: raw.find(b"PK\1\2")]),
    ("first half lost", "format", lambda raw: raw[len(raw) // 2 :]),
    ("no entries", "format", lambda raw: b"PK\5\6" + bytes(18)),
    ("encrypted", "data", directory("data", 8, 1, 2)),
    ("unknown compression", "data", directory("data", 10, 99, 2)),
    ("stored that is deflated", "data", directory("data", 10, 0, 2)),
    ("checksum wrong", "data", directory("data", 16, 12345)),
    ("packed size of gigabytes", "data", directory("data", 20, 2**32 - 2)),
    ("packed size of nothing", "data", directory("data", 20, 0)),
    ("size of gigabytes", "data", directory("data", 24, 2**32 - 2)),
    ("size of nothing", "data", directory("data", 24, 0)),
    ("position past the end", "data", directory("data", 42, 2**31)),
    ("position of another entry", "data", directory("data", 42, 0)),
    ("directory past the end", "format", ending(16, 2**31, 4)),
    ("directory of gigabytes", "file", ending(12, 2**32 - 2, 4)),
    ("directory of no size", "format", ending(12, 0, 4)),
    ("several disks", "file", lambda raw: raw[: raw.rfind(b"PK\5\6")] + b"PK\6\7" + bytes(12) + b"\7" + raw[-26:]),
):
    _npz.add_bytes(_name, _field, write_npz, _change)


def _use_matrix(matrix: Any) -> None:
    """Encode, unless damage made the shape large."""
    if matrix.shape[0] * matrix.shape[1] <= 1 << 18:
        with np.errstate(over="ignore", invalid="ignore"):
            packed = TiledCSL.from_dense(matrix) if isinstance(matrix, np.ndarray) else TiledCSL.from_scipy(matrix)
        packed.validate()
        packed.to_dense()


NPZ = Container(suffix=".npz", write=write_npz, read=read_matrix, use=_use_matrix, mutations=_npz)


def _raw(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


_SQUARE = bytes(64)
_npy = Table()
for _name, _content in (
    ("magic cut", b"\x93NUM"),
    ("magic alone", b"\x93NUMPY\1\0"),
    ("magic wrong", b"\x93NUMPX" + describe()[6:] + _SQUARE),
    ("version 0", describe(version=(0, 0)) + _SQUARE),
    ("version 3", describe(version=(3, 0)) + _SQUARE),
    ("version 255", describe(version=(255, 255)) + _SQUARE),
    ("header of no length", header(b"", length=0) + _SQUARE),
    ("header past the end", header("{'descr'", length=9000)),
    ("header over the limit", header(b" " * 65535) + _SQUARE),
    ("header of gigabytes", header(b" " * 100_000, version=(2, 0), length=2**32 - 1)),
    ("header not text", header(b"\xff\xfe\0\0" * 20) + _SQUARE),
    ("header of zeros", header(bytes(100)) + _SQUARE),
    ("header a list", header("['<f4', False, (4, 4)]") + _SQUARE),
    ("header without shape", header("{'descr': '<f4', 'fortran_order': False}") + _SQUARE),
    ("header with more", header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4), 'x': 1}") + _SQUARE),
    ("header that calls", header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (4, 4)}")),
    ("header nested deeply", header("[" * 9000)),
    ("header of minus signs", describe(shape=f"({'-' * 9000}4, 4)") + _SQUARE),
    ("header of additions", header("+".join("1" * 4500)) + _SQUARE),
    ("shape a list", describe(shape="[4, 4]") + _SQUARE),
    ("shape a number", describe(shape="16") + _SQUARE),
    ("shape of floats", describe(shape="(4.0, 4.0)") + _SQUARE),
    ("shape NaN", describe(shape="(nan, 4)") + _SQUARE),
    ("shape of none", describe(shape="(None, 4)") + _SQUARE),
    ("shape negative", describe(shape="(-4, -4)") + _SQUARE),
    ("shape of one", npy(np.ones(3))),
    ("shape of three", npy(np.ones((2, 2, 2)))),
    ("shape of none at all", npy(np.array(1.0))),
    ("shape of 65", describe(shape=f"({'1, ' * 65})") + bytes(4)),
    ("shape with zero", npy(np.ones((0, 3)))),
    ("shape with zero of 2^200", describe(shape=f"(0, {2**200})")),
    ("shape of exabytes", describe(shape=f"({2**31}, {2**31})") + _SQUARE),
    ("shape that overflows to fit", describe(shape=f"({2**62 + 4}, 4)") + _SQUARE),
    ("shape of 8000 digits", describe(shape=f"({'9' * 4000}, {'9' * 4000})") + _SQUARE),
    ("cut", (describe() + _SQUARE)[:-1]),
    ("a byte too long", describe() + _SQUARE + b"\0"),
    ("pickled objects", describe("'|O'", "(1, 1)") + TRAP),
    ("pickled objects in records", describe("[('x', '|O')]", "(1, 1)") + TRAP),
    ("bare pickle", TRAP),
    ("integers", npy(np.ones((2, 2), np.int64))),
    ("complex", npy(np.ones((2, 2), np.complex64))),
    ("booleans", npy(np.ones((2, 2), bool))),
    ("text", npy(np.array([["a", "b"]]))),
    ("records", npy(np.ones((2, 2), [("x", "f4")]))),
    ("big-endian", npy(np.ones((2, 2), ">f4"))),
    ("raw bytes of two", npy(np.ones((2, 2), np.float16).view("V2"))),
    ("raw bytes of none", describe("'|V0'", "(4, 4)")),
    ("dtype unknown", describe("'<z9'") + _SQUARE),
    ("dtype a number", describe("7") + _SQUARE),
    ("dtype of a shape", describe("('<f4', (2, 2))", "(2, 2)") + _SQUARE),
    ("dtype of a huge shape", describe("('<f4', (99999999, 99999999))", "(2, 2)") + _SQUARE),
    ("dtype of a gigabyte", describe("'|S1000000000'", "(1, 1)") + _SQUARE),
    ("order a text", describe(fortran="'C'") + _SQUARE),
    ("a zip under this name", b"PK\3\4" + bytes(100)),
):
    _npy.add(_name, "file", _raw(_content))


def write_npy(path: Path) -> None:
    """A sound file."""
    path.write_bytes(npy(_DENSE))


NPY = Container(suffix=".npy", write=write_npy, read=read_matrix, use=_use_matrix, mutations=_npy)
