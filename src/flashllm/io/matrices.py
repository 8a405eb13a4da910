# SPDX-License-Identifier: Apache-2.0
"""Read a matrix to encode: scipy ``.npz``, NumPy ``.npy`` or one tensor of a ``.safetensors`` file.

Nothing is unpickled, sizes are checked before memory is taken, and the indices of a sparse matrix before
it is used.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.bits import kind_of
from flashllm.formats.sources import check_sparse
from flashllm.io.safetensors_file import read_header, read_tensor

DEFAULT_MAX_BYTES = 16 << 30

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
    RuntimeError,
    ValueError,
)
_FLOATS = {"F16", "BF16", "F32", "F64"}


def read_matrix(path: str | Path, tensor: str | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Any:
    """The matrix in ``path``: a dense NumPy array [M, K], or a ``scipy.sparse`` array for an ``.npz``.

    ``tensor`` names the tensor of a ``.safetensors`` file (needed when it holds several). ``max_bytes``
    bounds the decompressed size of an ``.npz``. Dense files are mapped, not read. Raises
    ``ArgumentError`` for the arguments, ``FormatError`` for the content, ``FileNotFoundError`` for a
    missing file.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (".npz", ".npy", ".safetensors"):
        raise ArgumentError("path", expected="a .npz, .npy or .safetensors file", got=repr(str(path)))
    if tensor is not None and suffix != ".safetensors":
        raise ArgumentError("tensor", expected=f"None for a {suffix} file", got=repr(tensor))
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a file, found none at {str(path)!r}")
    if suffix == ".npz":
        return _read_npz(file, max_bytes)
    return _read_npy(file) if suffix == ".npy" else _read_safetensors(file, tensor)


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype[Any], field: str, path: Path) -> None:
    if len(shape) != 2 or 0 in shape:
        raise FormatError(field=field, expected="a matrix [M, K], M and K > 0", got=f"shape {shape}", path=str(path))
    if not kind_of(dtype):
        expected = "float16, bfloat16, float32 or float64"
        raise FormatError(field=field, expected=expected, got=str(dtype), path=str(path))


def _read_safetensors(path: Path, tensor: str | None) -> NDArray[Any]:
    header = read_header(path)
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
    matrix = read_tensor(header, entry, mmap=True)
    _check_matrix(matrix.shape, matrix.dtype, name, path)
    return matrix


def _read_npy(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        shape, dtype = _read_npy_header(file, os.fstat(file.fileno()).st_size, "file", path)
    _check_matrix(shape, dtype, "file", path)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _read_npy_header(file: IO[bytes], size: int, field: str, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an .npy header that fits the ``size`` bytes of the whole entry."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f".npy version {version}")
    except Exception as error:  # NumPy lets through whatever its tokenizer, literal and dtype parsers raise
        raise FormatError(field=field, expected="an .npy array", got=str(error), path=str(path)) from error
    if dtype.hasobject:
        raise FormatError(field=field, expected="numbers", got="pickled objects", path=str(path))
    wanted = math.prod(shape) * dtype.itemsize if all(d >= 0 for d in shape) else -1
    if file.tell() + wanted != size:
        got = f"{size - file.tell()} bytes"
        raise FormatError(field=field, expected=f"{wanted} bytes for {dtype} {shape}", got=got, path=str(path))
    return shape, dtype


def _read_npz(path: Path, max_bytes: int) -> Any:
    with path.open("rb") as file:
        try:
            layout, shape, arrays = _read_npz_arrays(file, path, max_bytes)
        except FormatError:
            raise
        except _ZIP_ERRORS as error:
            raise FormatError(
                field="file", expected="a zip archive", got=str(error) or type(error).__name__, path=str(path)
            ) from error
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        got = f"{shape.dtype} of shape {shape.shape}"
        raise FormatError(field="shape", expected="two integers", got=got, path=str(path))
    return _build_sparse(layout, (int(shape[0]), int(shape[1])), arrays, path)


def _read_npz_arrays(file: IO[bytes], path: Path, max_bytes: int) -> tuple[str, NDArray[Any], dict[str, NDArray[Any]]]:
    """Layout, shape and the arrays of the layout."""
    with zipfile.ZipFile(file) as archive:
        total = sum(info.file_size for info in archive.infolist())
        if total > max_bytes:
            expected = f"at most max_bytes = {max_bytes:,} bytes unpacked"
            raise FormatError(field="file", expected=expected, got=f"{total:,}", path=str(path))
        layout = _npz_layout(archive, path)
        shape = _npz_array(archive, "shape", path)
        return layout, shape, {name: _npz_array(archive, name, path) for name in _NPZ_ARRAYS[layout]}


def _npz_array(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    try:
        info = archive.getinfo(name + ".npy")
    except KeyError:
        raise FormatError(field=name, expected="an array in the archive", got="none", path=str(path)) from None
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        got = f"compression method {info.compress_type}"
        raise FormatError(field=name, expected="a stored or deflated entry", got=got, path=str(path))
    with archive.open(info) as file:
        _read_npy_header(file, info.file_size, name, path)
    with archive.open(info) as file:
        out: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return out


def _npz_layout(archive: zipfile.ZipFile, path: Path) -> str:
    raw = _npz_array(archive, "format", path)
    value = raw.item() if raw.ndim == 0 and raw.dtype.kind in "SU" else None
    layout = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    if layout not in _NPZ_ARRAYS:
        raise FormatError(field="format", expected="csr, csc or coo", got=repr(layout), path=str(path))
    return layout


def _build_sparse(layout: str, shape: tuple[int, int], arrays: dict[str, NDArray[Any]], path: Path) -> Any:
    import scipy.sparse

    for name, array in arrays.items():
        kinds, what = ("fiub", "real numbers") if name == "data" else ("iu", "integers")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            got = f"{array.dtype} of shape {array.shape}"
            raise FormatError(field=name, expected=f"1-D {what}", got=got, path=str(path))
    if not all(1 <= d < 2**31 for d in shape):
        raise FormatError(field="shape", expected="M and K in 1..2^31-1", got=str(shape), path=str(path))
    data = arrays["data"]
    if data.dtype.kind == "f" and kind_of(data.dtype) not in ("fp32", "fp64"):
        raise FormatError(field="data", expected="float32, float64 or integers", got=str(data.dtype), path=str(path))
    try:
        if layout == "coo":
            built: Any = scipy.sparse.coo_array((data, (arrays["row"], arrays["col"])), shape=shape)
        else:
            make = scipy.sparse.csr_array if layout == "csr" else scipy.sparse.csc_array
            built = make((data, arrays["indices"], arrays["indptr"]), shape=shape)
    except (ValueError, OverflowError) as error:
        raise FormatError(field=layout, expected="consistent arrays", got=str(error), path=str(path)) from error
    check_sparse(built, path=str(path))
    return built
