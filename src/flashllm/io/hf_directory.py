# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint: a directory with ``config.json`` and safetensors files.

The tensors are in ``model.safetensors``, or in shards whose content ``model.safetensors.index.json`` lists. Only files
of the directory itself are read (they may be symbolic links, as in the Hugging Face cache). Pickles, such as
``pytorch_model.bin``, are never read, since loading one runs the code in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.io.checkpoint import Checkpoint, TensorInfo
from flashllm.io.manifest import is_model_file
from flashllm.io.safetensors_file import TensorEntry, TensorFile, read_json

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
"""Name of the file that says which shard of a checkpoint holds which tensor."""
TOKENIZER_NAME = "tokenizer.json"
RECORD_NAME = "prune.json"
COMPANIONS = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    RECORD_NAME,
)
"""Files beside the weights that a copy of a checkpoint needs; the last is `flashllm prune`'s own."""
MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 8 << 20  # the index of a model of 405 billion parameters has 0.1 MB
_MAX_SHARDS = 1000  # each is an open file; a model of 405 billion parameters has 191


class HfCheckpoint(Checkpoint):
    """An open directory in the Hugging Face layout; tensors are mapped, not read.

    OPT checkpoints whose tensor names lack the leading ``model.`` have it here.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the directory ``path`` and check its config, its index and the header of each shard.

        Raises ``ArgumentError`` if ``path`` is not a directory, a ``FormatError`` that names file and field for content
        that breaks the layout, and ``FileNotFoundError`` for a missing file.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise ArgumentError("path", expected="a directory with config.json", got=repr(str(path)))
        self.config = read_json(self.path / CONFIG_NAME, most_bytes=MAX_CONFIG_BYTES)
        self._closed = False
        with ExitStack() as stack:
            places = self._open(stack)
            self._files = stack.pop_all()
        self._places = {self._public_name(name): place for name, place in places.items()}
        if len(self._places) != len(places):
            self._files.close()
            twice = next(name for name in places if self._public_name(name) in places and name not in self._places)
            raise FormatError(
                field=twice, expected="each tensor once", got=f"{self._public_name(twice)} too", path=str(self.path)
            )
        self.tensors = {
            name: TensorInfo(name=name, shape=entry.shape, dtype=entry.dtype, stored=entry.dtype)
            for name, (_, entry) in self._places.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        """Tensor ``name``, mapped read-only, in its stored dtype."""
        self.info(name)
        if self._closed:
            raise ArgumentError("checkpoint", expected="an open one", got=f"{self.path}, closed")
        file, entry = self._places[name]
        return file.read(entry, mmap=True)

    def companions(self) -> Mapping[str, Path]:
        """Those of ``COMPANIONS`` that are in the directory."""
        return {name: self.path / name for name in COMPANIONS if (self.path / name).is_file()}

    def close(self) -> None:
        """Close the files. Arrays that ``read`` returned stay valid; further calls of ``read`` fail."""
        self._closed = True
        self._files.close()

    def _public_name(self, name: str) -> str:
        if self.config.get("model_type") == "opt" and name.startswith("decoder."):
            return f"model.{name}"
        return name

    def _open(self, stack: ExitStack) -> dict[str, tuple[TensorFile, TensorEntry]]:
        """Every tensor with the file it lies in."""
        if _exists(self.path / SINGLE_NAME):
            file = stack.enter_context(TensorFile(self.path / SINGLE_NAME))
            return {name: (file, entry) for name, entry in file.header.tensors.items()}
        if _exists(self.path / INDEX_NAME):
            return self._open_shards(stack)
        raise FormatError(
            field="files", expected=f"{SINGLE_NAME} or {INDEX_NAME}", got=self._instead(), path=str(self.path)
        )

    def _open_shards(self, stack: ExitStack) -> dict[str, tuple[TensorFile, TensorEntry]]:
        path = self.path / INDEX_NAME
        found = _shards(read_json(path, most_bytes=_MAX_INDEX_BYTES).get("weight_map"), str(path))
        places: dict[str, tuple[TensorFile, TensorEntry]] = {}
        for shard, names in found.items():
            file = stack.enter_context(TensorFile(self.path / shard))
            held = file.header.tensors
            for name in names:
                if name not in held:
                    raise FormatError(
                        field=f"weight_map.{name}", expected=f"a tensor of {shard}", got="none there", path=str(path)
                    )
            for name, entry in held.items():
                if name in places:
                    got = f"one in {Path(places[name][0].header.path).name} too"
                    raise FormatError(field=name, expected="a tensor in one shard", got=got, path=file.header.path)
                if name not in names:
                    expected = f"in weight_map of {INDEX_NAME} with {shard}"
                    raise FormatError(field=name, expected=expected, got="not so", path=file.header.path)
                places[name] = file, entry
        return places

    def _instead(self) -> str:
        """What the directory has in place of safetensors files."""
        others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
        pickles = [name for name in others if _exists(self.path / name)]
        if not pickles:
            # The manifest comes last, so files of a conversion alone are those of one that was interrupted.
            converted = any(is_model_file(file.name) for file in self.path.iterdir())
            return "neither, but files of a conversion: finish it with --resume" if converted else "neither"
        return (
            f"only {pickles[0]}: a pickle, which can run code when loaded, so it is never read; convert it to "
            "safetensors where you trust it, e.g. with save_pretrained(..., safe_serialization=True) of transformers"
        )


def _exists(path: Path) -> bool:
    """Whether there is anything called ``path``, even a link that leads nowhere."""
    return os.path.lexists(path)


def _shards(weight_map: object, path: str) -> dict[str, set[str]]:
    """Names of tensors by shard, in the order of ``weight_map``."""
    if not isinstance(weight_map, dict) or not weight_map:
        expected = "an object with a file name for each tensor"
        raise FormatError(field="weight_map", expected=expected, got=brief(weight_map), path=path)
    found: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # A name with a folder could lead out of the directory.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or any(c in shard for c in "/\\\0")
            or not shard.isprintable()
        ):
            expected = "the name of a .safetensors file in the same directory, without folders"
            raise FormatError(field=f"weight_map.{name}", expected=expected, got=brief(shard), path=path)
        found.setdefault(shard, set()).add(name)
        if len(found) > _MAX_SHARDS:
            raise FormatError(field="weight_map", expected=f"at most {_MAX_SHARDS} files", got="more", path=path)
    return found
