# SPDX-License-Identifier: Apache-2.0
"""Which part of each matrix a GPU has under tensor parallelism.

The split is Megatron-LM's (Shoeybi et al., 2019, arXiv 1909.08053, section 3): q, k, v and the first of the
feed-forward layers are split by rows, and so by heads and by units. The other two are split by columns; their results
are parts of sums, which each GPU gathers from all. A block needs two such sums. Each GPU has the whole embeddings,
norms and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part ``index`` of a model that is divided into ``count`` equal parts."""

    index: int = 0
    count: int = 1

    def check(self, config: ModelConfig) -> None:
        """Raise ``ArgumentError`` that names what cannot be divided by ``count``."""
        if not 0 <= self.index < self.count:
            raise ArgumentError("rank", expected=f"0..{self.count - 1}", got=str(self.index))
        for what, size in (("heads", config.heads), ("KV heads", config.kv_heads), ("feed-forward units", config.ffn)):
            if size % self.count:
                raise ArgumentError("tp", expected=f"a divisor of the {size} {what}", got=str(self.count))

    def heads(self, config: ModelConfig) -> int:
        """Query heads of this part."""
        return config.heads // self.count

    def kv_heads(self, config: ModelConfig) -> int:
        """Heads of keys and values of this part."""
        return config.kv_heads // self.count

    def ffn(self, config: ModelConfig) -> int:
        """Feed-forward units of this part."""
        return config.ffn // self.count

    def shape(self, config: ModelConfig, part: str) -> tuple[int, int]:
        """M and K of this part's matrix ``part``: ``qkv``, ``out``, ``up`` or ``down``."""
        q = self.heads(config) * config.head_dim
        kv = self.kv_heads(config) * config.head_dim
        ffn = self.ffn(config)
        shapes = {
            "qkv": (q + 2 * kv, config.hidden),
            "out": (config.hidden, q),
            "up": (ffn if config.is_opt else 2 * ffn, config.hidden),
            "down": (config.hidden, ffn),
        }
        return shapes[part]

    def rows(self, config: ModelConfig, part: str, whole: NDArray[Any]) -> NDArray[Any]:
        """This part's rows of ``qkv`` or ``up``, or of their bias, from each of the layers joined in it."""
        if self.count == 1:
            return whole
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        sizes = (q, kv, kv) if part == "qkv" else (config.ffn,) * (1 if config.is_opt else 2)
        pieces, first = [], 0
        for size in sizes:
            own = size // self.count
            pieces.append(whole[first + self.index * own : first + (self.index + 1) * own])
            first += size
        return np.concatenate(pieces)

    def matrix(self, config: ModelConfig, part: str, whole: NDArray[Any]) -> NDArray[Any]:
        """This part of a dense matrix [M, K]."""
        if self.count == 1:
            return whole
        if part in ("qkv", "up"):
            return self.rows(config, part, whole)
        own = whole.shape[1] // self.count
        return np.ascontiguousarray(whole[:, self.index * own : (self.index + 1) * own])


WHOLE = Shard()
"""A model that is not divided."""
