# SPDX-License-Identifier: Apache-2.0
"""SparTA's two parts: which element goes where, and how their products are put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.baselines import sparta, sputnik, two_four
from flashllm.baselines.cusparselt import CusparseLt24
from flashllm.baselines.pattern_24 import is_two_of_four
from flashllm.baselines.sparta import SparTA, residual_of
from flashllm.baselines.sparta_cusparselt import SparTACusparseLt
from flashllm.baselines.sputnik import Sputnik
from flashllm.baselines.two_four import TwoFour
from flashllm.errors import ArgumentError
from weight_cases import PATTERNS, matrix, pruned

SHAPES = ((1, 1), (7, 72), (129, 65), (200, 456), (384, 203), (2, 3))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_disjoint_and_add_up(shape: tuple[int, int], pattern: str) -> None:
    for density in (0.05, 0.4, 1.0):
        w = matrix(pattern, *shape, density, 7, "fp16")
        made = SparTA.from_dense(w)
        assert made.shape == shape
        parts = [part.to_dense().view(np.uint16) for part in (made.structured, made.residual)]
        assert not ((parts[0] != 0) & (parts[1] != 0)).any()
        decoded = made.to_dense()
        assert decoded.dtype == np.float16
        np.testing.assert_array_equal(decoded.view(np.uint16), pruned(w))
        np.testing.assert_array_equal(parts[1], residual_of(w).view(np.uint16))


def test_third_and_fourth_nonzeros_are_the_residual() -> None:
    groups = {
        (0, 0, 0, 0): (0, 0, 0, 0),
        (5, 0, 0, 6): (0, 0, 0, 0),
        (1, 2, 9, 0): (0, 0, 9, 0),  # by position, whatever the magnitude
        (1, 2, 0, 9): (0, 0, 0, 9),
        (0, 1, 2, 9): (0, 0, 0, 9),
        (1, 0, 2, 9): (0, 0, 0, 9),
        (1, 2, 8, 9): (0, 0, 8, 9),
        (-0.0, 3, 4, np.nan): (0, 0, 0, np.nan),  # -0 is no nonzero, NaN is one
    }
    w = np.array(list(groups), np.float16).reshape(2, -1)
    want = np.array(list(groups.values()), np.float16).reshape(2, -1)
    np.testing.assert_array_equal(residual_of(w), want)
    made = SparTA.from_dense(w)
    np.testing.assert_array_equal(made.residual.to_dense(), want)
    np.testing.assert_array_equal(made.structured.to_dense(), np.where(want != 0, 0, w))


def test_residual_is_as_dense_as_the_pattern_says() -> None:
    """For independent elements, a fraction of (4 d^3 (1 - d) + 2 d^4) / 4."""
    for density in (0.1, 0.3, 0.5):
        w = matrix("uniform", 1024, 1024, density, 1, "fp16")
        d = np.count_nonzero(pruned(w)) / w.size
        expected = (4 * d**3 * (1 - d) + 2 * d**4) / 4
        share = np.count_nonzero(residual_of(w)) / w.size
        assert abs(share - expected) < 5 * np.sqrt(expected / w.size) + 1e-4


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix("skewed", 700, 203, 0.7, 2, "fp16")
    whole = residual_of(w)
    monkeypatch.setattr(two_four, "_STRIP_ELEMENTS", 1)
    np.testing.assert_array_equal(residual_of(w).view(np.uint16), whole.view(np.uint16))
    np.testing.assert_array_equal(SparTA.from_dense(w).to_dense().view(np.uint16), pruned(w))


def test_source_is_left_as_it_was() -> None:
    w = matrix("uniform", 128, 64, 0.8, 4, "fp16")  # whole tiles: nothing has to be padded
    before = w.copy()
    SparTA.from_dense(w)
    np.testing.assert_array_equal(w.view(np.uint16), before.view(np.uint16))


def test_nbytes_and_copy() -> None:
    made = SparTA.from_dense(matrix("uniform", 256, 256, 0.5, 3, "fp16"))
    assert made.nbytes == made.structured.nbytes + made.residual.nbytes
    assert made.structured.nbytes == 256 * 256 * 9 // 8
    assert made.residual.nbytes >= 4 * made.residual.nnz > 0
    other = made.copy()
    other.structured.tiles[:] = 0
    other.residual.values[:] = 0
    assert made.structured.tiles.any()
    assert made.residual.values.any()


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.zeros((1, 65536), np.float16), "at most 65535 columns"),
        (np.zeros((2, 2), np.float32), "float32"),
        (np.zeros(4, np.float16), r"shape \[4\]"),
        (np.zeros((4, 4), np.float16).T[:, :2], "strides"),
        ([[1.0]], "list"),
    ],
    ids=["too wide", "fp32", "1-D", "strides", "a list"],
)
def test_refuses(w: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        SparTA.from_dense(w)
    assert caught.value.argument == "dense"


def test_too_wide_a_matrix_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoFour, "first_two", lambda dense: pytest.fail("made the 2:4 part"))
    with pytest.raises(ArgumentError, match="at most 65535 columns"):
        SparTA.from_dense(np.zeros((1, 65536), np.float16))


def test_65535_columns_are_taken() -> None:
    w = np.zeros((1, 65535), np.float16)
    w[0, -3:] = 1, 2, 3
    made = SparTA.from_dense(w)
    assert made.residual.nnz == 1
    np.testing.assert_array_equal(made.to_dense(), w)


def _weights() -> tuple[NDArray[Any], SparTA]:
    w = matrix("uniform", 200, 456, 0.5, 1, "fp16")
    return w, SparTA.from_dense(w)


@pytest.mark.parametrize("n", [1, 5, 8, 16, 17, 32, 40, 64, 70])
def test_choices_are_those_of_two_four_with_the_first_of_sputnik(n: int) -> None:
    _, made = _weights()
    choices = made.choices(n, sm_count=4)
    assert {choice.residual for choice in choices} == {made.residual.choices(n, sm_count=4)[0]}
    parts = made.structured.choices_as(n, sm_count=4, column=True, add=True)
    assert tuple(choice.structured for choice in choices) == parts
    assert len({choice.label for choice in choices}) == len(choices)
    for choice in choices:
        assert {choice.residual.spec, choice.structured.spec} <= set(sparta.specs())


def test_sputnik_writes_y_before_the_other_part_is_added() -> None:
    _, made = _weights()
    n = 9
    x, y = np.zeros((456, n), np.float16), np.zeros((200, n), np.float16)
    for choice in made.choices(n, sm_count=4):
        workspace = np.zeros(made.workspace_bytes(n, choice), np.uint8)
        assert workspace.size >= made.structured.workspace_bytes(n, choice.structured)
        steps = made.steps(x, y, workspace, choice)
        names = ["sputnik", "two_four"] + ["two_four_reduce"] * (choice.structured.splits > 1)
        assert [step.spec.name for step in steps] == names
        assert all(step.spec in sparta.specs() for step in steps)
        assert all(any(argument is y for argument in step.args) for step in (steps[0], steps[-1]))


def test_a_2_4_part_that_does_not_add_is_refused() -> None:
    _, made = _weights()
    residual = made.residual.choices(9, sm_count=4)[0]
    x, y = np.zeros((456, 9), np.float16), np.zeros((200, 9), np.float16)
    for options in ({"column": True}, {"add": True}, {}):
        structured = made.structured.choices_as(9, sm_count=4, **options)[0]
        choice = sparta.Choice(residual=residual, structured=structured)
        with pytest.raises(ArgumentError, match="choice: expected a 2:4 part in column layout that adds"):
            made.steps(x, y, np.zeros(1 << 20, np.uint8), choice)


def test_names() -> None:
    assert (TwoFour.SYSTEM, TwoFour.FORMAT, TwoFour.LAYOUT) == ("mma-2:4", "2:4", "row")
    assert (SparTA.SYSTEM, SparTA.FORMAT, SparTA.LAYOUT) == ("sparta", "2:4+csr", Sputnik.LAYOUT)
    assert set(sparta.specs()) >= set(sputnik.specs())


def test_the_part_for_cusparselt_is_what_the_residual_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CusparseLt24, "from_dense", lambda dense: CusparseLt24(shape=dense.shape, packed=dense))
    w = matrix("uniform", 64, 96, 0.6, 3, "fp16")
    before = w.copy()
    made = SparTACusparseLt.from_dense(w)
    np.testing.assert_array_equal(w.view(np.uint16), before.view(np.uint16))
    part, rest = made.structured.packed, made.residual.to_dense()
    assert is_two_of_four(part)
    assert (np.count_nonzero(part.reshape(-1, 4), axis=1) == 2).any()
    assert not ((part != 0) & (rest != 0)).any()
    np.testing.assert_array_equal(np.where(rest != 0, rest, part), w)
    np.testing.assert_array_equal(rest.view(np.uint16), residual_of(w).view(np.uint16))
