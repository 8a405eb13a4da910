# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from flashllm.bench import check
from flashllm.bench.data import largest_magnitude, random_matrix, to_float64


def _case(dtype: str = "fp16") -> tuple[np.ndarray, np.ndarray, np.ndarray, check.Reference]:
    """x, W (float64), the rounded product and the reference on all rows."""
    x = to_float64(random_matrix(5, 96, seed=1, dtype=dtype), dtype)
    w = to_float64(random_matrix(40, 96, density=0.3, seed=2, dtype=dtype), dtype)
    out = np.float16 if dtype == "fp16" else random_matrix(1, 1, dtype="bf16").dtype
    y = (x @ w.T).astype(np.float32).astype(out).astype(np.float64)
    return x, w, y, check.make_reference(x, w, np.arange(40), dtype)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_rounded_product_is_within_the_bound(dtype: str) -> None:
    _, _, y, reference = _case(dtype)
    assert 0.5 < check.error_over_bound(y, reference) <= 1.0


def test_one_wrong_element_is_seen() -> None:
    x, w, y, reference = _case()
    product = x[2, w[7] != 0][0] * w[7, w[7] != 0][0]
    y[2, 7] -= product
    assert check.error_over_bound(y, reference) > 5
    assert check.whole_error_over_bound(y, (x @ w.T), x, float(abs(w).max()), "fp16") > 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_poison_left_behind_is_seen(value: float) -> None:
    x, w, y, reference = _case()
    y[4, 39] = value
    assert check.error_over_bound(y, reference) == np.inf
    assert check.whole_error_over_bound(y, x @ w.T, x, 1.0, "fp16") == np.inf


def test_overflow_must_give_the_same_infinity() -> None:
    reference = check.Reference(
        rows=np.arange(3), values=np.array([[7e4, -7e4, 65519.999]]), magnitude=np.full((1, 3), 1e4), dtype="fp16"
    )
    good = np.array([[np.inf, -np.inf, 65504.0]])
    assert check.error_over_bound(good, reference) <= 1.0
    assert check.error_over_bound(np.array([[np.inf, -np.inf, np.inf]]), reference) == 0.0  # at the limit: either
    assert check.error_over_bound(np.array([[np.inf, np.inf, 65504.0]]), reference) == np.inf
    assert check.error_over_bound(np.array([[65504.0, -np.inf, 65504.0]]), reference) == np.inf


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_with_infinities_and_nan_can_be_right(dtype: str) -> None:
    x, w, _, _ = _case(dtype)
    w[3, 5], w[8, 0], w[9, 1] = np.inf, -np.inf, np.nan
    exact = x @ w.T
    out = np.float16 if dtype == "fp16" else random_matrix(1, 1, dtype="bf16").dtype
    y = exact.astype(np.float32).astype(out).astype(np.float64)
    bits = w.astype(np.float32).astype(out)
    largest = largest_magnitude(bits, dtype)
    assert largest == np.abs(w[np.isfinite(w)]).max()
    reference = check.make_reference(x, w, np.arange(40), dtype)
    assert check.error_over_bound(y, reference) <= 1.0
    assert check.whole_error_over_bound(y, y, x, largest, dtype) == 0.0
    assert check.whole_error_over_bound(y, exact, x, largest, dtype) <= 1.0
    y[0, 3] = -y[0, 3]
    assert check.error_over_bound(y, reference) == np.inf


def test_nan_is_required_where_the_reference_is_nan() -> None:
    reference = check.Reference(rows=np.arange(1), values=np.array([[np.nan]]), magnitude=np.ones((1, 1)), dtype="fp16")
    assert check.error_over_bound(np.array([[np.nan]]), reference) == 0.0
    assert check.error_over_bound(np.array([[0.0]]), reference) == np.inf


def test_an_exact_zero_needs_an_exact_zero_in_bf16() -> None:
    reference = check.Reference(rows=np.arange(1), values=np.zeros((1, 1)), magnitude=np.zeros((1, 1)), dtype="bf16")
    assert check.error_over_bound(np.zeros((1, 1)), reference) == 0.0
    assert check.error_over_bound(np.full((1, 1), 1e-30), reference) == np.inf


def test_only_the_sampled_rows_are_compared() -> None:
    x, w, y, _ = _case()
    rows = check.sample_rows(40, 6, seed=3)
    reference = check.make_reference(x, w[rows], rows, "fp16")
    assert check.error_over_bound(y, reference) <= 1.0
    y[:, np.setdiff1d(np.arange(40), rows)] = 9
    assert check.error_over_bound(y, reference) <= 1.0


def test_sample_rows() -> None:
    assert check.sample_rows(5, 512, 0).tolist() == [0, 1, 2, 3, 4]
    rows = check.sample_rows(10_000, 512, 0)
    assert (rows[0], rows[-1], len(set(rows.tolist()))) == (0, 9_999, 512)
    assert check.sample_rows(3, 1, 0).tolist() == [0, 2]


def test_whole_comparison_passes_two_right_results() -> None:
    x, w, y, _ = _case()
    other = (x.astype(np.float32) @ w.T.astype(np.float32)).astype(np.float16).astype(np.float64)
    assert check.whole_error_over_bound(y, other, x, float(abs(w).max()), "fp16") <= 1.0


def test_poison() -> None:
    half, bits = np.zeros(4, np.float16), np.zeros(4, np.uint16)
    check.poison(half, "fp16")
    check.poison(bits, "bf16")
    assert np.isnan(half).all()
    assert np.isnan(to_float64(bits, "bf16")).all()
