# SPDX-License-Identifier: Apache-2.0
"""Files of sparse weights: safetensors with a versioned ``__metadata__``.

``__metadata__`` holds ``format`` = "flashllm-weights", ``version`` = "1" and ``weights``, a JSON object
that gives for each weight its format, the format's version, and its scalar fields. Buffer B of weight W is
the tensor ``W.B``. Other tensors (biases, norms) may stand beside them and are left alone, as are other entries of
``__metadata__``. Any safetensors reader can open the file; nothing in it can execute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.formats.check import is_int
from flashllm.formats.weight import SparseWeight
from flashllm.io.safetensors_file import Header, TensorFile, parse_json, read_header, write_file
from flashllm.io.tensor_writer import TensorPart, TensorWriter
from flashllm.registry import FORMATS, weight_class

if TYPE_CHECKING:
    from typing_extensions import Self

CONTAINER_FORMAT = "flashllm-weights"
CONTAINER_VERSION = "1"
_OWN_ENTRIES = ("format", "version", "weights")
_FIELDS_BYTES = 1024  # the fields of a weight as JSON take about 200


def save_weights(path: str | Path, weights: Mapping[str, SparseWeight]) -> None:
    """Write weights to ``path`` atomically: a crash leaves the old file or the new one, never a part.

    Device weights are copied to the host first. Raises ``ArgumentError`` for no weight, a name that is
    empty or a weight of an unknown format.
    """
    if not weights:
        raise ArgumentError("weights", expected="at least one weight", got="none")
    tensors: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name, weight in weights.items():
        described[name] = _described(name, weight)
        for buffer, array in weight.to_host().arrays().items():
            key = f"{name}.{buffer}"
            if key in tensors:
                raise ArgumentError("weights", expected="names that give distinct buffers", got=f"{key!r} twice")
            tensors[key] = array
    write_file(path, tensors, _metadata(described))


class ContainerWriter:
    """Writes a file of weights and tensors, which are added one at a time; use it in a ``with`` block.

    The file appears at ``path`` when the ``with`` block ends: whole, or not at all. Only what is being added is in
    memory. Add weights before 16-bit tensors, so that each lies at a multiple of its item size.
    """

    def __init__(
        self, path: str | Path, *, weights: Iterable[str], tensors: Iterable[str], note_bytes: int = 0
    ) -> None:
        """``weights`` and ``tensors`` name at least what will be added; ``note_bytes`` bounds all notes together.

        Raises ``ArgumentError`` for invalid names.
        """
        names = list(weights)
        buffers = {buffer for name in FORMATS for buffer in weight_class(name).BUFFERS}  # which format is not known yet
        expected = [*tensors, *(f"{name}.{buffer}" for name in names for buffer in buffers)]
        spare = (
            sum(_FIELDS_BYTES + 12 * len(name) for name in names) + 2 * note_bytes
        )  # JSON in JSON: quotes are escaped
        self._writer = TensorWriter(path, metadata=_metadata({}), expected=expected, spare_bytes=spare)
        self._described: dict[str, Any] = {}
        self._notes: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            try:
                self._writer.describe({**_metadata(self._described), **self._notes})
            except BaseException as late:
                self._writer.__exit__(type(late), late, late.__traceback__)
                raise
        self._writer.__exit__(kind, error, at)

    def add_weight(self, name: str, weight: SparseWeight) -> None:
        """Append a weight, from the host or a device. Raises ``ArgumentError`` as ``save_weights`` does."""
        if name in self._described:
            raise ArgumentError("name", expected="names given once", got=f"{name!r} twice")
        described = _described(name, weight)
        for buffer, array in weight.to_host().arrays().items():
            self._writer.add(f"{name}.{buffer}", array)
        self._described[name] = described

    def add_tensor(self, name: str, array: NDArray[Any]) -> None:
        """Append a tensor that is not a buffer of a weight. Raises ``ArgumentError``."""
        self._writer.add(name, array)

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> AbstractContextManager[TensorPart]:
        """Append a tensor in parts; see :meth:`~flashllm.io.tensor_writer.TensorWriter.tensor`."""
        return self._writer.tensor(name, dtype, shape)

    def note(self, key: str, text: str) -> None:
        """Put ``text`` into ``__metadata__``. Raises ``ArgumentError`` for a key that the container itself uses."""
        if key in _OWN_ENTRIES:
            raise ArgumentError("key", expected="none of the container's own", got=repr(key))
        self._notes[key] = text


class ContainerFile:
    """An open file of weights and tensors, which are read one at a time; use it in a ``with`` block."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and check its header. Raises ``FormatError``, or ``OSError`` for an unreadable file."""
        self._file = TensorFile(path)
        try:
            self._described = _describe(self._file.header)
        except BaseException:
            self._file.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.__exit__(kind, error, at)

    @property
    def header(self) -> Header:
        """The header of the file."""
        return self._file.header

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights."""
        return tuple(self._described)

    @property
    def dense_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that are no buffers of a weight."""
        formats = {name: fields.get("format") for name, fields in self._described.items()}
        buffers = {
            f"{name}.{buffer}"
            for name, format in formats.items()
            if isinstance(format, str) and format in FORMATS
            for buffer in weight_class(format).BUFFERS
        }
        return tuple(name for name in self.header.tensors if name not in buffers)

    def weight(self, name: str, *, validate: bool = True, mmap: bool = False) -> SparseWeight:
        """Weight ``name``; options as in :func:`load_weights`. Raises ``ArgumentError``, ``FormatError``."""
        if name not in self._described:
            raise ArgumentError("name", expected=f"one of {_listed(self._described)}", got=repr(name))
        return _build(self._file, name, self._described[name], validate=validate, mmap=mmap)

    def tensor(self, name: str, *, mmap: bool = False) -> NDArray[Any]:
        """Tensor ``name``. Raises ``ArgumentError``, ``FormatError``."""
        entry = self.header.tensors.get(name)
        if entry is None:
            raise ArgumentError("name", expected=f"one of {_listed(self.header.tensors)}", got=repr(name))
        return self._file.read(entry, mmap=mmap)


def packed_names(path: Path, name: str | None) -> tuple[str, ...] | None:
    """The weights that ``name``, or ``None`` for all, means in the file at ``path``.

    ``None`` where ``flashllm.io.matrices.read_matrix`` has to read the file: it is none of ours, ``name`` is one of its
    dense tensors, or it holds nothing else. Raises ``ArgumentError`` for a name that is not in it, and ``FormatError``.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return None
    if read_header(path).metadata.get("format") != CONTAINER_FORMAT:
        return None
    with ContainerFile(path) as file:
        if name is None:
            return file.weights or None
        if name in file.weights:
            return (name,)
        if name not in file.dense_tensors:
            listed = _listed([*file.weights, *file.dense_tensors])
            raise ArgumentError("tensor", expected=f"one of {listed}", got=repr(name))
    return None


def load_weights(path: str | Path, *, validate: bool = True, mmap: bool = False) -> dict[str, SparseWeight]:
    """All weights of a file, by name.

    Every weight is validated unless ``validate=False`` (only for files that you wrote yourself: kernels
    trust the content). ``mmap`` maps the buffers read-only instead of copying them: writing into the file
    then changes them after validation, whereas replacing the file (as ``save_weights`` does) leaves them
    unchanged. Raises a ``FormatError`` that names the file and field.
    """
    with ContainerFile(path) as file:
        return {name: file.weight(name, validate=validate, mmap=mmap) for name in file.weights}


def load_weight(
    path: str | Path, *, name: str | None = None, validate: bool = True, mmap: bool = False
) -> SparseWeight:
    """One weight of a file; ``name`` may be omitted if the file holds only one. Options as in ``load_weights``."""
    with ContainerFile(path) as file:
        if name is None:
            if len(file.weights) != 1:
                raise ArgumentError("name", expected=f"one of {_listed(file.weights)}", got="None")
            name = file.weights[0]
        return file.weight(name, validate=validate, mmap=mmap)


def _described(name: object, weight: object) -> dict[str, Any]:
    """The entry of a weight in ``__metadata__``. Raises ``ArgumentError`` for an invalid name or weight."""
    if not isinstance(name, str) or not name:
        raise ArgumentError("weights", expected="names that are non-empty strings", got=repr(name))
    if not isinstance(weight, SparseWeight) or weight.format not in FORMATS:
        raise ArgumentError(f"weights[{name!r}]", expected="a SparseWeight", got=type(weight).__name__)
    return {"format": weight.format, "version": weight.VERSION, **weight.metadata()}


def _metadata(described: Mapping[str, Any]) -> dict[str, str]:
    return {
        "format": CONTAINER_FORMAT,
        "version": CONTAINER_VERSION,
        "weights": json.dumps(described, separators=(",", ":")),
    }


def _listed(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(map(repr, ordered[:20])) + more


def _describe(header: Header) -> dict[str, dict[str, Any]]:
    """The checked ``weights`` entry of the metadata."""
    for field, expected in (("format", CONTAINER_FORMAT), ("version", CONTAINER_VERSION)):
        got = header.metadata.get(field)
        if got != expected:
            raise FormatError(field=f"__metadata__.{field}", expected=repr(expected), got=brief(got), path=header.path)
    field = "__metadata__.weights"
    described = parse_json(header.metadata.get("weights", "null"), field=field, path=header.path)
    for name, fields in described.items():
        if not isinstance(fields, dict):
            raise FormatError(
                field=field, expected="a JSON object of objects", got=f"{type(fields).__name__} for {brief(name)}",
                path=header.path,
            )  # fmt: skip
    return described


def _build(file: TensorFile, name: str, fields: dict[str, Any], *, validate: bool, mmap: bool) -> SparseWeight:
    header = file.header
    kind = fields.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise FormatError(
            field=f"{name}.format", expected=f"one of {', '.join(FORMATS)}", got=brief(kind), path=header.path
        )
    # Take only the entries that are this weight's buffers: a weight "a" beside a weight "a.b" must not
    # take the other's.
    prefix = name + "."
    made = weight_class(kind)
    version = fields.get("version", 1)  # older files do not record it
    if not is_int(version) or version != made.VERSION:
        expected = f"{made.VERSION}, the version of {kind} that this package reads: encode the matrix again"
        raise FormatError(field=f"{name}.version", expected=expected, got=brief(version), path=header.path)
    buffers = made.BUFFERS
    missing = [b for b in buffers if prefix + b not in header.tensors]
    if missing:
        raise FormatError(field=prefix + missing[0], expected="a tensor", got="none", path=header.path)
    arrays = {b: file.read(header.tensors[prefix + b], mmap=mmap) for b in buffers}
    weight = made.from_parts(fields, arrays, path=header.path)
    if validate:
        weight.validate(path=header.path)
    return weight
