# SPDX-License-Identifier: Apache-2.0
"""Which elements each method removes, and what becomes of the others."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.prune import ratios, sparsegpt
from flashllm.prune.methods import METHODS, method
from flashllm.prune.select import smallest, smallest_of_rows
from flashllm.prune.statistics import Gram, Norms, Nothing


def _random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _gram(x: NDArray[np.float32]) -> Gram:
    found = Gram()
    for part in np.array_split(x, 3):
        found.add(part)
    return found


def _error(w: NDArray[np.float32], pruned: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    return float(np.square(x.astype(np.float64) @ (w - pruned).T).sum())


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("count", [0, 1, 7, 39, 40])
def test_exactly_the_smallest_and_of_equal_ones_the_first(count: int, levels: int) -> None:
    scores = np.random.default_rng(count).integers(0, levels, (5, 8)).astype(np.float32)
    order = np.argsort(scores, axis=None, kind="stable")[:count]
    want = np.isin(np.arange(40), order).reshape(5, 8)
    np.testing.assert_array_equal(smallest(scores, count), want)
    if count <= 8:
        rows = np.argsort(scores, axis=1, kind="stable")[:, :count]
        want = np.stack([np.isin(np.arange(8), row) for row in rows])
        np.testing.assert_array_equal(smallest_of_rows(scores, count), want)


def test_nan_goes_last_and_only_if_it_must() -> None:
    scores = np.array([[np.nan, 3, 1, np.nan, 2]], np.float32)
    np.testing.assert_array_equal(smallest_of_rows(scores, 3), [[False, True, True, False, True]])
    np.testing.assert_array_equal(smallest_of_rows(scores, 4), [[True, True, True, False, True]])


def test_counts_that_cannot_be() -> None:
    with pytest.raises(ArgumentError, match=r"count: expected 0\.\.6, got 7"):
        smallest(_random(2, 3), 7)
    with pytest.raises(ArgumentError, match=r"count: expected 0\.\.3, got -1"):
        smallest_of_rows(_random(2, 3), -1)


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.9])
@pytest.mark.parametrize("name", METHODS)
def test_share_of_zeros_and_what_is_kept(name: str, sparsity: float) -> None:
    w, x = _random(24, 200), _random(300, 200, seed=1)
    made = METHODS[name]
    statistics = made.statistics()
    statistics.add(x)
    before = w.copy()
    pruned = made.prune(w, statistics, sparsity)
    np.testing.assert_array_equal(w, before)
    assert pruned.dtype == np.float32
    assert abs(np.count_nonzero(pruned == 0) - sparsity * w.size) <= (12 if made.exact else 1)
    if made.exact:
        np.testing.assert_array_equal(pruned[pruned != 0], w[pruned != 0])
    if name in ("wanda", "magnitude-row"):
        assert set(np.count_nonzero(pruned == 0, axis=1)) == {round(sparsity * 200)}


def test_magnitude_takes_the_smallest() -> None:
    w = _random(8, 9)
    pruned = METHODS["magnitude"].prune(w, Nothing(), 0.5)
    assert abs(w[pruned == 0]).max() < abs(w[pruned != 0]).min()


def test_wanda_weighs_by_what_comes_in() -> None:
    w = np.ones((2, 4), np.float32)
    x = np.diag([3.0, 0.5, 2.0, 1.0]).astype(np.float32)
    norms = Norms()
    norms.add(x[:2])
    norms.add(x[2:])
    np.testing.assert_allclose(norms.norms(), [3, 0.5, 2, 1])
    np.testing.assert_array_equal(METHODS["wanda"].prune(w, norms, 0.5), [[1, 0, 1, 0]] * 2)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    x = _random(50, 6)
    np.testing.assert_allclose(_gram(x).matrix(), x.T @ x, rtol=1e-5)


@pytest.mark.parametrize("columns", [8, 130])
def test_sparsegpt_answers_a_mask_as_well_as_can_be_in_its_order(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its mask, column by column: the following columns absorb a column's error in the least-squares sense."""
    monkeypatch.setattr(sparsegpt, "DAMPING", 1e-6)
    w, x = _random(3, columns), _random(4 * columns, columns, seed=5)
    pruned = sparsegpt.sparsegpt(w, _gram(x), 0.5)
    hessian = (x.T @ x).astype(np.float64)
    hessian += 1e-6 * hessian.diagonal().mean() * np.eye(columns)
    for row, got in zip(w.astype(np.float64), pruned, strict=True):
        want = row.copy()
        for j in range(columns):
            if got[j] == 0:
                # Least squares of what is left, with the columns before j unchanged: they are done.
                if j + 1 < columns:
                    rest = hessian[j + 1 :, j + 1 :]
                    want[j + 1 :] += np.linalg.solve(rest, hessian[j + 1 :, j]) * want[j]
                want[j] = 0
        np.testing.assert_allclose(got, want, atol=2e-3 * abs(want).max())


def test_sparsegpt_leaves_less_error_than_wanda_and_that_less_than_magnitude() -> None:
    mixing = _random(40, 96, seed=2) * np.geomspace(0.05, 5, 96).astype(np.float32)
    x, w = _random(2000, 40, seed=3) @ mixing, _random(64, 96, seed=4)
    found = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        statistics = METHODS[name].statistics()
        statistics.add(x)
        found[name] = _error(w, METHODS[name].prune(w, statistics, 0.5), x)
    assert found["sparsegpt"] < 0.7 * found["wanda"]
    assert found["wanda"] < 0.9 * found["magnitude"]


def test_layers_of_one_input_are_solved_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = _random(64, 10), _random(6, 10)
    wanted = [sparsegpt.sparsegpt(one, _gram(x), 0.5) for one in (w, -w[:2])]
    calls: list[int] = []
    real = sparsegpt._inverse_factor
    monkeypatch.setattr(sparsegpt, "_inverse_factor", lambda *given: (calls.append(1), real(*given))[1])
    shared = _gram(x)
    for one, want in zip((w, -w[:2]), wanted, strict=True):
        np.testing.assert_array_equal(sparsegpt.sparsegpt(one, shared, 0.5), want)
    assert calls == [1]


def test_columns_that_nothing_enters_go_first() -> None:
    x = _random(64, 10)
    x[:, [2, 7]] = 0
    pruned = sparsegpt.sparsegpt(_random(6, 10), _gram(x), 0.2)
    assert not pruned[:, [2, 7]].any()
    assert np.count_nonzero(pruned == 0) == 12


def test_inputs_that_depend_on_each_other_are_damped() -> None:
    x = np.repeat(_random(64, 5), 2, axis=1)
    assert np.isfinite(sparsegpt.sparsegpt(_random(6, 10), _gram(x), 0.5)).all()


def test_inputs_that_are_no_numbers_are_refused() -> None:
    x = _random(8, 4)
    x[1, 2] = np.inf
    with pytest.raises(ArgumentError, match="finite inputs"):
        sparsegpt.sparsegpt(_random(3, 4), _gram(x), 0.5)
    norms = Norms()
    norms.add(x)
    with pytest.raises(ArgumentError, match="finite inputs"):
        METHODS["wanda"].prune(_random(3, 4), norms, 0.5)


def test_methods_by_name() -> None:
    assert method("wanda") is METHODS["wanda"]
    with pytest.raises(ArgumentError, match=r"method: expected one of magnitude, .*, got 'wander'"):
        method("wander")


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.7, 0.97])
def test_owl_keeps_the_mean_and_prunes_outliers_less(sparsity: float) -> None:
    shares = [0.05, 0.01, 0.03, 0.01]
    found = ratios.owl(shares, sparsity)
    assert np.mean(found) == pytest.approx(sparsity)
    assert all(0 <= value <= 1 for value in found)
    assert max(found) - min(found) <= 2 * ratios.OWL_SPREAD + 1e-12
    if sparsity == 0.5:
        assert max(found) - min(found) == pytest.approx(2 * ratios.OWL_SPREAD)
        assert found[0] < found[2] < found[1] == found[3]


def test_owl_of_equal_blocks_is_uniform() -> None:
    assert ratios.owl([0.2, 0.2], 0.6) == [0.6, 0.6]


def test_outliers_are_counted() -> None:
    scores = np.ones((10, 10), np.float32)
    scores[0, :2] = 100
    assert ratios.outlier_share(scores) == pytest.approx(0.02)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.83])
def test_global_threshold_takes_the_smallest_of_all(sparsity: float) -> None:
    rng = np.random.default_rng(1)
    # Few values, so that many are equal to the threshold.
    scales = {"a": 1, "b": 2, "c": 4}
    matrices = {name: rng.integers(-9, 10, (17, 13)).astype(np.float16) * scale for name, scale in scales.items()}
    found = ratios.global_sparsities(
        {name: ratios.magnitude_counts(w.view(np.uint16)) for name, w in matrices.items()}, sparsity
    )
    whole = np.concatenate([abs(w).reshape(-1) for w in matrices.values()])
    order = np.argsort(whole, kind="stable")[: round(sparsity * whole.size)]
    for place, name in enumerate("abc"):
        size = 17 * 13
        assert round(found[name] * size) == np.count_nonzero(order // size == place)


def test_sparsities_that_cannot_be() -> None:
    for wrong in (-0.1, 1.0, float("nan"), "0.5", None):
        with pytest.raises(ArgumentError, match="sparsity: expected a fraction"):
            ratios.check_sparsity(wrong)
    ratios.check_sparsity(np.float32(0.5))
