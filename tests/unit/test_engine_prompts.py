# SPDX-License-Identifier: Apache-2.0
"""Prompts as rows of passes: every token once and in its place, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.engine.prompts import chunks_of, pad_rows


def test_a_prompt_goes_on_in_the_next_pass() -> None:
    first, second = chunks_of([[10, 11], [20], [30, 31, 32]], 4)
    assert first.tokens.tolist() == [10, 11, 20, 30]
    assert first.positions.tolist() == [0, 1, 0, 0]
    assert first.slots.tolist() == [0, 0, 1, 2]
    assert first.starts.tolist() == [0, 2, 3, 4]
    assert (first.ends, first.rows, first.longest) == (((0, 1), (1, 2)), 4, 2)
    assert second.tokens.tolist() == [31, 32]
    assert second.positions.tolist() == [1, 2]
    assert second.slots.tolist() == [2, 2]
    assert second.starts.tolist() == [0, 2]
    assert (second.ends, second.rows, second.longest) == (((2, 1),), 2, 2)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), most=st.integers(1, 12))
def test_every_token_is_in_one_row(lengths: list[int], most: int) -> None:
    prompts = [[100 * slot + position for position in range(length)] for slot, length in enumerate(lengths)]
    chunks = list(chunks_of(prompts, most))
    rows = [row for c in chunks for row in zip(c.slots.tolist(), c.positions.tolist(), c.tokens.tolist(), strict=True)]
    assert rows == [(s, p, token) for s, prompt in enumerate(prompts) for p, token in enumerate(prompt)]
    assert all(chunk.rows == most for chunk in chunks[:-1])
    assert 1 <= chunks[-1].rows <= most
    ended = []
    for chunk in chunks:
        for array in (chunk.tokens, chunk.positions, chunk.slots, chunk.starts):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert chunk.starts[0] == 0
        assert chunk.starts[-1] == chunk.rows == len(chunk.tokens)
        bounds = list(zip(chunk.starts[:-1], chunk.starts[1:], strict=True))
        assert chunk.longest == max(end - begin for begin, end in bounds)
        for begin, end in bounds:
            assert len(set(chunk.slots[begin:end])) == 1
            assert (np.diff(chunk.positions[begin:end]) == 1).all()
        for slot, row in chunk.ends:
            assert (chunk.slots[row], chunk.positions[row]) == (slot, lengths[slot] - 1)
            ended.append(slot)
    assert ended == list(range(len(lengths)))


def test_rows_that_fill_up_belong_to_nothing() -> None:
    (chunk,) = chunks_of([[7, 8], [9]], 8)
    padded = chunk.padded(6)
    assert padded.tokens.tolist() == [7, 8, 9, 0, 0, 0]
    assert padded.positions.tolist() == [0, 1, 0, -1, -1, -1]
    assert padded.slots.tolist() == [0, 0, 1, 0, 0, 0]
    assert (padded.starts.tolist(), padded.ends, padded.rows) == ([0, 2, 3], chunk.ends, 3)
    assert padded.tokens.dtype == padded.positions.dtype == padded.slots.dtype == np.int32


@pytest.mark.parametrize(
    ("rows", "most", "padded"), [(1, 2048, 64), (64, 2048, 64), (65, 2048, 128), (2040, 2048, 2048), (5, 9, 9)]
)
def test_passes_have_few_numbers_of_rows(rows: int, most: int, padded: int) -> None:
    assert pad_rows(rows, most) == padded
