# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a model that multiplies dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.formats.sources import array_module
from flashllm.io.checkpoint import Checkpoint
from flashllm.models import forward, weights
from flashllm.models.config import ModelConfig, model_config
from flashllm.models.threads import threads_of


class DenseModel:
    """Implements :class:`flashllm.models.quality.Model` in ``dtype`` throughout; tensors are read when they are needed.

    ``narrow`` (``"fp16"`` or ``"bf16"``) rounds the inputs and outputs of products with the matrices of blocks, as a
    dense model on a GPU does; sums stay in ``dtype``.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, xp: Any = np, dtype: Any = np.float32, narrow: str | None = None
    ) -> None:
        self.config: ModelConfig = model_config(checkpoint.config, path=str(checkpoint.path))
        weights.check_tensors(checkpoint, self.config)
        self.xp, self.threads = xp, threads_of(xp)
        self._checkpoint, self._dtype, self._narrow = checkpoint, dtype, narrow

    def outside(self) -> dict[str, Any]:
        """Embeddings, final norm and head."""
        return weights.outside(self._checkpoint, self.config, xp=self.xp, dtype=self._dtype)

    def block(self, layer: int) -> tuple[dict[str, Any], forward.Linear]:
        """Norms and biases, and products with the matrices."""
        found = weights.block(self._checkpoint, self.config, layer, xp=self.xp, dtype=self._dtype)
        multiply = forward.multiply_by(found.linears)
        return dict(found.small), multiply if self._narrow is None else rounded(multiply, self._narrow)


def rounded(multiply: forward.Linear, dtype: str) -> forward.Linear:
    """``multiply`` with x and y rounded to ``dtype``, to nearest even."""
    return lambda name, x: to_nearest(multiply(name, to_nearest(x, dtype)), dtype)


def to_nearest(x: Any, dtype: str) -> Any:
    """``x`` in its own type, rounded to values that ``dtype`` (``"fp16"`` or ``"bf16"``) can represent."""
    if dtype == "fp16":
        with np.errstate(over="ignore"):  # infinity, as on a GPU
            return x.astype(np.float16).astype(x.dtype)
    xp = array_module(x)
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # Adding to the bits of a NaN may turn it into any number.
    return xp.where(x != x, x, bits.astype(np.uint32).view(np.float32).astype(x.dtype))
