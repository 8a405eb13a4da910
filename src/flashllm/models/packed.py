# SPDX-License-Identifier: Apache-2.0
"""A directory of sparse weights as a model that multiplies them by ``spmm``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.formats.base import DType
from flashllm.formats.bits import bfloat16
from flashllm.formats.weight import SparseWeight
from flashllm.io.checkpoint import Checkpoint, TensorInfo
from flashllm.io.manifest import StoredTensor, StoredWeight, rows_of
from flashllm.io.safetensors_file import LAYOUT_NAMES
from flashllm.io.sparse_model import SparseModel
from flashllm.models import forward, weights
from flashllm.models.config import ModelConfig, model_config
from flashllm.models.dense import to_nearest


class PackedModel:
    """Implements :class:`flashllm.models.quality.Model` in fp32, except that the inputs and outputs of products with
    the matrices of blocks have the type of those matrices.

    ``xp``: NumPy, or CuPy for the current GPU; ``backend`` as ``spmm`` takes it.
    """

    def __init__(self, model: SparseModel, *, xp: Any = np, backend: str | None = None) -> None:
        self.config: ModelConfig = model_config(model.config, path=str(model.path))
        self.xp, self.threads = xp, 1
        self._model, self._unpacked, self._backend = model, UnpackedModel(model), backend
        weights.check_tensors(self._unpacked, self.config)

    def outside(self) -> dict[str, Any]:
        """Embeddings, final norm and head."""
        return weights.outside(self._unpacked, self.config, xp=self.xp)

    def block(self, layer: int) -> tuple[dict[str, Any], forward.Linear]:
        """Norms and biases, and products with the packed matrices."""
        prefix = self.config.layout.prefix(layer) + "."
        small: dict[str, Any] = {}
        for name, entry in self._model.manifest.tensors.items():
            if name.startswith(prefix):
                array = self.xp.asarray(self._model.dense(name).astype(np.float32))
                for member, rows in rows_of(entry.members):
                    small[member.name.removeprefix(prefix)] = array[rows]
        products = _Products(self.xp, self._backend)
        for name, weight in self._model.manifest.weights.items():
            if name.startswith(prefix):
                matrix = self._model.matrix(name)
                for member, rows in rows_of(weight.members):
                    products.members[member.name.removeprefix(prefix).removesuffix(".weight")] = (name, rows)
                products.take(name, matrix, weight.dtype)
        return small, products


class UnpackedModel(Checkpoint):
    """The same directory as a checkpoint of dense matrices, zeros included, with which sparse products must agree."""

    def __init__(self, model: SparseModel) -> None:
        self.path, self.config, self._model = model.path, model.config, model
        self._places: dict[str, tuple[str, slice]] = {}
        self._last: tuple[str, NDArray[Any]] | None = None
        self.tensors = {}
        stored: tuple[tuple[str, StoredWeight | StoredTensor], ...] = (
            *model.manifest.weights.items(), *model.manifest.tensors.items(),
        )  # fmt: skip
        for name, entry in stored:
            for member, rows in rows_of(entry.members):
                self._places[member.name] = (name, rows)
                shape = (rows.stop - rows.start, *entry.shape[1:])
                dtype = LAYOUT_NAMES[entry.dtype]
                self.tensors[member.name] = TensorInfo(name=member.name, shape=shape, dtype=dtype, stored=dtype)

    def read(self, name: str) -> NDArray[Any]:
        """Rows of the stored tensor, decoded if packed; the last decoded matrix is kept for the other layers in it."""
        self.info(name)
        stored, rows = self._places[name]
        if stored not in self._model.manifest.weights:
            return self._model.dense(stored)[rows]
        if self._last is None or self._last[0] != stored:
            self._last = None  # freed before the next one is decoded
            matrix = self._model.matrix(stored)
            self._last = stored, matrix.to_dense() if isinstance(matrix, SparseWeight) else matrix
        return self._last[1][rows]

    def companions(self) -> Mapping[str, Path]:
        """The companions in the directory."""
        return self._model.companions()

    def close(self) -> None:
        """Release the matrix that was kept; nothing else stays open."""
        self._last = None


class _Products:
    """The products of one block. Layers packed as one matrix are multiplied together, once for each x."""

    def __init__(self, xp: Any, backend: str | None) -> None:
        self.members: dict[str, tuple[str, slice]] = {}
        """The matrix that holds each layer, and the rows in it, by name of the layer."""
        self._xp, self._backend = xp, backend
        self._matrices: dict[str, tuple[Any, DType]] = {}
        self._last: tuple[str, Any, Any] | None = None

    def take(self, name: str, matrix: Any, dtype: DType) -> None:
        """Use ``matrix``, packed or a dense array of ``dtype``, for the members that refer to ``name``."""
        if isinstance(matrix, SparseWeight):
            self._matrices[name] = (matrix if self._xp is np else matrix.to_device(), dtype)
        else:
            self._matrices[name] = (self._xp.asarray(matrix.astype(np.float32)), dtype)

    def __call__(self, name: str, x: Any) -> Any:
        matrix, rows = self.members[name]
        if self._last is None or self._last[0] != matrix or self._last[1] is not x:
            self._last = (matrix, x, self._multiply(matrix, x))
        return self._last[2][:, rows]

    def _multiply(self, name: str, x: Any) -> Any:
        from flashllm.matmul import spmm

        matrix, dtype = self._matrices[name]
        if not isinstance(matrix, SparseWeight):
            return to_nearest(to_nearest(x, dtype) @ matrix.T, dtype)
        return _wide(spmm(_narrow(x, dtype), matrix, backend=self._backend), dtype)


def _narrow(x: Any, dtype: DType) -> Any:
    """fp32 ``x`` [N, K] in the type that ``spmm`` takes."""
    if dtype == "fp16":
        with np.errstate(over="ignore"):  # infinity, as on a GPU
            return x.astype(np.float16)
    if isinstance(x, np.ndarray):
        return x.astype(bfloat16())
    return (to_nearest(x, dtype).view(np.uint32) >> 16).astype(np.uint16)


def _wide(y: Any, dtype: DType) -> Any:
    """The result of ``spmm``, as fp32."""
    if dtype == "bf16" and y.dtype == np.uint16:
        return (y.astype(np.uint32) << 16).view(np.float32)
    return y.astype(np.float32)
