# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory decoding a model takes, computed before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashllm.bench.decode_weights import DENSE, PARTS
from flashllm.engine.engine import PREFILL_ROWS
from flashllm.engine.forward import parts_shape
from flashllm.engine.kv_cache import cache_bytes
from flashllm.engine.shard import Shard
from flashllm.errors import DeviceMemoryError
from flashllm.models.config import ModelConfig
from flashllm.models.layout import OPT_POSITION_OFFSET
from flashllm.registry import weight_class

_CUBLAS_BYTES = 2 * (32 << 20)  # a handle for dense matrices, one for expanded ones
_KERNEL_BYTES = 1 << 30
"""Code of kernels, partial sums of products and of attention, and what the driver keeps."""
_RESTS = 0.02
"""Fraction of the packed weights' bytes for remainders of pool blocks that encoders allocated from and that are too
small for anything else. On an H200, 0.9 GB of 37.9 and 1.9 of 99.9 were observed."""
_LEAST_EXPANDED_ROWS = 65


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each GPU."""

    matrices: int
    other_weights: int
    """Embeddings, head, norms, biases."""
    making: int
    """A dense matrix, and what its encoder needs, while the last weight is made."""
    cache: int
    activations: int
    """Activations and logits."""
    workspace: int
    rests: int
    """Unusable remainders in the memory pool, and what kernels and the driver take."""

    @property
    def needed(self) -> int:
        """Peak memory: the most that is needed at any time."""
        weights = self.matrices + self.other_weights + self.rests
        return weights + max(self.making, self.cache + self.activations + self.workspace)

    def lines(self) -> str:
        """The sum as text for people."""
        parts = {
            "matrices": self.matrices,
            "other weights": self.other_weights,
            "keys and values": self.cache,
            "activations and logits": self.activations,
            "workspace": self.workspace,
            "kernels and rests": self.rests,
        }
        return " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()) + (
            f" (or {self.making / 1e9:.2f} to make the last matrix): {self.needed / 1e9:.2f} GB"
        )


def plan_memory(
    config: ModelConfig,
    formats: Mapping[str, str],
    *,
    sparsity: float,
    batch: int,
    prompt: int,
    output: int,
    shard: Shard,
) -> MemoryPlan:
    """The memory for ``batch`` sequences of ``prompt`` and ``output`` tokens with random weights of these formats."""
    sizes = {part: shard.shape(config, part) for part in PARTS}
    stored = {
        part: 2 * m * k if formats[part] == DENSE else weight_class(formats[part]).estimated_bytes((m, k), 1 - sparsity)
        for part, (m, k) in sizes.items()
    }
    packed = [2 * m * k for part, (m, k) in sizes.items() if formats[part] != DENSE]
    largest = max(2 * m * k for m, k in sizes.values())
    tables = config.vocab * (1 if config.tied else 2) + (config.positions + OPT_POSITION_OFFSET if config.is_opt else 0)
    vectors = 2 * config.hidden + config.layers * (4 * config.hidden + sum(m for m, _ in sizes.values()))
    rows = max(batch, min(PREFILL_ROWS, batch * prompt))
    # x, the residual stream in fp32, q, k and v twice, the output of the heads, up and active.
    per_row = 6 * config.hidden + 2 * (2 * sizes["qkv"][0] + sizes["out"][1] + sizes["up"][0] + sizes["down"][1])
    last = 6 * config.hidden * batch  # x and the residual stream again, for rows whose logits are wanted
    y = 2 * sum(math.prod(parts_shape(count, config.hidden, shard.count)) for count in (rows, batch))
    expanded = max(packed) if packed and batch * prompt >= _LEAST_EXPANDED_ROWS else 0
    matrices = config.layers * sum(stored.values())
    return MemoryPlan(
        matrices=matrices,
        other_weights=2 * (tables * config.hidden + vectors),
        making=2 * largest if packed else 0,
        cache=cache_bytes(config, shard, slots=batch, capacity=prompt + output),
        activations=rows * per_row + last + y + 4 * batch * config.vocab,
        workspace=_CUBLAS_BYTES + expanded,
        rests=_KERNEL_BYTES + (int(_RESTS * matrices) if packed else 0),
    )


def check_memory(plan: MemoryPlan, free: int, what: str) -> None:
    """Raise a ``DeviceMemoryError`` that shows the sum if ``what`` does not fit into ``free`` bytes."""
    if plan.needed > free:
        raise DeviceMemoryError(f"{what}: {plan.lines()}", needed=plan.needed, free=free)
