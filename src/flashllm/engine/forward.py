# SPDX-License-Identifier: Apache-2.0
"""The launches of one forward pass: a list that is run directly, captured as a graph, or run in part for timing.

The residual stream and the logits are fp32; all other inputs and outputs of matrix products have the type of the
weights. The kernel after a product adds its bias. Where GPUs share a model, a product that feeds the residual stream
yields one part of a sum, rounded once: each GPU gathers all parts and adds them in fp32, in the order of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from flashllm.decoder.activate import relu, silu_mul
from flashllm.decoder.append import append
from flashllm.decoder.embed import embed
from flashllm.decoder.norm import add_norm
from flashllm.engine.arrays import ALIGNMENT, empty
from flashllm.engine.communicator import Communicator
from flashllm.engine.kv_cache import KvCache
from flashllm.engine.runtime import Runtime
from flashllm.engine.weights import Block, Weights
from flashllm.errors import ArgumentError
from flashllm.models.config import ModelConfig
from flashllm.models.forward import rope_frequencies
from flashllm.models.layout import OPT_POSITION_OFFSET

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["linear", "attention", "communication", "other"]
KINDS: tuple[Kind, ...] = ("linear", "attention", "communication", "other")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One or more launches of a pass."""

    kind: Kind
    run: Callable[[], object]


def run(operations: Iterable[Operation]) -> None:
    """Run all operations, in order."""
    for operation in operations:
        operation.run()


class Attend(Protocol):
    """Attention of the rows of a pass: writes ``out`` [R, heads * head_dim]."""

    def __call__(self, *, q: Any, keys: Any, values: Any, out: Any) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The token, position and cache slot of each row of a pass: int32 arrays on the device."""

    tokens: Any
    positions: Any
    slots: Any


class Residual:
    """Up to ``rows`` rows between two layers: the residual stream, what is still to be added to it, and its norm."""

    def __init__(self, xp: Any, weights: Weights, rows: int) -> None:
        hidden, kind = weights.config.hidden, numpy_type(weights.dtype)
        self.residual = empty(xp, (rows, hidden), np.float32, "activations")
        self.x = empty(xp, (rows, hidden), kind, "activations")
        self.y = empty(xp, parts_shape(rows, hidden, weights.shard.count), kind, "activations")
        """The parts of a sum, one from each rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in vars(self).values())

    def first(self, rows: int) -> Self:
        """Views of the first ``rows`` rows of all arrays."""
        views = object.__new__(type(self))
        views.__dict__ = {name: array[:rows] for name, array in vars(self).items() if name != "y"}
        parts, _, hidden = self.y.shape
        shape = parts_shape(rows, hidden, parts)
        views.y = self.y.reshape(-1)[: math.prod(shape)].reshape(shape)  # parts are gathered without gaps
        return views


class Activations(Residual):
    """The arrays that a pass of up to ``rows`` rows writes."""

    def __init__(self, xp: Any, weights: Weights, rows: int) -> None:
        super().__init__(xp, weights, rows)
        config, shard, kind = weights.config, weights.shard, numpy_type(weights.dtype)

        def make(*shape: int) -> Any:
            return empty(xp, (rows, *shape), kind, "activations")

        self.qkv = make(shard.shape(config, "qkv")[0])
        self.q = make(shard.heads(config), config.head_dim)
        self.mixed = make(shard.heads(config) * config.head_dim)
        self.up = make(shard.shape(config, "up")[0])
        self.active = make(shard.ffn(config))


class Forward:
    """Makes the operations of passes over one model, cache and runtime."""

    def __init__(
        self, runtime: Runtime, weights: Weights, cache: KvCache, communicator: Communicator | None = None
    ) -> None:
        """Raises ``ArgumentError`` for a shard without ``communicator``."""
        if communicator is None and weights.shard.count > 1:
            raise ArgumentError("communicator", expected="that of the group which shares the model", got="none")
        self._runtime, self._weights, self._cache, self._communicator = runtime, weights, cache, communicator
        self._config, self._dtype = weights.config, weights.dtype
        self._rotation = None if self._config.is_opt else rotation_table(runtime, self._config, cache.capacity)
        self._kind = "layer" if self._config.is_opt else "rms"

    @property
    def nbytes(self) -> int:
        """Bytes that this object itself holds: the table of rotary positions."""
        return 0 if self._rotation is None else int(self._rotation.nbytes)

    def prepare(self, rows: int) -> None:
        """Choose how products are computed in passes of ``rows`` rows."""
        parts = zip(*(block.matrices for block in self._weights.blocks), strict=True)
        self._runtime.products.prepare([w for part in parts for w in part], rows)

    def blocks(self, rows: Rows, a: Activations, attend: Attend) -> list[Operation]:
        """The operations of all blocks. They leave the residual stream without the last sum: :meth:`head` adds ``a.y``
        and the last ``down_bias``.
        """
        launch, weights, config = self._runtime.launch, self._weights, self._config
        operations = [
            Operation(
                kind="other",
                run=partial(
                    embed,
                    launch,
                    dtype=self._dtype,
                    tokens=rows.tokens,
                    positions=rows.positions,
                    table=weights.embedding,
                    residual=a.residual,
                    position_table=weights.positions,
                    position_offset=OPT_POSITION_OFFSET if config.is_opt else 0,
                ),
            )
        ]
        y, y_bias = None, None
        for block, (keys, values) in zip(weights.blocks, self._cache.layers, strict=True):
            norm = (block.attention_norm, block.attention_norm_bias)
            operations.append(self._norm(a.residual, a.x, norm, y, y_bias))
            operations += self._attention(block, rows, a, keys, values, attend)
            norm = (block.ffn_norm, block.ffn_norm_bias)
            operations.append(self._norm(a.residual, a.x, norm, a.y, block.out_bias))
            operations += self._feed_forward(block, a)
            y, y_bias = a.y, block.down_bias
        return operations

    def head(self, a: Residual, logits: Any) -> list[Operation]:
        """The operations after :meth:`blocks`, which write fp32 ``logits`` [R, vocab] for the rows of ``a``."""
        weights = self._weights
        last = weights.blocks[-1].down_bias
        return [
            self._norm(a.residual, a.x, (weights.norm, weights.norm_bias), a.y, last),
            self._product(a.x, weights.head, logits),
        ]

    def prepare_head(self, rows: int) -> None:
        """As :meth:`prepare`, for the product that computes logits."""
        # All ranks of a group compute all logits and must choose the same tokens.
        self._runtime.products.prepare([self._weights.head], rows, out="fp32", timed=self._communicator is None)

    def _attention(
        self, block: Block, rows: Rows, a: Activations, keys: Any, values: Any, attend: Attend
    ) -> list[Operation]:
        added = partial(
            append,
            self._runtime.launch,
            dtype=self._dtype,
            qkv=a.qkv,
            slots=rows.slots,
            positions=rows.positions,
            q=a.q,
            keys=keys,
            values=values,
            bias=block.qkv_bias,
            rotation=self._rotation,
            q_norm=block.q_norm,
            k_norm=block.k_norm,
            eps=self._config.norm_eps,
        )
        return [
            self._product(a.x, block.qkv, a.qkv),
            Operation(kind="other", run=added),
            Operation(kind="attention", run=partial(attend, q=a.q, keys=keys, values=values, out=a.mixed)),
            *self._sum(a.mixed, block.out, a.y),
        ]

    def _feed_forward(self, block: Block, a: Activations) -> list[Operation]:
        activate = relu if self._config.is_opt else silu_mul
        active = partial(activate, self._runtime.launch, dtype=self._dtype, y=a.up, x=a.active, bias=block.up_bias)
        return [
            self._product(a.x, block.up, a.up),
            Operation(kind="other", run=active),
            *self._sum(a.active, block.down, a.y),
        ]

    def _norm(self, residual: Any, x: Any, norm: Sequence[Any], y: Any, y_bias: Any) -> Operation:
        weight, bias = norm
        normed = partial(
            add_norm,
            self._runtime.launch,
            dtype=self._dtype,
            kind=self._kind,
            residual=residual,
            x=x,
            weight=weight,
            bias=bias,
            eps=self._config.norm_eps,
            y=y,
            y_bias=y_bias,
        )
        return Operation(kind="other", run=normed)

    def _product(self, x: Any, w: Any, y: Any) -> Operation:
        return Operation(kind="linear", run=partial(self._runtime.products.multiply, x, w, y))

    def _sum(self, x: Any, w: Any, y: Any) -> list[Operation]:
        """A product of which each rank writes its part into its place in ``y``, then gathers the others' parts."""
        operations = [self._product(x, w, y[self._weights.shard.index, : x.shape[0]])]
        if self._communicator is not None:
            operations.append(Operation(kind="communication", run=partial(self._communicator.all_gather, y)))
        return operations


def parts_shape(rows: int, hidden: int, parts: int) -> tuple[int, int, int]:
    """Shape of the parts of a sum of ``rows`` rows, padded with rows where the next part would be unaligned."""
    unit = 1 if parts == 1 else ALIGNMENT // math.gcd(ALIGNMENT, 2 * hidden)
    return parts, -(-rows // unit) * unit, hidden


def rotation_table(runtime: Runtime, config: ModelConfig, positions: int) -> Any:
    """cos and sin of every position and pair of elements: fp32 [positions, head_dim / 2, 2], computed in float64."""
    angles = np.arange(positions)[:, None] * rope_frequencies(config, np)
    table = empty(runtime.xp, (positions, config.head_dim // 2, 2), np.float32, "rotary positions")
    runtime.send(table, np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32))
    return table


def numpy_type(dtype: str) -> Any:
    """The NumPy type of an engine's arrays; bf16 values are held as their bits."""
    return np.float16 if dtype == "fp16" else np.uint16
