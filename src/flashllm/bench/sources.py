# SPDX-License-Identifier: Apache-2.0
"""Where the dense weights of a case come from: made at random, or read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashllm.bench.cases import Group
from flashllm.bench.data import make_weights
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import DType
from flashllm.formats.bits import MAGNITUDE, RoundingTally, numpy_dtype
from flashllm.formats.sources import canonical_csr, dense_strips, scipy_strips

_STRIP_ROWS = 128


class Source(Protocol):
    """Gives the dense weights of a group at one of its sparsities."""

    def density(self, sparsity: float | None) -> float:
        """Expected fraction of nonzeros."""

    def dense(self, group: Group, sparsity: float | None, *, device: bool) -> Any:
        """W[M, K] as :func:`flashllm.bench.data.random_matrix` returns it."""


class RandomSource:
    """Random weights with the group's pattern and seed."""

    def density(self, sparsity: float | None) -> float:
        """1 - sparsity."""
        assert sparsity is not None
        return 1.0 - sparsity

    def dense(self, group: Group, sparsity: float | None, *, device: bool) -> Any:
        """Made on the device when ``device``, else on the host; the same bytes."""
        assert sparsity is not None
        return make_weights(group, sparsity, device=device)


class FileSource:
    """One matrix from a file, rounded to ``dtype``; held on the host as 16-bit patterns."""

    def __init__(self, path: Path, tensor: str | None, dtype: DType | None) -> None:
        """Read ``path``; ``dtype`` None means the type of a packed weight, else fp16.

        Raises ``ArgumentError``, ``FormatError`` or ``OSError`` with one line that says why, also for NaN and
        infinities, which leave no bound on the error of a product.
        """
        from flashllm.io.container import load_weight, packed_names
        from flashllm.io.matrices import read_matrix

        self.format: str | None = None
        """Format of a packed weight; ``None`` for other matrices."""
        names = packed_names(path, tensor)
        if names is not None:
            if len(names) > 1:
                raise ArgumentError("tensor", expected=f"one of {', '.join(map(repr, sorted(names)))}", got="None")
            weight = load_weight(path, name=names[0])
            if dtype is not None and dtype != weight.dtype:
                raise ArgumentError("dtype", expected=f"{weight.dtype}, the type of the packed weight", got=dtype)
            self.format, self.dtype, matrix = weight.format, weight.dtype, weight.to_dense()
        else:
            self.dtype, matrix = dtype or "fp16", read_matrix(path, tensor)
        self.name, self.tensor = path.name, tensor
        self.rounding = RoundingTally()
        if isinstance(matrix, np.ndarray):
            strips = dense_strips(matrix, self.dtype, _STRIP_ROWS, self.rounding)
        else:
            strips = scipy_strips(canonical_csr(matrix), self.dtype, _STRIP_ROWS, self.rounding)
        self.shape: tuple[int, int] = (int(matrix.shape[0]), int(matrix.shape[1]))
        self._bits = np.empty(self.shape, dtype=np.uint16)
        stored = finite = first = 0
        for strip in strips:
            self._bits[first : first + len(strip)] = strip
            stored += int(np.count_nonzero(strip & MAGNITUDE))
            finite += int(np.count_nonzero(np.isfinite(strip.view(numpy_dtype(self.dtype)))))
            first += len(strip)
        if finite < self._bits.size:
            got = f"{self._bits.size - finite:,} NaN or infinite"
            if overflows := self.rounding.report().became_infinite:
                got += f", {overflows:,} by rounding"
            raise FormatError(field=tensor or "file", expected=f"finite {self.dtype} values", got=got, path=str(path))
        self._density = stored / self._bits.size

    def density(self, sparsity: float | None) -> float:
        """Fraction of nonzeros in the file's matrix."""
        return self._density

    def dense(self, group: Group, sparsity: float | None, *, device: bool) -> Any:
        """The file's matrix, whatever the group."""
        if not device:
            return self._bits.view(numpy_dtype(self.dtype))
        import cupy

        bits = cupy.asarray(self._bits)
        return bits.view(cupy.float16) if self.dtype == "fp16" else bits
