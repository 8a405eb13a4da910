# SPDX-License-Identifier: Apache-2.0
"""The keys and values of every position that was computed, for all blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashllm.engine.arrays import empty
from flashllm.engine.shard import Shard
from flashllm.models.config import ModelConfig

_ELEMENT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """The cache of ``slots`` sequences of up to ``capacity`` positions. Kernels read only positions already written."""

    slots: int
    capacity: int
    layers: tuple[tuple[Any, Any], ...]
    """Keys and values of each block: [slots, kv_heads, capacity, head_dim], 16 bits."""

    @classmethod
    def create(cls, xp: Any, config: ModelConfig, shard: Shard, *, slots: int, capacity: int, dtype: Any) -> KvCache:
        """Allocate a cache. Raises ``DeviceMemoryError``."""
        shape = (config.layers, 2, slots, shard.kv_heads(config), capacity, config.head_dim)
        whole = empty(xp, shape, dtype, "cache of keys and values")
        return cls(slots=slots, capacity=capacity, layers=tuple((layer[0], layer[1]) for layer in whole))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(int(one.nbytes) for layer in self.layers for one in layer)


def cache_bytes(config: ModelConfig, shard: Shard, *, slots: int, capacity: int) -> int:
    """Bytes that :meth:`KvCache.create` allocates."""
    return config.layers * 2 * slots * shard.kv_heads(config) * capacity * config.head_dim * _ELEMENT_BYTES
