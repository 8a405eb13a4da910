# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a language model: its configuration, and its tensors by Hugging Face name, read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from flashllm.errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    name: str
    """As in Hugging Face checkpoints, e.g. ``model.layers.0.self_attn.q_proj.weight``."""
    shape: tuple[int, ...]
    dtype: str
    """Type that ``read`` returns: ``F16``, ``BF16``, ``F32``, or another safetensors name."""
    stored: str
    """Type that the file holds: the same, or a GGUF type such as ``Q4_1``."""


class Checkpoint(ABC):
    """An open checkpoint; use it in a ``with`` block. :func:`open_checkpoint` finds the class that reads a path."""

    path: Path
    config: Mapping[str, Any]
    """The content of ``config.json``; for a GGUF file, its metadata in the same terms."""
    tensors: Mapping[str, TensorInfo]
    """All tensors by name, in the order of the files."""

    @abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """Tensor ``name``, C-contiguous, on the host: mapped read-only or a copy. bf16 is ``ml_dtypes.bfloat16``.

        The checkpoint does not keep it. Raises ``ArgumentError`` for an unknown name, ``FormatError`` for a tensor that
        cannot be read.
        """

    @abstractmethod
    def companions(self) -> Mapping[str, Path]:
        """Files beside the weights that a copy of the checkpoint needs, by file name: tokenizer, generation config."""

    @abstractmethod
    def close(self) -> None:
        """Close the files. Arrays that ``read`` returned stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        """The entry of tensor ``name``. Raises ``ArgumentError``."""
        if name not in self.tensors:
            raise ArgumentError("name", expected=f"a tensor of {self.path}", got=repr(name))
        return self.tensors[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a Hugging Face directory with safetensors, or a ``.gguf`` file.

    Raises ``ArgumentError`` for anything else, ``FormatError`` for content that breaks its format, and
    ``FileNotFoundError``.
    """
    from flashllm.io.gguf_file import GgufCheckpoint
    from flashllm.io.hf_directory import HfCheckpoint

    place = Path(path)
    if place.is_dir():
        return HfCheckpoint(place)
    if place.suffix.lower() == ".gguf":
        return GgufCheckpoint(place)
    if not place.exists():
        raise FileNotFoundError(f"path: expected a checkpoint, found nothing at {str(place)!r}")
    raise ArgumentError("path", expected="a directory with config.json, or a .gguf file", got=repr(str(place)))
