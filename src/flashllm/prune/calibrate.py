# SPDX-License-Identifier: Apache-2.0
"""Run text through a block and let statistics see what its linear layers multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flashllm.models import forward
from flashllm.models.config import ModelConfig
from flashllm.models.text import split_batches
from flashllm.models.weights import Block
from flashllm.prune.statistics import Statistics


def observe(
    config: ModelConfig, block: Block, hidden: Any, statistics: Callable[[], Statistics]
) -> Mapping[str, Statistics]:
    """What each linear layer of ``block`` multiplies when ``hidden`` [S, T, hidden] comes in, by its name.

    Layers that share an input share the statistics. ``hidden`` stays as it is.
    """
    first_of = {member: group.members[0] for group in config.layout.groups for member in group.members}
    found = {group.members[0]: statistics() for group in config.layout.groups}
    multiply = forward.multiply_by(block.linears)

    def linear(name: str, x: Any) -> Any:
        if name in found:
            found[name].add(x)
        return multiply(name, x)

    for part in split_batches(hidden, at_once=forward.TOKENS_AT_ONCE):
        forward.block(config, block.small, hidden[part], linear)
    return {member: found[first] for member, first in first_of.items()}


def advance(config: ModelConfig, block: Block, hidden: Any) -> None:
    """Replace ``hidden`` [S, T, hidden] by what ``block`` makes of it."""
    forward.block_in_place(config, block.small, hidden, forward.multiply_by(block.linears))
