# SPDX-License-Identifier: Apache-2.0
"""Write a safetensors file tensor by tensor, and the index of a checkpoint in several such files.

In the layout, the header, which says where each tensor lies, comes first. So room for it is left at the start, enough
for the tensors that are expected, and it is written at the end; unused room is filled with spaces, as the layout
allows. No more than the part being added is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, brief
from flashllm.formats.check import is_int
from flashllm.io.files import replacing
from flashllm.io.hf_directory import INDEX_NAME
from flashllm.io.safetensors_file import (
    DTYPE_NAMES,
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    bytes_of,
    read_header,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_RANK = 8
_MAX_BYTES = 2**60
_WRITTEN = tuple(DTYPE_NAMES.values())
# What an entry takes beside its name: its keys, the longest dtype, and numbers of 19 digits for each dimension and both
# offsets, the most that fit into _MAX_BYTES.
_ENTRY_BYTES = len('"":{"dtype":"","shape":[],"data_offsets":[,]},') + 4 + 20 * (_MAX_RANK + 2)
_STRIP_BYTES = 1 << 24


class TensorPart:
    """A tensor that is being written: takes its elements in row-major order, in parts of any size."""

    def __init__(self, file: BinaryIO, *, name: str, dtype: str, count: int) -> None:
        self._file, self._name, self._dtype = file, name, dtype
        self._missing = count

    @property
    def missing(self) -> int:
        """How many elements are still to come."""
        return self._missing

    def write(self, part: NDArray[Any]) -> None:
        """Append the elements of ``part``, of any shape. Raises ``ArgumentError`` for another dtype or too many."""
        found = _dtype_of(f"{self._name}: part", part)
        if found != self._dtype:
            raise ArgumentError(f"{self._name}: part", expected=f"dtype {self._dtype}", got=found)
        if part.size > self._missing:
            expected = f"at most {self._missing:,} more elements"
            raise ArgumentError(f"{self._name}: part", expected=expected, got=f"{part.size:,}")
        _append(self._file, part)
        self._missing -= part.size


class TensorWriter:
    """Writes a safetensors file; use it in a ``with`` block.

    The file appears at ``path`` when the ``with`` block ends: whole and on disk. If the block ends with an exception,
    ``path`` holds what it held before, and nothing else is left.

    Tensors lie in the order in which they were added, without gaps, as the layout requires. So one that follows another
    of a narrower dtype may start at a byte that is not a multiple of its item size. The readers of this package and the
    package ``safetensors`` can handle that; add wide dtypes first where it matters.
    """

    def __init__(
        self, path: str | Path, *, metadata: Mapping[str, str], expected: Iterable[str], spare_bytes: int = 0
    ) -> None:
        """A writer for ``path``, which is not touched before the ``with`` block begins.

        ``metadata`` goes into ``__metadata__``. ``expected`` names the tensors to come, which decide how much room the
        header has. Other tensors, or fewer, may be added, in any order, as long as the header fits. ``spare_bytes`` is
        extra room for what :meth:`describe` adds. Raises ``ArgumentError`` for names or metadata that are not strings,
        and for a header of more than ``MAX_HEADER_BYTES``.
        """
        self._path = Path(path)
        self._metadata = _checked_metadata(metadata)
        names = list(expected)
        for name in names:
            _check_name("expected", name)
        if not is_int(spare_bytes) or spare_bytes < 0:
            raise ArgumentError("spare_bytes", expected="an integer of at least 0", got=brief(spare_bytes))
        self._metadata_bytes = len(_json({"__metadata__": self._metadata}))
        room = self._metadata_bytes + spare_bytes + sum(len(_json(name)) + _ENTRY_BYTES for name in names)
        self._room = room + -room % 8
        if self._room > MAX_HEADER_BYTES:
            expected_text = f"tensors whose header takes at most {MAX_HEADER_BYTES:,} bytes"
            raise ArgumentError("expected", expected=expected_text, got=f"{len(names):,} of {self._room:,} bytes")
        self._replacing = replacing(self._path)
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._used = 0  # by the entries
        self._end = 0
        self._open: str | None = None
        self._failed: str | None = None

    def __enter__(self) -> Self:
        if self._file is not None:
            raise ArgumentError("writer", expected="one that was not used before", got=str(self._path))
        self._file = self._replacing.__enter__()
        try:
            self._file.write(b" " * (8 + self._room))
        except BaseException as error:
            self._replacing.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as late:
                self._replacing.__exit__(type(late), late, late.__traceback__)
                raise
        self._replacing.__exit__(kind, error, at)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors so far, without the header."""
        return self._end

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append a tensor. Raises ``ArgumentError`` as :meth:`tensor` does."""
        with self.tensor(name, _dtype_of(brief(name), array), array.shape) as out:
            out.write(array)

    @contextmanager
    def tensor(self, name: str, dtype: str, shape: Sequence[int]) -> Iterator[TensorPart]:
        """Append a tensor in parts: ``with writer.tensor("w", "F16", (4, 8)) as out: out.write(rows)``.

        ``dtype`` is the layout's name of one of the dtypes of ``DTYPE_NAMES``. Only one tensor is written at a time.
        Raises ``ArgumentError`` for a name given twice, an unknown dtype, a shape of more than 8 dimensions, a header
        that would not fit into its room, and, at the end, for missing elements. After an exception in this block the
        file cannot be finished.
        """
        file = self._ready()
        if self._open is not None:
            raise ArgumentError("name", expected=f"{self._open} finished first", got=f"{brief(name)} inside it")
        count = self._check(name, dtype, shape)
        size = count * ITEM_BYTES[dtype]
        entry = {"dtype": dtype, "shape": [int(d) for d in shape], "data_offsets": [self._end, self._end + size]}
        needed = len(_json(name)) + len(_json(entry)) + 2
        total = self._metadata_bytes + self._used + needed
        if total > self._room:
            raise ArgumentError(
                name, expected=f"no more tensors than fit into the header, {self._room:,} bytes for those expected",
                got=f"one after {len(self._entries):,}, and {total:,} bytes",
            )  # fmt: skip
        self._open = name
        try:
            part = TensorPart(file, name=name, dtype=dtype, count=count)
            yield part
            if part.missing:
                raise ArgumentError(name, expected=f"{count:,} elements", got=f"{count - part.missing:,}")
        except BaseException:
            self._failed = name  # part of it may be in the file
            raise
        finally:
            self._open = None
        self._entries[name] = entry
        self._used += needed
        self._end += size

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Add to or replace entries of ``__metadata__``. Raises ``ArgumentError`` if the header would not fit."""
        self._ready()
        described = {**self._metadata, **_checked_metadata(metadata)}
        size = len(_json({"__metadata__": described}))
        if size + self._used > self._room:
            expected = f"a header of at most {self._room:,} bytes"
            raise ArgumentError("metadata", expected=expected, got=f"{size + self._used:,}")
        self._metadata, self._metadata_bytes = described, size

    def _ready(self) -> BinaryIO:
        if self._file is None or self._file.closed:
            raise ArgumentError("writer", expected="one inside its with block", got=str(self._path))
        if self._failed is not None:
            raise ArgumentError("writer", expected="every tensor whole", got=f"a part of {self._failed}")
        return self._file

    def _check(self, name: str, dtype: str, shape: Sequence[int]) -> int:
        """The number of elements of a tensor that may be added."""
        _check_name("name", name)
        if name in self._entries:
            raise ArgumentError("name", expected="names given once", got=f"{brief(name)} twice")
        if not isinstance(dtype, str) or dtype not in _WRITTEN:
            raise ArgumentError(f"{name}: dtype", expected=f"one of {', '.join(_WRITTEN)}", got=brief(dtype))
        sizes = list(shape)
        if len(sizes) > _MAX_RANK or not all(isinstance(d, (int, np.integer)) and 0 <= d < _MAX_BYTES for d in sizes):
            expected = f"at most {_MAX_RANK} dimensions of at least 0"
            raise ArgumentError(f"{name}: shape", expected=expected, got=brief(sizes))
        # Zeros are left out, as readers do.
        if self._end + math.prod(int(d) for d in sizes if d) * ITEM_BYTES[dtype] > _MAX_BYTES:
            raise ArgumentError(f"{name}: shape", expected="a file of at most 2^60 bytes", got=brief(sizes))
        return math.prod(map(int, sizes))

    def _finish(self) -> None:
        file = self._ready()
        text = _json({"__metadata__": self._metadata, **self._entries})
        file.seek(0)
        file.write(self._room.to_bytes(8, "little"))
        file.write(text.ljust(self._room))


def write_checkpoint_index(directory: str | Path, shards: Sequence[str]) -> Path:
    """Write ``model.safetensors.index.json`` for ``shards``, safetensors files in ``directory``; returns its path.

    ``weight_map`` comes from the files themselves, ``total_size`` is the sum of their tensors in bytes. The index
    appears whole or not at all. Raises ``ArgumentError`` if there is no shard, for a name given twice or with a folder
    in it, and for a tensor in two shards; ``FormatError`` for a damaged shard, ``OSError`` for a missing one.
    """
    folder = Path(directory)
    if not shards:
        raise ArgumentError("shards", expected="at least one file name", got="none")
    where: dict[str, str] = {}
    total = 0
    for shard in shards:
        if not isinstance(shard, str) or PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ArgumentError("shards", expected="names that end in .safetensors, without folders", got=brief(shard))
        if list(shards).count(shard) > 1:
            raise ArgumentError("shards", expected="names given once", got=f"{shard!r} twice")
        for entry in read_header(folder / shard).tensors.values():
            if entry.name in where:
                got = f"{brief(entry.name)} in {where[entry.name]} and {shard}"
                raise ArgumentError("shards", expected="every tensor in one shard", got=got)
            where[entry.name] = shard
            total += entry.stop - entry.start
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    path = folder / INDEX_NAME
    with replacing(path) as file:
        file.write(json.dumps(index, indent=2).encode() + b"\n")
    return path


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _check_name(argument: str, name: object) -> None:
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise ArgumentError(argument, expected="names of tensors, non-empty strings", got=brief(name))
    _check_unicode(argument, name)


def _check_unicode(argument: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(argument, expected="text that UTF-8 can hold", got=ascii(brief(text))) from error


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    out = dict(metadata)
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in out.items()):
        raise ArgumentError("metadata", expected="a mapping of strings to strings", got=brief(out))
    for text in (*out, *out.values()):
        _check_unicode("metadata", text)
    return out


def _dtype_of(argument: str, array: object) -> str:
    """The layout's name of the dtype of ``array``."""
    if not isinstance(array, np.ndarray):
        raise ArgumentError(argument, expected="a NumPy array", got=type(array).__name__)
    name = DTYPE_NAMES.get(str(array.dtype))
    if name is None:
        raise ArgumentError(argument, expected=f"dtype {', '.join(DTYPE_NAMES)}", got=str(array.dtype))
    return name


def _append(file: BinaryIO, array: NDArray[Any]) -> None:
    """Write the elements of ``array``; one that is not stored in row-major order is copied in strips of rows."""
    if array.flags.c_contiguous or array.ndim < 2 or array.shape[0] < 2:
        file.write(bytes_of(array))
        return
    rows = max(1, _STRIP_BYTES * array.shape[0] // max(1, array.nbytes))
    for first in range(0, array.shape[0], rows):
        file.write(bytes_of(array[first : first + rows]))
