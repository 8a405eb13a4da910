# SPDX-License-Identifier: Apache-2.0
"""Which columns of slot24 pair up, and in windows of what size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import slot24_reference as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import maximum_bipartite_matching

import weight_cases as cases
from flashllm.errors import ArgumentError
from flashllm.formats import slot24_encode, slot24_pairs
from flashllm.formats.slot24 import Slot24


def pairs_up(a: np.ndarray, window: int, part_rows: int) -> bool:
    """Whether every band of every window has 128 pairs, by SciPy's matching."""
    stored = np.zeros((-(-a.shape[0] // 128) * 128, -(-a.shape[1] // window) * window), bool)
    stored[: a.shape[0], : a.shape[1]] = cases.pruned(a) != 0
    lefts, rights = ([c if c < window else window for c in side] for side in reference.lists_of(window))
    for strip in stored.reshape(-1, 128, stored.shape[1] // window, window):
        for band in range(128 // part_rows):
            rows = strip[reference.band_rows(part_rows, band)]
            for columns in np.moveaxis(np.pad(rows, ((0, 0), (0, 0), (0, 1))), 1, 0).astype(np.int32):
                compatible = columns[:, lefts].T @ columns[:, rights] == 0
                if (maximum_bipartite_matching(sp.csr_array(compatible)) < 0).any():
                    return False
    return True


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(200, 600),
    density=st.floats(0.1, 0.4),
    pattern=st.sampled_from(cases.PATTERNS),
    window=st.sampled_from([None, None, 128, 136, 200, 248, 256]),
    part_rows=st.sampled_from([None, 32, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_are_refused_when_columns_cannot_pair_up(
    rows: int, columns: int, density: float, pattern: str, window: int | None, part_rows: int | None, seed: int
) -> None:
    a = cases.matrix(pattern, rows, columns, density, seed, "fp16")
    sizes = slot24_pairs.WINDOWS if window is None else (window,)
    shapes = [64, 32] if part_rows is None else [part_rows]
    tries = [(size, r) for r in shapes for size in sizes if part_rows is not None or r == 32 or size >= 248]
    first = next((one for one in tries if pairs_up(a, *one)), None)
    if first is not None:
        w = Slot24.from_dense(a, window=window, part_rows=part_rows, group_values=4)
        assert (w.window, w.part_rows) == first
    else:
        with pytest.raises(ArgumentError, match=f"window: expected a size in which all columns .*, got {window}"):
            Slot24.from_dense(a, window=window, part_rows=part_rows, group_values=4)


@pytest.mark.parametrize("part_rows", [32, 64])
def test_bytes_equal_the_written_format_where_greedy_pairs_must_change(
    part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense enough that lefts find no partner at first, that paths are long, and that one window is too large."""
    outcomes = []
    augment = slot24_pairs.augment

    def counted(fits: Any, left_order: Any, partner: Any) -> bool:
        before = partner.copy()
        done = augment(fits, left_order, partner)
        outcomes.append((done, int((before < 0).sum()), int(((before >= 0) & (before != partner)).sum())))
        return done

    monkeypatch.setattr(slot24_pairs, "augment", counted)
    monkeypatch.setattr(slot24_encode, "has_lonely_column", lambda masks, window: False)
    rows = {32: (0.23, 0.26, 0.3), 64: (0.15, 0.17, 0.21)}
    for seed, density in enumerate(rows[part_rows]):
        bits = cases.bits("uniform", 128, 256, density, seed)
        want = reference.encode(bits, part_rows=part_rows, group_values=4)
        assert want is not None
        w = Slot24.from_dense(bits.view(np.float16), part_rows=part_rows, group_values=4)
        reference.assert_as_written(w, want)
    assert {done for done, _, _ in outcomes} == {True, False}
    assert max(missing for done, missing, _ in outcomes if done) > 2
    assert max(changed for done, _, changed in outcomes if done) > 3


@pytest.mark.parametrize("dense", [0, 1, 4, 5, 8, 9, 12, 13, 20, 24, 25, 32, 33, 40, 41, 63, 64])
def test_the_largest_window_in_which_all_columns_pair_up(dense: int) -> None:
    """Dense lefts beside rights that have an element each need dummies, of which there are (256 - C) / 2."""
    a = np.zeros((70, 700), np.float16)
    number = np.arange(128)
    a[:, 256 + number[number & 4 == 0][:dense]] = -2
    a[3, np.arange(700) & 4 != 0] = 1
    w = Slot24.from_dense(a)
    w.validate()
    np.testing.assert_array_equal(w.to_dense(), a)
    # The dense columns may lie in two windows; then each of these needs fewer dummies.
    fitting = [
        c for c in slot24_pairs.WINDOWS if (256 - c) // 2 >= max(np.bincount(np.flatnonzero(a[0]) // c, minlength=1))
    ]
    assert w.window == fitting[0]
    at = slot24_pairs.WINDOWS.index(w.window)
    for window in slot24_pairs.WINDOWS[max(at - 1, 0) : at + 2]:  # each is next to the largest for some ``dense``
        if window in fitting:
            np.testing.assert_array_equal(Slot24.from_dense(a, window=window).to_dense(), a)
        else:
            with pytest.raises(ArgumentError, match=f"window: expected a size in which all .*, got {window}"):
                Slot24.from_dense(a, window=window)


def test_lonely_columns_are_only_a_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot24_pairs, "_HEAVIEST", 1)
    a = [cases.matrix("uniform", 256, 700, density, 3, "fp16") for density in (0.1, 0.25, 0.3, 0.4)]
    short = [Slot24.from_dense(one) for one in a]
    monkeypatch.setattr(slot24_encode, "has_lonely_column", lambda masks, window: False)
    for one, two in zip(short, a, strict=True):
        assert one.window == Slot24.from_dense(two).window


@pytest.mark.parametrize("window", [128, 136, 192, 248, 256])
def test_lists_of_columns(window: int) -> None:
    lefts, rights = slot24_pairs.column_lists(window)
    assert (lefts.tolist(), rights.tolist()) == reference.lists_of(window)
    for side in (lefts, rights):
        assert np.bincount(side % 8, minlength=8).max() == 32


@pytest.mark.parametrize(
    ("density", "window", "part_rows"),
    [(0.05, 256, 64), (0.1, 256, 64), (0.16, 248, 64), (0.2, 240, 32), (0.25, 232, 32), (0.3, 152, 32)],
)
def test_random_matrices_have_large_windows_and_few_zeros(density: float, window: int, part_rows: int) -> None:
    rng = np.random.default_rng(1)
    w = Slot24.from_dense((rng.random((1024, 2048)) < density).astype(np.float16))
    assert w.window >= window
    assert w.part_rows == part_rows
    bits = int(np.bitwise_count(w.masks).sum())
    assert 1 <= bits / w.nnz < 1.12
