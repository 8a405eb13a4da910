# SPDX-License-Identifier: Apache-2.0
"""The systems we compare with besides cuBLAS: their weights for a group of cases, and the fastest way to run each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flashllm.baselines import SYSTEMS, weight_class
from flashllm.baselines.baseline import kernel_ways
from flashllm.baselines.pattern_24 import keep_two_of_four
from flashllm.bench import systems
from flashllm.bench.cases import Group
from flashllm.bench.data import make_weights
from flashllm.bench.runs import Compared, Prepared, Run
from flashllm.errors import ArgumentError

Prepare = Callable[[Group, "float | None", Any, dict[int, Any]], Prepared]
"""``prepare(group, sparsity, dense, inputs)``: the results that products with a matrix must give."""


def check_group(group: Group, names: Sequence[str]) -> None:
    """Raise :class:`ArgumentError` if systems ``names`` are to run on a type other than fp16."""
    if names and group.dtype != "fp16":
        raise ArgumentError("systems", expected="fp16: the other systems have no other type", got=group.dtype)


def parts(group: Group, names: Sequence[str]) -> list[tuple[Group, tuple[str, ...]]]:
    """``group`` split by sparsity, each part with the systems to run on it, so that the weights of only one matrix
    are on the GPU at a time. Systems that do not use the matrix of the case run with the first part only.
    """
    if not names:
        return [(group, ())]
    found: list[tuple[Group, tuple[str, ...]]] = []
    for sparsity in group.sparsities:
        chosen = None if group.chosen is None else tuple(case for case in group.chosen if case[0] == sparsity)
        part = replace(group, sparsities=(sparsity,), chosen=chosen, formats=group.formats_for(sparsity))
        found.append((part, tuple(n for n in names if not found or SYSTEMS[n].matrix == "given")))
    return found


def estimated_bytes(group: Group, density: float, names: Sequence[str], rotated: Callable[[int], int]) -> int:
    """Device bytes of the systems' weights, including what making them takes."""
    elements = group.m * group.k
    weights = sum(rotated(int(SYSTEMS[name].bytes_per_element(density) * elements)) for name in names)
    return weights + (4 * group.dense_bytes if names else 0)


def load(
    names: Sequence[str],
    group: Group,
    dense: Any,
    item: Prepared,
    inputs: dict[int, Any],
    *,
    prepare: Prepare,
    copies: Callable[[int], int],
) -> dict[str, Compared]:
    """Weights of every system of ``names`` but cuBLAS.

    ``dense`` is the matrix of the case and ``item`` what its products must give; ``copies(nbytes)`` is the number of
    copies to rotate over. A system that cannot run the shape is left out.
    """
    found: dict[str, Compared] = {}
    matrices, items = {"given": dense}, {"given": item}
    for name in names:
        entry = SYSTEMS[name]
        if entry.weight is None:
            continue
        made, kind, its_group = weight_class(name), entry.matrix, _group(group, name)
        if kind not in matrices:
            whole = make_weights(replace(group, pattern="uniform"), 0.0, device=True)
            matrices[kind] = keep_two_of_four(whole) if kind == "2:4" else whole
        try:
            weight = made.from_dense(matrices[kind])
        except ArgumentError:
            if kind == "given" and not entry.needs:  # such a system takes every shape: something else is wrong
                raise
            continue
        its_inputs = inputs
        if hasattr(made, "multiplied"):
            its_inputs = {n: made.inputs(x) for n, x in inputs.items()}
            its_item = prepare(its_group, _sparsity(name), weight.multiplied(), its_inputs)
        else:
            if kind not in items:
                items[kind] = prepare(its_group, _sparsity(name), matrices[kind], inputs)
            its_item = items[kind]
        found[name] = Compared(
            group=its_group,
            item=its_item,
            weights=systems.rotation(weight, copies(weight.nbytes)),
            inputs=its_inputs,
            given=inputs,
        )
    return found


def run_of(compared: Compared, n: int, stream: Any) -> Run | None:
    """The fastest way for ``n`` columns of x on ``stream``; ``None`` where the system has none."""
    made, x = type(compared.weights[0]), compared.given[n]
    library = getattr(made, "ways", None)
    with stream:
        ways = kernel_ways(compared.weights, x) if library is None else library(compared.weights, x, stream)
        if not ways:
            return None
        way = min(ways, key=lambda way: systems.glance(way, stream)) if len(ways) > 1 else ways[0]
    return Run.of_baseline(way, compared, compared.inputs[n])


def _group(group: Group, name: str) -> Group:
    """The group as the rows of the system describe it."""
    entry = SYSTEMS[name]
    if entry.matrix == "given":
        return group
    pattern = "2:4" if entry.matrix == "2:4" else "uniform"
    return replace(group, pattern=pattern, dtype=getattr(weight_class(name), "DTYPE", "fp16"))


def _sparsity(name: str) -> float:
    return 0.5 if SYSTEMS[name].matrix == "2:4" else 0.0
