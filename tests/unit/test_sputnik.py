# SPDX-License-Identifier: Apache-2.0
"""The CSR of the Sputnik baseline, what it refuses, and which instances of its kernel a product may take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.baselines import baseline, sputnik
from flashllm.baselines.sputnik import Choice, Sputnik
from flashllm.errors import ArgumentError
from products import assert_exact, exact, integers, weight
from weight_cases import PATTERNS, matrix, pruned

SHAPES = ((1, 1), (7, 72), (129, 65), (200, 456), (384, 203))
BUFFERS = ("values", "columns", "row_offsets", "row_indices")


def slow_csr(dense: NDArray[Any]) -> tuple[list[int], list[int], list[int]]:
    """Values (bits), columns and offsets, element by element."""
    values: list[int] = []
    columns: list[int] = []
    offsets = [0]
    for row in dense.view(np.uint16):
        kept = [k for k in range(len(row)) if row[k] & 0x7FFF]
        padding = -len(kept) % 4
        values += [int(row[k]) for k in kept] + [0] * padding
        columns += kept + [kept[-1]] * padding if kept else []
        offsets.append(len(values))
    end = max(8, -(-len(values) // 8) * 8)
    return values + [0] * (end - len(values)), columns + [0] * (end - len(columns)), offsets


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_of_any_bits(shape: tuple[int, int], pattern: str) -> None:
    for density in (0.03, 0.4, 1.0):
        dense = matrix(pattern, *shape, density, 1, "fp16")
        decoded = Sputnik.from_dense(dense, swizzle=density == 0.4).to_dense()
        assert decoded.dtype == np.float16
        np.testing.assert_array_equal(decoded.view(np.uint16), pruned(dense))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_buffers(shape: tuple[int, int], pattern: str) -> None:
    dense = matrix(pattern, *shape, 0.3, 2, "fp16")
    packed = Sputnik.from_dense(dense)
    values, columns, offsets = slow_csr(dense)
    np.testing.assert_array_equal(packed.values, np.array(values, np.uint16))
    np.testing.assert_array_equal(packed.columns, np.array(columns, np.uint16))
    np.testing.assert_array_equal(packed.row_offsets, np.array(offsets, np.int32))
    np.testing.assert_array_equal(packed.row_indices, np.arange(shape[0], dtype=np.int32))
    assert [getattr(packed, name).dtype for name in BUFFERS] == [np.uint16, np.uint16, np.int32, np.int32]
    assert packed.shape == shape
    assert packed.nnz == np.count_nonzero(dense.view(np.uint16) & 0x7FFF)
    assert packed.nbytes == 4 * len(values) + 4 * (shape[0] + 1) + 4 * shape[0]


@pytest.mark.parametrize("height", [1, 3, 50])
def test_strips_do_not_show(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = matrix("skewed", 130, 75, 0.4, 3, "fp16")
    whole = Sputnik.from_dense(dense, swizzle=True)
    monkeypatch.setattr(sputnik, "_STRIP_ELEMENTS", height * 75)
    parts = Sputnik.from_dense(dense, swizzle=True)
    for name in BUFFERS:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_array_equal(parts.to_dense().view(np.uint16), pruned(dense))


def test_swizzle_sorts_rows_by_length_and_leaves_equals_in_order() -> None:
    dense = np.zeros((6, 9), np.float16)
    for row, count in enumerate((2, 5, 0, 5, 9, 2)):
        dense[row, :count] = 1
    assert Sputnik.from_dense(dense).row_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert Sputnik.from_dense(dense, swizzle=True).row_indices.tolist() == [4, 1, 3, 0, 5, 2]


def test_columns_use_all_sixteen_bits() -> None:
    dense = np.zeros((2, 65535), np.float16)
    dense[0, [0, 32767, 32768, 65534]] = 1, 2, 3, 4
    dense[1, 65533] = 5
    packed = Sputnik.from_dense(dense)
    assert packed.columns.tolist() == [0, 32767, 32768, 65534, 65533, 65533, 65533, 65533]
    np.testing.assert_array_equal(packed.to_dense(), dense)
    with pytest.raises(ArgumentError, match=r"dense: expected at most 65535 columns.*got 65536"):
        Sputnik.from_dense(np.zeros((1, 65536), np.float16))


def test_copy_shares_nothing() -> None:
    packed = Sputnik.from_dense(matrix("uniform", 20, 30, 0.5, 4, "fp16"), swizzle=True)
    copy = packed.copy()
    assert (copy.shape, copy.nnz, copy.nbytes) == (packed.shape, packed.nnz, packed.nbytes)
    for name in BUFFERS:
        mine, other = getattr(packed, name), getattr(copy, name)
        np.testing.assert_array_equal(mine, other)
        assert not np.may_share_memory(mine, other)


@pytest.mark.parametrize(
    "bad",
    [
        [[1.0]],
        np.ones((2, 3), np.float32),
        np.ones((2, 3), np.uint16),
        np.ones(6, np.float16),
        np.ones((2, 0), np.float16),
        np.ones((0, 2), np.float16),
        np.ones((4, 6), np.float16)[:, ::2],
        np.ones((4, 6), np.float16).T,
    ],
    ids=["list", "fp32", "uint16", "1-D", "K=0", "M=0", "strided", "transposed"],
)
def test_refuses_other_matrices(bad: Any) -> None:
    with pytest.raises(ArgumentError, match="dense: expected"):
        Sputnik.from_dense(bad)


def test_refuses_more_elements_than_offsets_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.ones((3, 5), np.float16)  # 24 stored elements
    monkeypatch.setattr(sputnik, "MAX_STORED", 24)
    Sputnik.from_dense(dense)
    monkeypatch.setattr(sputnik, "MAX_STORED", 23)
    with pytest.raises(ArgumentError, match=r"dense: expected at most 23 stored elements, got 24"):
        Sputnik.from_dense(dense)


PUBLISHED = {
    8: "sputnik<Y=4,X=16,W=8>",
    16: "sputnik<Y=4,X=16,W=8>",
    24: "sputnik<Y=4,X=32,W=8>",
    32: "sputnik<Y=4,X=32,W=8>",
    40: "sputnik<Y=2,X=64,W=16>",
    64: "sputnik<Y=4,X=64,W=8>",
    96: "sputnik<Y=2,X=64,W=16>",
    128: "sputnik<Y=4,X=64,W=8>",
}


@pytest.mark.parametrize(("n", "label"), PUBLISHED.items())
def test_the_published_configuration_comes_first(n: int, label: str) -> None:
    found = sputnik.choices(n)
    assert found[0].label == label
    assert len(found) == 2


def test_every_n_has_choices_that_are_compiled() -> None:
    specs = sputnik.specs()
    assert len(specs) <= 12
    named = set()
    packed = Sputnik.from_dense(np.ones((1, 1), np.float16))
    for n in (*range(1, 400), 1000, 1001, 65536, 65535 * 32):
        found = packed.choices(n, sm_count=132)
        assert 1 <= len(found) <= 2
        assert len({choice.label for choice in found}) == len(found)
        for choice in found:
            assert n % choice.vector == 0
            assert choice.rows * choice.width == 32
            assert choice.spec in specs
            assert packed.workspace_bytes(n, choice) == 0
            named.add(choice.spec)
    assert named == set(specs)
    assert len({choice.label for n in range(1, 400) for choice in sputnik.choices(n)}) == len(specs)


def test_refuses_an_n_that_no_grid_covers() -> None:
    with pytest.raises(ArgumentError, match="n: expected columns of x >= 1, got 0"):
        sputnik.choices(0)
    with pytest.raises(ArgumentError, match="n: expected columns of x in at most 65535 strips"):
        sputnik.choices(65535 * 32 + 1)


def test_refuses_operands_that_do_not_fit() -> None:
    packed = Sputnik.from_dense(np.ones((3, 5), np.float16))
    choice = sputnik.choices(8)[0]
    x, y = np.ones((5, 8), np.float16), np.ones((3, 8), np.float16)
    (step,) = packed.steps(x, y, None, choice)
    assert step.grid == (1, 1)
    cases: list[tuple[str, Any, Any, Choice]] = [
        ("x", np.ones((8, 5), np.float16), y, choice),
        ("x", x[0], y, choice),
        ("x", x.astype(np.float32), y, choice),
        ("x", np.ones((5, 16), np.float16)[:, ::2], y, choice),
        ("y", x, np.ones((8, 3), np.float16), choice),
        ("y", x, y.astype(np.float32), choice),
        ("y", x, np.ones((8, 3), np.float16).T, choice),
        ("x", np.ones((5, 7), np.float16), np.ones((3, 7), np.float16), choice),
        ("x", np.ones((5, 0), np.float16), np.ones((3, 0), np.float16), choice),
    ]
    for name, bad_x, bad_y, wanted in cases:
        with pytest.raises(ArgumentError, match=f"{name}: expected"):
            packed.steps(bad_x, bad_y, None, wanted)


@pytest.mark.gpu
def test_encodes_and_multiplies_the_same_on_a_gpu(cp: Any) -> None:
    for shape, n in (((129, 65), 5), ((200, 456), 16), ((384, 2003), 40), ((300, 3001), 64)):
        dense = weight("skewed", shape, 0.4, "fp16")
        host = Sputnik.from_dense(dense, swizzle=True)
        packed = Sputnik.from_dense(cp.asarray(dense), swizzle=True)
        for name in BUFFERS:
            np.testing.assert_array_equal(getattr(packed, name).get(), getattr(host, name))
        np.testing.assert_array_equal(packed.to_dense().get(), dense)
        x = integers(np.random.default_rng(5), (n, shape[1]), "fp16")
        for choice in packed.choices(n, sm_count=132):
            y = cp.full((shape[0], n), cp.nan, dtype=cp.float16)
            baseline.run(packed.steps(cp.asarray(np.ascontiguousarray(x.T)), y, None, choice))
            assert_exact(np.ascontiguousarray(y.get().T), exact(x, dense, "fp16"))
