# SPDX-License-Identifier: Apache-2.0
"""The next token on the GPU: the choices of the reference, in a graph that serves every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from flashllm.backends import cuda
from flashllm.decoder.sample import sample, specs
from sample_cases import CASES, LARGE_CASES, Case, check_rows, expected, fenced

pytestmark = pytest.mark.gpu


@pytest.mark.sanitize
@pytest.mark.parametrize("vocab", [67, 5003, 12001])
def test_few_rows(cp: Any, vocab: int) -> None:
    check_rows(cuda.launch, cp, [one for one in CASES if one.vocab == vocab])


@pytest.mark.parametrize("one", CASES, ids=lambda one: f"{one.vocab}-{one.options.top_k}-{one.options.top_p}")
def test_tokens_are_those_of_the_reference(cp: Any, one: Case) -> None:
    check_rows(cuda.launch, cp, [one])


@pytest.mark.parametrize("vocab", sorted({one.vocab for one in LARGE_CASES}))
def test_batches_of_large_vocabularies(cp: Any, vocab: int) -> None:
    check_rows(cuda.launch, cp, [one for one in LARGE_CASES if one.vocab == vocab])


def test_one_graph_serves_every_step(cp: Any) -> None:
    cases = [one for one in LARGE_CASES if one.vocab == 32000]
    logits = cp.asarray(np.stack([one.logits() for one in cases]))
    rows = fenced(cp, [one.options for one in cases], capacity=3)
    stream = cp.cuda.Stream(non_blocking=True)
    for spec in specs():
        cuda.load(spec)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        sample(partial(cuda.launch, stream=stream), logits=logits, state=rows.state)
        graph = stream.end_capture()
        for _ in range(4):
            graph.launch(stream)
    stream.synchronize()
    assert rows.output().tolist() == [expected(one) for one in cases]
    assert (rows.state.finished == 1).all()
    assert (rows.state.positions == cp.arange(len(cases)) * 100 + 2).all()
