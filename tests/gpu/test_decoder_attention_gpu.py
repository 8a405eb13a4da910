# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoder's rows on a GPU: the cases of the emulator, larger ones, and replays of one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attention_cases as cases
from attention_cases import (
    DECODE,
    DTYPES,
    PREFILL,
    Case,
    assert_close,
    assert_decoded,
    assert_means,
    expected,
    operands,
    placed,
    plan_of,
)
from flashllm.backends import cuda
from flashllm.decoder.attention import attention
from flashllm.graphs import capture

LARGE = tuple(
    Case(
        dtype=DTYPES[i % 2],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=1100,
        ends=(1100, 1, 577, 64, 65, 1024),
        counts=(200, 1, 177, 1, 65, 130),
        seed=i,
    )
    for i, (heads, kv_heads, head_dim) in enumerate(
        ((9, 9, 128), (16, 2, 128), (9, 3, 64), (4, 4, 80), (8, 1, 256), (24, 2, 80))
    )
)


def every(several: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", several, ids=lambda case: case.label)


@pytest.mark.sanitize
@every(DECODE)
def test_decoding(cp: Any, case: Case) -> None:
    given = operands(case)
    for splits in (1, 3):
        assert_decoded(case, given, cases.decode(cuda.launch, cp, case, given, splits=splits))
    given = operands(case, equal_scores=True)
    for splits in (1, 2, 5):
        assert_means(case, given, cases.decode(cuda.launch, cp, case, given, splits=splits))


@pytest.mark.sanitize
@every(PREFILL)
def test_prefill(cp: Any, case: Case) -> None:
    given = operands(case)
    assert_close(cases.prefill(cuda.launch, cp, case, given), expected(case, given, weights_rounded=True))
    given = operands(case, equal_scores=True)
    assert_means(case, given, cases.prefill(cuda.launch, cp, case, given))


@every(LARGE)
def test_prefill_of_long_prompts(cp: Any, case: Case) -> None:
    given = operands(case)
    assert_close(cases.prefill(cuda.launch, cp, case, given), expected(case, given, weights_rounded=True))


@every(LARGE)
def test_decoding_of_long_prompts(cp: Any, case: Case) -> None:
    """Each row is a separate query, hundreds of them from one slot at a time."""
    given = operands(case)
    want = expected(case, given, weights_rounded=case.is_grouped)
    for splits in (1, 4, 16):
        assert_close(cases.decode(cuda.launch, cp, case, given, splits=splits), want)


@pytest.mark.parametrize("heads", [6, 24])
def test_one_graph_serves_every_step(cp: Any, heads: int) -> None:
    """Slots and positions change between replays, and so does the number of splits that have work."""
    case = Case(dtype="fp16", heads=heads, kv_heads=3, head_dim=128, capacity=512, ends=(512,) * 5)
    given = operands(case)
    plan = plan_of(case, 5, 6)
    q, keys, values, slots, positions = (
        placed(cp, a) for a in (given.q, given.keys, given.values, given.slots, given.positions)
    )
    out = cp.empty((5, case.heads * case.head_dim), np.float16)
    workspace = cp.zeros(plan.workspace_bytes, np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)

    def step() -> None:
        attention(
            lambda spec, grid, args: cuda.launch(spec, grid, args, stream=stream),
            plan,
            dtype=case.dtype,
            q=q,
            keys=keys,
            values=values,
            slots=slots,
            positions=positions,
            out=out,
            workspace=workspace,
        )

    step()  # compiles and loads
    cp.cuda.Device().synchronize()
    graph = capture(step, stream)
    rng = np.random.default_rng(0)
    for longest in (1, 64, 130, 300, 512):
        given.positions[:] = rng.integers(longest // 2, longest, 5)
        given.slots[:] = rng.permutation(given.slots)
        slots.set(given.slots)
        positions.set(given.positions)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_decoded(case, given, out.get())
