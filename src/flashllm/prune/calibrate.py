# SPDX-License-Identifier: Apache-2.0
"""Runs text through a block and collects statistics on what its linear layers multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flashllm.formats.sources import array_module
from flashllm.models import forward
from flashllm.models.config import ModelConfig
from flashllm.models.threads import for_each, threads_of
from flashllm.models.weights import Block
from flashllm.prune.statistics import Statistics


def observe(
    config: ModelConfig, block: Block, hidden: Any, statistics: Callable[[], Statistics]
) -> Mapping[str, Statistics]:
    """Statistics on what each linear layer of ``block`` multiplies for input ``hidden`` [S, T, hidden], by layer name.

    Layers that share an input share the statistics. ``hidden`` is not changed.
    """
    first_of = {member: group.members[0] for group in config.layout.groups for member in group.members}
    multiply = forward.multiply_by(block.linears)
    threads = threads_of(array_module(hidden))
    parts = forward.parts_of(hidden, threads)

    def observed(turn: int) -> dict[str, Statistics]:
        """Statistics on every ``threads``-th part, so that the same sums are added in the same order every time."""
        found = {group.members[0]: statistics() for group in config.layout.groups}

        def linear(name: str, x: Any) -> Any:
            if name in found:
                found[name].add(x)
            return multiply(name, x)

        for part in parts[turn::threads]:
            forward.block(config, block.small, hidden[part], linear)
        return found

    first, *others = for_each(observed, range(min(threads, len(parts))), threads=threads)
    for other in others:
        for name, statistic in first.items():
            statistic.merge(other[name])
    return {member: first[name] for member, name in first_of.items()}


def advance(config: ModelConfig, block: Block, hidden: Any) -> None:
    """Replace ``hidden`` [S, T, hidden] with the output of ``block`` for it."""
    threads = threads_of(array_module(hidden))
    forward.block_in_place(config, block.small, hidden, forward.multiply_by(block.linears), threads=threads)
