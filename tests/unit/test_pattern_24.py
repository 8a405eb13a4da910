# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from flashllm.baselines import pattern_24
from flashllm.baselines.csr import compress
from flashllm.baselines.pattern_24 import is_two_of_four, keep_two_of_four
from flashllm.errors import ArgumentError


def test_the_two_largest_of_every_group_are_kept() -> None:
    rows = [[1, -4, 3, 2, 0, 0, 5, 0], [2, 2, -2, 2, -1, 1, 0, 1], [np.nan, 1, 2, 0, np.inf, -np.inf, 1, 1]]
    dense = np.array(rows, np.float16)
    before = dense.copy()
    kept = keep_two_of_four(dense)
    assert (dense.view(np.uint16) == before.view(np.uint16)).all()
    assert kept[0].tolist() == [0, -4, 3, 0, 0, 0, 5, 0]
    assert kept[1].tolist() == [2, 2, 0, 0, -1, 1, 0, 0]
    assert np.array_equal(kept[2], np.array([np.nan, 0, 2, 0, np.inf, -np.inf, 0, 0], np.float16), equal_nan=True)
    assert is_two_of_four(kept)
    assert not is_two_of_four(dense)


def test_random_matrices_and_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).standard_normal((37, 64)).astype(np.float16)
    kept = keep_two_of_four(dense)
    groups, chosen = np.abs(dense).reshape(-1, 4), kept.reshape(-1, 4) != 0
    assert (chosen.sum(axis=1) == 2).all()
    assert (np.sort(groups, axis=1)[:, 2] <= np.where(chosen, groups, np.inf).min(axis=1)).all()
    assert (kept[kept != 0] == dense[kept != 0]).all()
    monkeypatch.setattr(pattern_24, "_STRIP_ELEMENTS", 200)
    assert (keep_two_of_four(dense) == kept).all()
    crowded = kept.copy()
    crowded[36, 60:] = 1
    assert is_two_of_four(kept)
    assert not is_two_of_four(crowded)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (np.zeros((2, 6), np.float16), "K a multiple of 4"),
        (np.zeros((2, 8), np.float32), "float16"),
        (np.zeros((8, 2), np.float16).T, "C-contiguous"),
        ([[0.0]], "a NumPy or CuPy array"),
        (np.zeros((0, 8), np.float16), "M >= 1"),
    ],
)
def test_refused(dense: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        keep_two_of_four(dense)


def test_compressed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.zeros((5, 7), np.float16)
    dense[0, 6], dense[2, 0], dense[2, 3], dense[4, 5], dense[3, 1] = 1, 2, np.nan, -3, -0.0
    for strip in (1 << 26, 7, 15):
        monkeypatch.setattr("flashllm.baselines.csr._STRIP_ELEMENTS", strip)
        offsets, columns, values = compress(dense)
        assert (offsets.tolist(), offsets.dtype) == ([0, 1, 1, 3, 3, 4], np.int32)
        assert (columns.tolist(), columns.dtype) == ([6, 0, 3, 5], np.int32)
        assert np.array_equal(values, np.array([1, 2, np.nan, -3], np.float16), equal_nan=True)
    empty = compress(np.zeros((3, 3), np.float16))
    assert [len(array) for array in empty] == [4, 0, 0]
    monkeypatch.setattr("flashllm.baselines.csr._MOST", 3)
    with pytest.raises(ArgumentError, match="at most 3 values"):
        compress(dense)
