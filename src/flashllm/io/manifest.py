# SPDX-License-Identifier: Apache-2.0
"""What a directory of sparse weights holds: ``flashllm.json``, and the part of it that each file has in its header.

A part lists the matrices and the other tensors of one file. The manifest consists of the source and the options of the
conversion, followed by all parts. Since every file has its part, the manifest can be rebuilt from the files alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashllm.errors import FormatError, brief
from flashllm.formats.base import DTYPES, MAX_DIMENSION, DType
from flashllm.formats.tiles import TILE_K, TILE_M
from flashllm.io.json_fields import Fields
from flashllm.io.safetensors_file import parse_json, read_json
from flashllm.registry import FORMATS

MANIFEST_FILE = "flashllm.json"
OUTSIDE_FILE = "outside.safetensors"
NOTE = "part"
"""Entry of ``__metadata__`` that holds the part of a file."""
DENSE = "dense"
"""In place of a format: the matrix is kept as it is, as the tensor ``NAME.weight``."""
ASKED_FOR = "asked for"
"""The reason that is recorded when one format was given for all matrices."""
_FORMAT = "flashllm-model"
_VERSION = 1
_MAX_BYTES = 64 << 20
_FILE = re.compile(r"block-\d{5}\.safetensors")
_KEPT = "keep"
DTYPE_CHOICES = (_KEPT, *DTYPES)
FORMAT_CHOICES = ("auto", *FORMATS, DENSE)


def block_file(layer: int) -> str:
    """Name of the file of block ``layer``."""
    return f"block-{layer:05d}.safetensors"


def is_model_file(name: str) -> bool:
    """Whether ``name`` is that of a file of tensors in a directory of sparse weights."""
    return name == OUTSIDE_FILE or _FILE.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that change the result of a conversion."""

    format: str = "auto"
    """``auto``, a registered format, or ``dense``."""
    n: tuple[int, ...] = (8, 16, 32)
    """Numbers of rows of x for which ``auto`` chooses."""
    dtype: str = _KEPT
    """``fp16`` or ``bf16`` for all tensors; ``keep``: 16-bit ones stay, wider ones become fp16."""
    fuse: bool = True
    """Layers that multiply the same input become one matrix."""
    gpu: str | None = None
    """Name of the GPU that ``auto`` chooses for; ``None`` where the format is given."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that was converted."""

    model_type: str
    name: str
    """Last part of its path."""
    layers: int
    fingerprint: str
    """SHA-256 of its configuration, its tensors' names, shapes and types, and samples of its files. Different
    checkpoints have different fingerprints; a copy has the same one."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What two conversions must have in common for files of one to stand among those of the other."""

    flashllm: str
    """Version of the package."""
    source: Origin
    options: Options


@dataclass(frozen=True, kw_only=True)
class Member:
    """A tensor of the checkpoint and its share of a stored tensor, in which the rows of all members are stacked."""

    name: str
    rows: int
    dtype: str
    """As the checkpoint stores it: ``F16``, ``BF16``, ``F32``, or a type of GGUF."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is not the matrix of a linear layer: a norm, a bias or an embedding."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    members: tuple[Member, ...]
    changed: int
    """Elements whose value was changed by rounding."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        count = 2
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A matrix [M, K] of one or several linear layers."""

    name: str
    """Without ``.weight``; e.g. ``{prefix}.self_attn.qkv_proj`` where several layers are one matrix."""
    shape: tuple[int, int]
    dtype: DType
    members: tuple[Member, ...]
    format: str
    """A registered format, or ``dense``."""
    why: str
    """What decided the format."""
    bytes_stored: int
    nnz: int
    """Elements that are neither +0.0 nor -0.0."""
    max_tile_nnz: int | None
    """Most such elements in a 128 x 64 tile of the matrix; ``None`` for ``dense``, which has no tiles."""
    changed: int
    """Elements whose value was changed by rounding, including ``became_zero``."""
    became_zero: int

    @property
    def elements(self) -> int:
        """M K."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1.0 - self.nnz / self.elements

    @property
    def bytes_dense(self) -> int:
        """Bytes of the matrix with all its elements, at 2 bytes each."""
        return 2 * self.elements


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one file holds."""

    file: str
    weights: tuple[StoredWeight, ...]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What all files hold, and what they were made from."""

    identity: Identity
    parts: tuple[Part, ...]

    @property
    def weights(self) -> dict[str, StoredWeight]:
        """All matrices by name, in the order of a forward pass."""
        return {weight.name: weight for part in self.parts for weight in part.weights}

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All other tensors by name."""
        return {tensor.name: tensor for part in self.parts for tensor in part.tensors}

    def totals(self) -> dict[str, Any]:
        """Sums over all parts, in elements and bytes."""
        weights, tensors = self.weights.values(), self.tensors.values()
        elements, nnz = sum(w.elements for w in weights), sum(w.nnz for w in weights)
        return {
            "weights": len(weights),
            "sparse_weights": sum(w.format != DENSE for w in weights),
            "elements": elements,
            "nnz": nnz,
            "sparsity": 1.0 - nnz / elements if elements else 0.0,
            "bytes_dense": sum(w.bytes_dense for w in weights),
            "bytes_stored": sum(w.bytes_stored for w in weights),
            "other_tensors": len(tensors),
            "other_bytes": sum(t.nbytes for t in tensors),
            "changed": sum(w.changed for w in weights) + sum(t.changed for t in tensors),
        }

    def as_json(self) -> dict[str, Any]:
        """The content of ``flashllm.json``."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **_plain(asdict(self.identity)),
            "totals": self.totals(),
            "parts": [_part_as_json(part) for part in self.parts],
        }


def part_text(identity: Identity, part: Part) -> str:
    """The part of a file as it stands in its ``__metadata__``."""
    value = {"format": _FORMAT, "version": _VERSION, **_plain(asdict(identity)), "part": _part_as_json(part)}
    return json.dumps(value, separators=(",", ":"))


def parse_part(text: str, *, file: str, path: str) -> tuple[Identity, Part]:
    """The inverse of :func:`part_text`, for the file named ``file``; ``path`` is for messages.

    Raises ``FormatError``.
    """
    field = f"__metadata__.{NOTE}"
    fields = Fields(parse_json(text, field=field, path=path), field, path)
    _check_version(fields)
    identity = _identity(fields)
    part = _part(fields.entry("part"))
    fields.finish()
    if part.file != file:
        raise FormatError(field=f"{field}.part.file", expected=repr(file), got=brief(part.file), path=path)
    return identity, part


def parse_manifest(value: Mapping[str, Any], *, path: str) -> Manifest:
    """The manifest of parsed JSON, every field checked. Raises a ``FormatError`` that names the field."""
    fields = Fields(value, "", path)
    _check_version(fields)
    totals = fields.entry("totals")
    manifest = Manifest(identity=_identity(fields), parts=tuple(_part(one) for one in fields.entries("parts")))
    fields.finish()
    names = [w.name for part in manifest.parts for w in part.weights]
    names += [t.name for part in manifest.parts for t in part.tensors]
    for field, given in (("parts.file", [part.file for part in manifest.parts]), ("parts.name", names)):
        if len(set(given)) != len(given):
            twice = Counter(given).most_common(1)[0][0]
            raise FormatError(field=field, expected="names given once", got=f"{brief(twice)} twice", path=path)
    for key, wanted in manifest.totals().items():
        totals.same(key, wanted)
    totals.finish()
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory. Raises ``FormatError``, ``OSError``."""
    path = directory / MANIFEST_FILE
    return parse_manifest(read_json(path, most_bytes=_MAX_BYTES), path=str(path))


def rows_of(members: Sequence[Member]) -> Iterator[tuple[Member, slice]]:
    """Each member of a stored tensor with its rows there."""
    start = 0
    for member in members:
        yield member, slice(start, start + member.rows)
        start += member.rows


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _part_as_json(part: Part) -> dict[str, Any]:
    value: dict[str, Any] = _plain(asdict(part))
    for entry, weight in zip(value["weights"], part.weights, strict=True):
        entry |= {"sparsity": weight.sparsity, "bytes_dense": weight.bytes_dense}
    return value


def _check_version(fields: Fields) -> None:
    fields.same("format", _FORMAT)
    fields.same("version", _VERSION)


def _identity(fields: Fields) -> Identity:
    source, options = fields.entry("source"), fields.entry("options")
    identity = Identity(
        flashllm=fields.text("flashllm"),
        source=Origin(
            model_type=source.text("model_type"),
            name=source.text("name"),
            layers=source.count("layers"),
            fingerprint=source.text("fingerprint"),
        ),
        options=Options(
            format=options.one_of("format", FORMAT_CHOICES),
            n=options.counts("n"),
            dtype=options.one_of("dtype", DTYPE_CHOICES),
            fuse=options.flag("fuse"),
            gpu=options.text_or_none("gpu"),
        ),
    )
    source.finish()
    options.finish()
    return identity


def _part(fields: Fields) -> Part:
    file = fields.text("file")
    if not is_model_file(file):
        fields.refuse("file", f"{block_file(0)} and the like, or {OUTSIDE_FILE}", file)
    weights = tuple(_weight(one) for one in fields.entries("weights"))
    tensors = tuple(_tensor(one) for one in fields.entries("tensors"))
    fields.finish()
    return Part(file=file, weights=weights, tensors=tensors)


def _weight(fields: Fields) -> StoredWeight:
    shape = fields.counts("shape", least=1, most=MAX_DIMENSION)
    if len(shape) != 2:
        fields.refuse("shape", "two sizes (M, K)", list(shape))
    elements = shape[0] * shape[1]
    kind = fields.one_of("format", (*FORMATS, DENSE))
    fullest = None
    if kind == DENSE:
        fields.none("max_tile_nnz")
    else:
        fullest = fields.count("max_tile_nnz", most=TILE_M * TILE_K)
    weight = StoredWeight(
        name=fields.text("name"),
        shape=(shape[0], shape[1]),
        dtype=_dtype(fields),
        members=_members(fields, shape[0]),
        format=kind,
        why=fields.text("why"),
        bytes_stored=fields.count("bytes_stored"),
        nnz=fields.count("nnz", most=elements),
        max_tile_nnz=fullest,
        changed=fields.count("changed", most=elements),
        became_zero=fields.count("became_zero", most=elements),
    )
    fields.same("sparsity", weight.sparsity)
    fields.same("bytes_dense", weight.bytes_dense)
    fields.finish()
    return weight


def _tensor(fields: Fields) -> StoredTensor:
    shape = fields.counts("shape")
    tensor = StoredTensor(
        name=fields.text("name"),
        shape=shape,
        dtype=_dtype(fields),
        members=_members(fields, shape[0] if shape else 1),
        changed=fields.count("changed"),
    )
    fields.finish()
    return tensor


def _dtype(fields: Fields) -> DType:
    name = fields.one_of("dtype", DTYPES)
    return "fp16" if name == "fp16" else "bf16"


def _members(fields: Fields, rows: int) -> tuple[Member, ...]:
    found = []
    for one in fields.entries("members"):
        found.append(Member(name=one.text("name"), rows=one.count("rows"), dtype=one.text("dtype")))
        one.finish()
    if not found or sum(member.rows for member in found) != rows:
        fields.refuse("members", f"members of {rows} rows together", [member.rows for member in found])
    return tuple(found)
