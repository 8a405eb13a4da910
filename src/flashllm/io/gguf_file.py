# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a checkpoint: quantised matrices become float32; names and row order become those of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
from flashllm.formats.bits import bfloat16
from flashllm.io.checkpoint import Checkpoint, TensorInfo
from flashllm.io.files import open_regular
from flashllm.io.gguf_header import TYPES, GgufTensor, read_gguf_header
from flashllm.io.gguf_names import ROPE_FREQS, config_of, public_names, rotary_heads

INSTALL = 'pip install "gguf>=0.17.1"'
_TOKENIZER = "tokenizer.ggml."
_STORED_AS_READ = ("F32", "F16", "BF16")
_STRIP_ELEMENTS = 1 << 20


class GgufCheckpoint(Checkpoint):
    """An open ``.gguf`` file of architecture llama (also Mistral), qwen2 or qwen3.

    F32, F16 and BF16 tensors are returned as they are stored; Q4_0, Q4_1, Q6_K and Q8_0 are dequantised to float32,
    which needs the package ``gguf``. llama.cpp has permuted the rows of q and k of llama models; ``read`` returns them
    in Hugging Face's order.
    """

    tokenizer: Mapping[str, Any]
    """The metadata ``tokenizer.ggml.*`` without that prefix: ``model``, ``pre``, ``tokens``, ``merges``,
    ``token_type``, ``scores``, ``bos_token_id``, ``add_bos_token``, ... as far as the file has them. Arrays of strings
    are tuples of ``str``, arrays of numbers NumPy arrays."""
    chat_template: str | None
    """The Jinja template of conversations, where the file has one."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and check its header.

        Raises a ``FormatError`` that names the field for a header that breaks the format, and for a tensor type or an
        architecture that is not supported; ``OSError`` for an unreadable file.
        """
        self.path = Path(path)
        self._file = open_regular(path)
        try:
            header = read_gguf_header(self._file, str(path))
            self._tensors = public_names(header)
            freqs = header.tensors.get(ROPE_FREQS)
            self.config = config_of(header, self._tensors, None if freqs is None else self._stored(freqs))
        except BaseException:
            self._file.close()
            raise
        self.tensors = {name: _info(name, tensor) for name, tensor in self._tensors.items()}
        metadata = header.metadata
        self.tokenizer = MappingProxyType(
            {key[len(_TOKENIZER) :]: value for key, value in metadata.items() if key.startswith(_TOKENIZER)}
        )
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def read(self, name: str) -> NDArray[Any]:
        """Tensor ``name``: mapped read-only if the file stores it in the form that is returned, else a new array.

        This takes no more than a few megabytes besides the array itself. Raises ``MissingDependencyError`` for a
        quantised tensor without the package ``gguf``.
        """
        self.info(name)
        if self._file.closed:
            raise ArgumentError("checkpoint", expected="an open one", got=f"{self.path}, closed")
        tensor = self._tensors[name]
        heads = rotary_heads(name, self.config)
        places = slice(None) if heads is None else _places_of_rows(tensor.shape[0], heads)
        if tensor.type not in _STORED_AS_READ:
            return self._dequantised(tensor, places)
        stored = self._stored(tensor)
        if heads is None:
            return stored
        out = np.empty_like(stored)
        out[places] = stored
        return out

    def companions(self) -> Mapping[str, Path]:
        """None: everything is in the one file."""
        return {}

    def close(self) -> None:
        """Close the file. Arrays that ``read`` returned stay valid; further calls of ``read`` fail."""
        self._file.close()

    def _bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self._file, np.uint8, "r", tensor.start, (tensor.nbytes,)))

    def _stored(self, tensor: GgufTensor) -> NDArray[Any]:
        """The tensor in its own dtype, mapped; for a quantised one, its bytes."""
        dtypes: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": bfloat16()}
        raw = self._bytes(tensor)
        return raw.view(dtypes[tensor.type]).reshape(tensor.shape) if tensor.type in dtypes else raw

    def _dequantised(self, tensor: GgufTensor, places: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        """The values of a quantised tensor, with row i of the file at ``places[i]`` of its first dimension."""
        dequantise = _dequantiser(tensor.type)
        kind = TYPES[tensor.type]
        width = tensor.shape[-1]
        raw = self._bytes(tensor).reshape(-1, width // kind.block * kind.size)
        out = np.empty(tensor.shape, np.float32)
        rows = out.reshape(-1, width)  # a view: the same as `out` for matrices
        step = max(1, _STRIP_ELEMENTS // width)
        for first in range(0, len(raw), step):
            strip = raw[first : first + step]
            part = dequantise(strip)
            if part.shape != (len(strip), width) or part.dtype != np.float32:
                raise FormatError(
                    field=tensor.name, expected=f"{len(strip)} rows of {width} float32 from the package gguf",
                    got=f"{part.dtype} of shape {part.shape}", path=str(self.path),
                )  # fmt: skip
            if isinstance(places, slice):
                rows[first : first + len(strip)] = part
            else:
                rows[places[first : first + len(strip)]] = part
        return out


def _info(name: str, tensor: GgufTensor) -> TensorInfo:
    dtype = tensor.type if tensor.type in _STORED_AS_READ else "F32"
    return TensorInfo(name=name, shape=tensor.shape, dtype=dtype, stored=tensor.type)


def _places_of_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """Where each row of a permuted q or k belongs: within a head, the file has the rows 0, d/2, 1, d/2 + 1, ..."""
    order = np.arange(rows, dtype=np.intp).reshape(heads, 2, -1)
    return order.swapaxes(1, 2).reshape(-1)


def _dequantiser(kind: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The function of the package ``gguf`` for rows of type ``kind``. Raises ``MissingDependencyError``."""
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingDependencyError(f"dequantising {kind} needs the package gguf ({error}): {INSTALL}") from error
    code = GGMLQuantizationType(TYPES[kind].code)

    def dequantise(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
            values: NDArray[np.float32] = dequantize(rows, code)
        return values

    return dequantise
