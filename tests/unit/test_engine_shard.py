# SPDX-License-Identifier: Apache-2.0
"""How a model is divided among GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashllm.engine.arrays import ALIGNMENT
from flashllm.engine.forward import parts_shape
from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import ArgumentError
from flashllm.models.config import ModelConfig, model_config
from model_cases import config_of

LLAMA = model_config(config_of("llama", head_dim=8, num_key_value_heads=2, intermediate_size=54))
OPT = model_config(config_of("opt", hidden_size=40, num_attention_heads=4, ffn_dim=58))
PARTS = ("qkv", "out", "up", "down")


def halves() -> list[Shard]:
    return [Shard(index=index, count=2) for index in range(2)]


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_shapes_of_halves(config: ModelConfig) -> None:
    for part in PARTS:
        m, k = WHOLE.shape(config, part)
        for shard in halves():
            shard.check(config)
            by_rows = part in ("qkv", "up")
            assert shard.shape(config, part) == ((m // 2, k) if by_rows else (m, k // 2))
            whole = np.arange(m * k).reshape(m, k)
            assert WHOLE.matrix(config, part, whole) is whole
            assert shard.matrix(config, part, whole).shape == shard.shape(config, part)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_halves_compute_the_whole(config: ModelConfig) -> None:
    """Rows are those of the same heads of q, k and v, and of the same units of gate and up; column parts add up."""
    rng = np.random.default_rng(0)
    whole = {part: rng.integers(-9, 9, WHOLE.shape(config, part)) for part in PARTS}
    x = rng.integers(-9, 9, config.hidden)
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    wanted_q, wanted_k, wanted_v = np.split(whole["qkv"] @ x, [q, q + kv])
    found: dict[str, list[Any]] = {"q": [], "k": [], "v": [], "units": []}
    mixed, summed = rng.integers(-9, 9, q), np.zeros(config.hidden, np.int64)
    for index, shard in enumerate(halves()):
        own_q, own_kv = q // 2, kv // 2
        y = shard.matrix(config, "qkv", whole["qkv"]) @ x
        assert (y == shard.rows(config, "qkv", whole["qkv"] @ x)).all()  # as biases are divided
        for name, piece in zip("qkv", np.split(y, [own_q, own_q + own_kv]), strict=True):
            found[name].append(piece)
        found["units"].append((shard.matrix(config, "up", whole["up"]) @ x).reshape(-1, config.ffn // 2))
        summed += shard.matrix(config, "out", whole["out"]) @ mixed[index * own_q : (index + 1) * own_q]
    for name, wanted in zip("qkv", (wanted_q, wanted_k, wanted_v), strict=True):
        assert (np.concatenate(found[name]) == wanted).all()
    assert (np.concatenate(found["units"], axis=1) == (whole["up"] @ x).reshape(-1, config.ffn)).all()
    assert (summed == whole["out"] @ mixed).all()


@pytest.mark.parametrize(
    ("change", "what"),
    [({"heads": 9, "kv_heads": 9}, "9 heads"), ({"kv_heads": 1}, "1 KV heads"), ({"ffn": 53}, "53 feed-forward units")],
)
def test_what_cannot_be_divided_is_named(change: dict[str, int], what: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^tp: expected a divisor of the {what}, got 2$"):
        Shard(index=0, count=2).check(replace(LLAMA, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [36, 39, 40, 576, 8192])
def test_each_part_of_a_sum_is_aligned_as_an_allocation(hidden: int) -> None:
    for rows in (1, 3, 128):
        assert parts_shape(rows, hidden, 1) == (1, rows, hidden)
        parts, padded, columns = parts_shape(rows, hidden, 3)
        assert (parts, columns) == (3, hidden)
        assert rows <= padded < rows + 128
        assert padded * hidden * 2 % ALIGNMENT == 0
        assert padded == rows or hidden % 128


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_there_is_not(index: int, count: int) -> None:
    with pytest.raises(ArgumentError, match=r"^rank: "):
        Shard(index=index, count=count).check(LLAMA)
