# SPDX-License-Identifier: Apache-2.0
"""Read a directory of sparse weights that ``flashllm convert`` has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.formats.weight import SparseWeight
from flashllm.io.container import ContainerFile
from flashllm.io.hf_directory import CONFIG_NAME, MAX_CONFIG_BYTES
from flashllm.io.manifest import (
    DENSE,
    MANIFEST_FILE,
    NOTE,
    Manifest,
    Part,
    StoredTensor,
    StoredWeight,
    parse_part,
    read_manifest,
)
from flashllm.io.safetensors_file import LAYOUT_NAMES, read_json


def is_sparse_model(path: str | Path) -> bool:
    """Whether ``path`` is a directory that has a manifest."""
    return (Path(path) / MANIFEST_FILE).is_file()


class SparseModel:
    """A directory of sparse weights: its configuration and manifest, and each tensor on request.

    Nothing stays open or is kept in memory between calls.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read ``flashllm.json`` and ``config.json``.

        Raises ``ArgumentError`` for a path that is not such a directory, ``FormatError`` for files that break their
        format, and ``FileNotFoundError``.
        """
        path = Path(directory)
        if not path.exists():
            raise FileNotFoundError(f"directory: expected sparse weights, found nothing at {str(path)!r}")
        if not is_sparse_model(path):
            raise ArgumentError(
                "directory", expected=f"one of `flashllm convert`, with {MANIFEST_FILE}", got=repr(str(path))
            )
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        """What the directory holds."""
        self.config: Mapping[str, Any] = read_json(path / CONFIG_NAME, most_bytes=MAX_CONFIG_BYTES)
        """The content of ``config.json``, as the source had it."""
        self._weights = self.manifest.weights
        self._tensors = self.manifest.tensors
        self._parts = {part.file: part for part in self.manifest.parts}
        self._files = {w.name: part.file for part in self.manifest.parts for w in part.weights}
        self._files |= {t.name: part.file for part in self.manifest.parts for t in part.tensors}
        self._checked: set[str] = set()

    def companions(self) -> Mapping[str, Path]:
        """Other files in the directory that came with the checkpoint, by name: tokenizer, generation config."""
        own = {MANIFEST_FILE, CONFIG_NAME, *self._parts}
        found = sorted(path for path in self.path.iterdir() if path.name not in own and not path.name.startswith("."))
        return {path.name: path for path in found if path.is_file()}

    def entry(self, name: str) -> StoredWeight:
        """The manifest's entry of matrix ``name``, e.g. ``model.layers.0.mlp.down_proj``. Raises ``ArgumentError``."""
        if name not in self._weights:
            raise ArgumentError("name", expected=f"a matrix of {self.path}", got=brief(name))
        return self._weights[name]

    def weight(self, name: str, *, validate: bool = True, mmap: bool = False) -> SparseWeight:
        """Matrix ``name``, which is stored sparse: on the host, and validated.

        ``validate=False`` is only for files that you wrote yourself: kernels trust the content. ``mmap`` maps the
        buffers.
        Raises ``ArgumentError`` for an unknown name and for a matrix that is stored dense,
        ``FormatError`` for a file that is damaged or does not hold what the manifest says.
        """
        entry = self.entry(name)
        if entry.format == DENSE:
            raise ArgumentError("name", expected="a matrix that is stored sparse", got=f"{brief(name)}, which is dense")
        with self._open(name) as file:
            if name not in file.weights:
                self._disagree(file, name, "a weight", "none")
            weight = file.weight(name, validate=validate, mmap=mmap)
            for field, wanted in (
                ("format", entry.format), ("shape", entry.shape), ("dtype", entry.dtype), ("nnz", entry.nnz),
            ):  # fmt: skip
                if getattr(weight, field) != wanted:
                    self._disagree(file, f"{name}.{field}", wanted, getattr(weight, field))
            return weight

    def dense(self, name: str, *, mmap: bool = False) -> NDArray[Any]:
        """Tensor ``name`` that is stored dense, float16 or bfloat16: a norm, a bias, an embedding, or ``NAME.weight``
        of a matrix NAME that stayed dense.

        ``mmap`` maps it read-only. Raises ``ArgumentError`` for an unknown name, ``FormatError`` for a file that is
        damaged or does not hold what the manifest says.
        """
        entry: StoredTensor | StoredWeight | None = self._tensors.get(name)
        matrix = name.removesuffix(".weight")
        if entry is None and name != matrix and matrix in self._weights and self._weights[matrix].format == DENSE:
            entry = self._weights[matrix]
        if entry is None:
            raise ArgumentError("name", expected=f"a tensor of {self.path} that is stored dense", got=brief(name))
        with self._open(entry.name) as file:
            if name not in file.header.tensors:
                self._disagree(file, name, "a tensor", "none")
            found = file.header.tensors[name]
            for field, wanted in (("shape", entry.shape), ("dtype", LAYOUT_NAMES[entry.dtype])):
                if getattr(found, field) != wanted:
                    self._disagree(file, f"{name}.{field}", wanted, getattr(found, field))
            return file.tensor(name, mmap=mmap)

    def matrix(self, name: str, *, validate: bool = True, mmap: bool = False) -> SparseWeight | NDArray[Any]:
        """Matrix ``name`` as it is stored: sparse, or dense [M, K]. Raises as :meth:`weight` and :meth:`dense`."""
        if self.entry(name).format == DENSE:
            return self.dense(f"{name}.weight", mmap=mmap)
        return self.weight(name, validate=validate, mmap=mmap)

    def _open(self, name: str) -> ContainerFile:
        part = self._parts[self._files[name]]
        file = ContainerFile(self.path / part.file)
        try:
            if part.file not in self._checked:
                self._check(file, part)
                self._checked.add(part.file)
        except BaseException:
            file.__exit__(None, None, None)
            raise
        return file

    def _check(self, file: ContainerFile, part: Part) -> None:
        """Check that the file is of this conversion, not of another that happens to have the same names."""
        text = file.header.metadata.get(NOTE, "")
        identity, found = parse_part(text, file=part.file, path=file.header.path)
        if identity != self.manifest.identity or found != part:
            self._disagree(file, f"__metadata__.{NOTE}", "this part of the conversion", "another")

    def _disagree(self, file: ContainerFile, field: str, wanted: object, got: object) -> NoReturn:
        expected = f"{wanted if isinstance(wanted, str) else brief(wanted)}, as {MANIFEST_FILE} says"
        raise FormatError(field=field, expected=expected, got=brief(got), path=file.header.path)
