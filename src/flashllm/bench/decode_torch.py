# SPDX-License-Identifier: Apache-2.0
"""A dense decoder in PyTorch, to compare with: static cache, and the whole step compiled into one CUDA graph.

The idea is that of gpt-fast (github.com/meta-pytorch/gpt-fast), for any batch: no Python runs within a step, and no
shape changes from step to step. Matrices are fused as in our engine. Activations, including the residual stream, have
the type of the weights, as is usual in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from flashllm.engine.engine import PREFILL_ROWS, check_prompt, check_sizes
from flashllm.engine.weights import Block, Weights
from flashllm.errors import ArgumentError, MissingDependencyError
from flashllm.models.forward import rope_frequencies
from flashllm.models.layout import OPT_POSITION_OFFSET

MODE = "reduce-overhead"
"""Mode of ``torch.compile``: CUDA graphs, and no search for the fastest kernels."""
_ALIGNED = 16  # elements: fused attention needs mask rows aligned so, else PyTorch pads a copy of them in every step

Attend = Callable[[Any, Any, Any, Any, Any], Any]
"""``attend(keys, values, q, k, v)``: k and v [B, kv_heads, T, head_dim] are written into the cache of a block, and q
[B, heads, T, head_dim] attends to what it then holds; returns [B, heads, T, head_dim]."""


def import_torch() -> Any:
    """PyTorch. Raises ``MissingDependencyError``."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f'{error}: pip install "flashllm[finetune]"') from error
    return torch


def to_torch(weights: Weights) -> Weights:
    """The same weights as tensors that share their memory; ``weights`` are whole (no shard), their matrices dense."""
    torch = import_torch()
    kind = torch.float16 if weights.dtype == "fp16" else torch.bfloat16
    made: dict[int, Any] = {}

    def tensor(array: Any) -> Any:
        if array is None:
            return None
        if id(array) not in made:  # the head may be the embedding
            made[id(array)] = torch.from_dlpack(array.view(np.int16)).view(kind)
        return made[id(array)]

    outside = ("embedding", "head", "norm", "norm_bias", "positions")
    blocks = tuple(Block(**{name: tensor(array) for name, array in vars(block).items()}) for block in weights.blocks)
    return replace(weights, blocks=blocks, **{name: tensor(getattr(weights, name)) for name in outside})


def aligned_capacity(capacity: int) -> int:
    """Positions in the cache of a decoder that needs ``capacity`` of them."""
    return -(-capacity // _ALIGNED) * _ALIGNED


def prefill_rows(batch: int, prompt: int) -> int:
    """Prompt tokens in one pass of a decoder, which takes whole prompts."""
    return min(batch, max(1, PREFILL_ROWS // prompt)) * prompt


class TorchDecoder:
    """Greedily decodes ``batch`` sequences with prompts of equal length, each to ``capacity`` tokens at most in all.

    Everything is allocated here, on the device of the weights. In a step, attention reads the whole cache under a mask.
    """

    def __init__(self, weights: Weights, *, batch: int, capacity: int, compiled: bool = True) -> None:
        """``weights`` are tensors, from :func:`to_torch`. ``compiled``: by ``torch.compile``, when the first step runs.

        Raises ``ArgumentError`` for sizes that the model cannot have.
        """
        torch = import_torch()
        config = weights.config
        check_sizes(config, batch=batch, capacity=capacity)
        self.weights, self.batch, self.capacity = weights, batch, capacity
        self._torch, self._functional = torch, torch.nn.functional
        places = aligned_capacity(capacity)
        make = partial(torch.zeros, device=weights.embedding.device)
        # A tensor for each: PyTorch has to recognise that a compiled step may write in place, which views make hard.
        shape, kind = (batch, config.kv_heads, places, config.head_dim), weights.embedding.dtype
        self.cache = tuple((make(shape, dtype=kind), make(shape, dtype=kind)) for _ in range(config.layers))
        """Keys and values of each block: [batch, kv_heads, positions, head_dim]."""
        self.logits = make((batch, config.vocab), dtype=torch.float32)
        """What the last token of each sequence was chosen from."""
        self._tokens = make((batch, places), dtype=torch.int64)
        self._position = make(1, dtype=torch.int64)  # of the last tokens
        self._places = torch.arange(places, device=weights.embedding.device)
        self._rotation = None if config.is_opt else self._make_rotation(places)
        for tensor in self._lasting():
            torch._dynamo.mark_static_address(tensor)  # else a graph copies it into memory of its own in every step
        self.step: Callable[[], None] = self._step
        """Decodes one more token of every sequence. Does not wait for it."""
        if compiled:
            self.step = torch.compile(self._step, mode=MODE, fullgraph=True, dynamic=False)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(int(one.nbytes) for layer in self.cache for one in layer)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, one for each sequence, and choose the first token of each. None of this is compiled.

        Raises ``ArgumentError`` for prompts that are not equally long, too long, or have tokens unknown to the model.
        """
        if len(prompts) != self.batch or len({len(prompt) for prompt in prompts}) != 1:
            expected = f"{self.batch} of equal length"
            raise ArgumentError("prompts", expected=expected, got=f"lengths {[len(prompt) for prompt in prompts]}")
        for index, prompt in enumerate(prompts):
            vocab = self.weights.config.vocab
            check_prompt(prompt, f"prompts[{index}]", vocab=vocab, capacity=self.capacity, new_tokens=1)
        length = len(prompts[0])
        self._tokens[:, :length] = self._torch.tensor(prompts)
        each = prefill_rows(self.batch, length) // length
        for first in range(0, self.batch, each):
            rows = slice(first, first + each)
            tokens = self._tokens[rows, :length]
            hidden = self._blocks(tokens, self._places[:length], partial(self._attend_prompts, rows))
            self.logits[rows] = self._head(hidden.view(*tokens.shape, -1)[:, -1])
        self._tokens[:, length] = self.logits.argmax(dim=1)
        self._position.fill_(length)

    def tokens(self, first: int, count: int) -> list[list[int]]:
        """``count`` tokens of each sequence from position ``first`` on."""
        found: list[list[int]] = self._tokens[:, first : first + count].tolist()
        return found

    def _step(self) -> None:
        position = self._position
        seen = (self._places <= position)[None, None, None, :]
        tokens = self._tokens.index_select(1, position)
        hidden = self._blocks(tokens, position, partial(self._attend_cache, position, seen))
        self.logits.copy_(self._head(hidden))
        self._tokens.index_copy_(1, position + 1, self.logits.argmax(dim=1, keepdim=True))
        position.add_(1)

    def _attend_prompts(self, rows: slice, keys: Any, values: Any, q: Any, k: Any, v: Any) -> Any:
        keys[rows, :, : k.shape[2]] = k
        values[rows, :, : v.shape[2]] = v
        grouped = q.shape[1] != k.shape[1]
        return self._functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def _attend_cache(self, position: Any, seen: Any, keys: Any, values: Any, q: Any, k: Any, v: Any) -> Any:
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        # Query heads that share keys see the same positions, as several queries of one head would. With enable_gqa the
        # keys would be copied for each head: the fused kernels that support masks do not support shared keys.
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        mixed = self._functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen)
        return mixed.reshape(q.shape)

    def _blocks(self, tokens: Any, positions: Any, attend: Attend) -> Any:
        """Hidden states [B * T, hidden] after all blocks, for ``tokens`` [B, T] at ``positions`` [T]."""
        weights, functional = self.weights, self._functional
        hidden = functional.embedding(tokens, weights.embedding)
        if weights.positions is not None:
            hidden = hidden + functional.embedding(positions + OPT_POSITION_OFFSET, weights.positions)
        rotation = None if self._rotation is None else self._rotation.index_select(1, positions)
        hidden = hidden.view(-1, hidden.shape[-1])
        for block, (keys, values) in zip(weights.blocks, self.cache, strict=True):
            x = self._norm(hidden, block.attention_norm, block.attention_norm_bias)
            q, k, v = self._heads(block, functional.linear(x, block.qkv, block.qkv_bias), tokens.shape, rotation)
            mixed = attend(keys, values, q, k, v).transpose(1, 2).reshape(len(x), -1)
            hidden = hidden + functional.linear(mixed, block.out, block.out_bias)
            x = self._norm(hidden, block.ffn_norm, block.ffn_norm_bias)
            active = self._activate(functional.linear(x, block.up, block.up_bias))
            hidden = hidden + functional.linear(active, block.down, block.down_bias)
        return hidden

    def _head(self, hidden: Any) -> Any:
        """Logits [B, vocab] from hidden states [B, hidden]."""
        x = self._norm(hidden, self.weights.norm, self.weights.norm_bias)
        return self._functional.linear(x, self.weights.head)

    def _heads(self, block: Block, qkv: Any, shape: Sequence[int], rotation: Any) -> tuple[Any, Any, Any]:
        """q, k and v [B, heads, T, head_dim] from rows of ``qkv``, normalised and rotated as the model requires."""
        config = self.weights.config
        split = qkv.view(*shape, -1, config.head_dim).transpose(1, 2)
        q, k, v = split.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        if config.qk_norm:
            q, k = self._norm(q, block.q_norm, None), self._norm(k, block.k_norm, None)
        if rotation is not None:
            q, k = self._rotate(q, rotation), self._rotate(k, rotation)
        return q, k, v

    def _rotate(self, heads: Any, rotation: Any) -> Any:
        cos, sin = rotation
        left, right = heads.float().chunk(2, dim=-1)
        turned = self._torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return turned.to(heads.dtype)

    def _norm(self, x: Any, weight: Any, bias: Any) -> Any:
        eps = self.weights.config.norm_eps
        if self.weights.config.is_opt:
            return self._functional.layer_norm(x, weight.shape, weight, bias, eps)
        return self._functional.rms_norm(x, weight.shape, weight, eps)

    def _activate(self, y: Any) -> Any:
        if self.weights.config.is_opt:
            return self._functional.relu(y)
        gate, up = y.chunk(2, dim=-1)
        return self._functional.silu(gate) * up

    def _make_rotation(self, places: int) -> Any:
        """cos and sin of every position and pair of elements: fp32 [2, positions, head_dim / 2]."""
        angles = np.arange(places)[:, None] * rope_frequencies(self.weights.config, np)
        table = np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)
        return self._torch.from_numpy(table).to(self.weights.embedding.device)

    def _lasting(self) -> list[Any]:
        """All tensors that steps read or write."""
        weights = self.weights
        blocks = [tensor for block in weights.blocks for tensor in vars(block).values()]
        cache = [tensor for layer in self.cache for tensor in layer]
        outside = [weights.embedding, weights.head, weights.norm, weights.norm_bias, weights.positions]
        own = [self.logits, self._tokens, self._position, self._places, self._rotation]
        return [tensor for tensor in (*blocks, *cache, *outside, *own) if tensor is not None]
