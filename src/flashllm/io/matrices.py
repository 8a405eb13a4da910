# SPDX-License-Identifier: Apache-2.0
"""Read a matrix to encode: scipy ``.npz``, NumPy ``.npy`` or one tensor of a ``.safetensors`` file.

Nothing is unpickled; sizes are checked before memory is allocated, and the indices of a sparse matrix before
it is used.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.formats.bits import kind_of
from flashllm.formats.sources import check_indices, check_indptr
from flashllm.io.files import open_regular
from flashllm.io.safetensors_file import TensorFile

MAX_BYTES = 16 << 30
"""Default bound on what an ``.npz`` may take in memory, where the machine has twice as much."""

_NPZ_ARRAYS = {
    "csr": ("indptr", "indices", "data"),
    "csc": ("indptr", "indices", "data"),
    "coo": ("row", "col", "data"),
}
# What the zip reader raises for a damaged archive: OSError and ValueError for impossible positions, RuntimeError
# for encryption and for features that it lacks.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
_MAX_DEFLATE_RATIO = 1032
_MAX_NPY_HEADER = 10_000  # characters; NumPy's own limit for files that it does not trust
_MAX_RANK = 64
_MAX_ITEM_BYTES = 64  # the name of a layout is the longest
_READ_BYTES = 1 << 24
_FLOATS = {"F16", "BF16", "F32", "F64"}
_VALUES: dict[str, Any] = {"expected": "1-D real numbers", "kinds": "fiub", "shape": (None,)}
_INDICES: dict[str, Any] = {"expected": "1-D integers", "kinds": "iu", "shape": (None,)}


def read_matrix(path: str | Path, tensor: str | None = None, *, max_bytes: int | None = None) -> Any:
    """The matrix in ``path``: a dense NumPy array [M, K], or a ``scipy.sparse`` array for an ``.npz``.

    ``tensor`` names the tensor of a ``.safetensors`` file (needed when it holds several). ``max_bytes``
    bounds the unpacked size of an ``.npz``, and that of its matrix as 16-bit dense; by default ``MAX_BYTES``
    or half the machine's memory, whichever is less. Dense files are mapped, not read. Raises
    ``ArgumentError`` for invalid arguments, ``FormatError`` for invalid content, ``FileNotFoundError`` for a
    missing file.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (".npz", ".npy", ".safetensors"):
        raise ArgumentError("path", expected="a .npz, .npy or .safetensors file", got=repr(str(path)))
    if tensor is not None and suffix != ".safetensors":
        raise ArgumentError("tensor", expected=f"None for a {suffix} file", got=repr(tensor))
    try:
        if suffix == ".npz":
            return _read_npz(file, _default_max_bytes() if max_bytes is None else max_bytes)
        return _read_npy(file) if suffix == ".npy" else _read_safetensors(file, tensor)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path: expected a file, found none at {str(path)!r}") from error


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _default_max_bytes() -> int:
    return min(MAX_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype[Any], field: str, path: Path) -> None:
    if len(shape) != 2 or 0 in shape:
        raise FormatError(field=field, expected="a matrix [M, K], M and K > 0", got=f"shape {shape}", path=str(path))
    if not kind_of(dtype):
        expected = "float16, bfloat16, float32 or float64"
        raise FormatError(field=field, expected=expected, got=str(dtype), path=str(path))


def _read_safetensors(path: Path, tensor: str | None) -> NDArray[Any]:
    with TensorFile(path) as file:
        return _read_tensor(file, tensor, path)


def _read_tensor(file: TensorFile, tensor: str | None, path: Path) -> NDArray[Any]:
    header = file.header
    names = sorted(header.tensors)
    listed = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if not names:
        raise FormatError(field="header", expected="a tensor", got="none", path=str(path))
    if tensor is None and len(names) > 1:
        raise ArgumentError("tensor", expected=f"a name, as {path.name} holds several: {listed}", got="None")
    name = names[0] if tensor is None else tensor
    if name not in header.tensors:
        raise ArgumentError("tensor", expected=f"one of {listed}", got=repr(name))
    entry = header.tensors[name]
    if entry.dtype not in _FLOATS:
        expected = "F16, BF16, F32 or F64"
        raise FormatError(field=f"{name}.dtype", expected=expected, got=entry.dtype, path=str(path))
    matrix = file.read(entry, mmap=True)
    _check_matrix(matrix.shape, matrix.dtype, name, path)
    return matrix


def _read_npy(path: Path) -> NDArray[Any]:
    with open_regular(path) as file:
        shape, fortran, dtype = _read_npy_header(file, os.fstat(file.fileno()).st_size, "file", path)
        _check_matrix(shape, dtype, "file", path)
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C"))


def _read_npy_header(file: IO[bytes], size: int, field: str, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether Fortran-ordered, and dtype from an .npy header, which must fit the ``size`` bytes of the entry."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f".npy version {version}")
        prefix = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(prefix, "little")
        if length > _MAX_NPY_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        header = io.BytesIO(prefix + file.read(length))
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
    except Exception as error:  # NumPy lets through whatever its tokenizer, literal and dtype parsers raise
        raise FormatError(field=field, expected="an .npy array", got=_why(error), path=str(path)) from error
    if dtype.hasobject:
        raise FormatError(field=field, expected="numbers", got="pickled objects", path=str(path))
    held = size - file.tell()
    if len(shape) > _MAX_RANK or not all(0 <= d < 2**60 for d in shape) or math.prod(shape) >= 2**60:
        got = f"shape {brief(shape)}"
        raise FormatError(field=field, expected="sizes >= 0, fewer than 2^60 elements", got=got, path=str(path))
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != held:
        expected = f"{wanted} bytes for {dtype} {brief(shape)}"
        raise FormatError(field=field, expected=expected, got=f"{held} bytes", path=str(path))
    return shape, fortran, dtype


def _read_npz(path: Path, max_bytes: int) -> Any:
    with open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except _ZIP_ERRORS as error:
            raise FormatError(field="file", expected="a zip archive", got=_why(error), path=str(path)) from error
        with archive:
            _check_directory(archive, file, path, max_bytes)
            layout = _npz_layout(archive, path)
            shape = _npz_array(archive, "shape", path, expected="two integers", kinds="iu", shape=(2,))
            arrays = {
                name: _npz_array(archive, name, path, **(_VALUES if name == "data" else _INDICES))
                for name in _NPZ_ARRAYS[layout]
            }
    return _build_sparse(layout, (int(shape[0]), int(shape[1])), arrays, path, max_bytes)


def _check_directory(archive: zipfile.ZipFile, file: BinaryIO, path: Path, max_bytes: int) -> None:
    """Refuse archives whose stated sizes unpack to too much; no more than the stated sizes is ever unpacked."""
    infos = archive.infolist()
    total = sum(info.file_size for info in infos)
    if total > max_bytes:
        expected = f"at most max_bytes = {max_bytes:,} bytes unpacked"
        raise FormatError(field="file", expected=expected, got=f"{total:,}", path=str(path))
    whole = os.fstat(file.fileno()).st_size
    names = set()
    for info in infos:
        field = info.filename.removesuffix(".npy") or "file"
        if info.filename in names:
            raise FormatError(field=field, expected="one entry of that name", got="several", path=str(path))
        names.add(info.filename)
        if info.compress_size > whole:
            expected = f"at most {whole:,} bytes, as in the file"
            raise FormatError(field=field, expected=expected, got=f"{info.compress_size:,}", path=str(path))
        # Sizes that no deflated data can have are false; trusting them would cost memory before that is noticed.
        most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO)
        if info.file_size > most:
            expected = f"at most {most:,} bytes from {info.compress_size:,} in the archive"
            raise FormatError(field=field, expected=expected, got=f"{info.file_size:,}", path=str(path))


def _npz_array(
    archive: zipfile.ZipFile, name: str, path: Path, *, expected: str, kinds: str, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """The array ``name``; ``shape`` and the ``kinds`` of its dtype are checked before it takes memory."""
    try:
        info = archive.getinfo(name + ".npy")
    except KeyError:
        raise FormatError(field=name, expected="an array in the archive", got="none", path=str(path)) from None
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        got = f"compression method {info.compress_type}"
        raise FormatError(field=name, expected="a stored or deflated entry", got=got, path=str(path))
    try:
        with archive.open(info) as file:
            real, _, dtype = _read_npy_header(file, info.file_size, name, path)
            fits = len(real) == len(shape) and all(want in (None, got) for want, got in zip(shape, real, strict=True))
            if not fits or dtype.kind not in kinds or not 1 <= dtype.itemsize <= _MAX_ITEM_BYTES:
                got = f"{dtype} of shape {brief(real)}"
                raise FormatError(field=name, expected=expected, got=got, path=str(path))
            out = np.empty(math.prod(real), dtype)
            _fill(file, out, name, path)
    except FormatError:
        raise
    except _ZIP_ERRORS as error:
        expected = "an intact entry of the archive"
        raise FormatError(field=name, expected=expected, got=_why(error), path=str(path)) from error
    return out.reshape(real)


def _fill(file: IO[bytes], out: NDArray[Any], name: str, path: Path) -> None:
    data = out.view(np.uint8).data
    done = 0
    while done < len(data):
        part = file.read(min(_READ_BYTES, len(data) - done))
        if not part:
            expected = f"{len(data)} bytes of data"
            raise FormatError(field=name, expected=expected, got=str(done), path=str(path))
        data[done : done + len(part)] = part
        done += len(part)


def _npz_layout(archive: zipfile.ZipFile, path: Path) -> str:
    raw = _npz_array(archive, "format", path, expected="csr, csc or coo", kinds="SU", shape=())
    value = raw.item()
    layout = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    if layout not in _NPZ_ARRAYS:
        raise FormatError(field="format", expected="csr, csc or coo", got=brief(layout), path=str(path))
    return layout


def _build_sparse(
    layout: str, shape: tuple[int, int], arrays: dict[str, NDArray[Any]], path: Path, max_bytes: int
) -> Any:
    """The ``scipy.sparse`` array, after all checks: SciPy accepts any index, and wraps those too wide for it."""
    import scipy.sparse

    where = str(path)
    rows, columns = shape
    if not all(1 <= d < 2**31 for d in shape):
        raise FormatError(field="shape", expected="M and K in 1..2^31-1", got=str(shape), path=where)
    # A few bytes of a sparse file can claim any shape; encoders need row pointers and tile offsets of that size.
    if 2 * rows * columns + 8 * (rows + columns) > max_bytes:
        expected = f"a matrix that takes at most max_bytes = {max_bytes:,} bytes as 16-bit dense"
        raise FormatError(field="shape", expected=expected, got=str(shape), path=where)
    data = arrays["data"]
    if data.dtype.kind == "f" and kind_of(data.dtype) not in ("fp32", "fp64"):
        raise FormatError(field="data", expected="float32, float64 or integers", got=str(data.dtype), path=where)
    for name in _NPZ_ARRAYS[layout]:
        if name != "indptr" and len(arrays[name]) != len(data):
            expected = f"{len(data)} entries, as in data"
            raise FormatError(field=name, expected=expected, got=str(len(arrays[name])), path=where)
    if layout == "coo":
        check_indices(arrays["row"], bound=rows, field="row", path=where)
        check_indices(arrays["col"], bound=columns, field="col", path=where)
        return scipy.sparse.coo_array((data, (arrays["row"], arrays["col"])), shape=shape)
    major, minor = (rows, columns) if layout == "csr" else (columns, rows)
    check_indptr(arrays["indptr"], major=major, count=len(data), path=where)
    check_indices(arrays["indices"], bound=minor, field="indices", path=where)
    make = scipy.sparse.csr_array if layout == "csr" else scipy.sparse.csc_array
    return make((data, arrays["indices"], arrays["indptr"]), shape=shape)
