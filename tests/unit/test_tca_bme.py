# SPDX-License-Identifier: Apache-2.0
"""The TCA-BME format: what it holds, where, and what it refuses; how its products are planned."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.baselines import SYSTEMS, tca_bme, weight_class
from flashllm.baselines.tca_bme import CAPACITIES, SPLITS, TcaBme
from flashllm.errors import ArgumentError
from flashllm.jit.spec import ALL_ARCHS, shared_limit
from weight_cases import PATTERNS, matrix, pruned

SHAPES = ((1, 1), (7, 72), (64, 64), (65, 64), (129, 65), (200, 456), (384, 203), (1, 130), (300, 2))
DENSITIES = {"full": 1.0, "empty": 0.0}


def by_element(w: NDArray[Any]) -> dict[str, list[int]]:
    """The arrays of ``w``, element by element according to the format's description."""
    bits = pruned(w)
    rows, columns = w.shape
    values: list[int] = []
    bitmaps, tile_offsets, median_offsets = [], [0], []
    for row in range(0, rows, 64):
        for column in range(0, columns, 64):
            for median in range(4):
                median_offsets.append(len(values) - tile_offsets[-1])
                for tc_tile in range(4):
                    for right, low in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        bitmap = 0
                        for bit in range(64):
                            i = row + median * 16 + low * 8 + bit // 8
                            j = column + tc_tile * 16 + right * 8 + bit % 8
                            if i < rows and j < columns and bits[i, j]:
                                values.append(int(bits[i, j]))
                                bitmap |= 1 << bit
                        bitmaps.append(bitmap)
            values += [0] * (-len(values) % 8)
            tile_offsets.append(len(values))
    return {"values": values, "bitmaps": bitmaps, "tile_offsets": tile_offsets, "median_offsets": median_offsets}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_to_what_was_encoded(shape: tuple[int, int], pattern: str) -> None:
    for density in (0.03, 0.5, 1.0):
        w = matrix(pattern, *shape, DENSITIES.get(pattern, density), 3, "fp16")
        before = w.copy()
        encoded = TcaBme.from_dense(w)
        assert (w.view(np.uint16) == before.view(np.uint16)).all()
        assert encoded.shape == shape
        decoded = encoded.to_dense()
        assert decoded.dtype == np.float16
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded.view(np.uint16), pruned(w))
        assert encoded.nnz == np.count_nonzero(pruned(w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_are_as_described(shape: tuple[int, int]) -> None:
    dtypes = {"values": "uint16", "bitmaps": "uint64", "tile_offsets": "int32", "median_offsets": "int32"}
    for pattern, density in (("uniform", 0.4), ("skewed", 0.6), ("empty-tiles", 0.9), ("full", 1.0), ("empty", 0.0)):
        w = matrix(pattern, *shape, density, 5, "fp16")
        encoded = TcaBme.from_dense(w)
        want = by_element(w)
        for name, array in encoded.arrays().items():
            assert array.dtype == dtypes[name]
            assert array.flags.c_contiguous
            assert array.tolist() == want[name], name
        assert encoded.fullest == max(np.diff(want["tile_offsets"]))
        assert encoded.nbytes == sum(array.nbytes for array in encoded.arrays().values())


def test_zeros_of_both_signs_are_pruned_and_nothing_else() -> None:
    w = np.array([[0.0, -0.0, np.nan, np.inf, -np.inf, 6e-8, -6e-8, 1.0]], np.float16)
    encoded = TcaBme.from_dense(w)
    assert encoded.nnz == 6
    assert encoded.bitmaps[0] == 0b11111100
    assert encoded.values[:6].tolist() == w.view(np.uint16)[0, 2:].tolist()
    assert encoded.to_dense().view(np.uint16).tolist() == [[0, 0, *w.view(np.uint16)[0, 2:].tolist()]]


def test_lanes_own_two_bits_of_every_bitmap() -> None:
    """What the kernel relies on: bits 2 l and 2 l + 1 are the elements of lane l in a register of the mma fragment."""
    for lane in range(32):
        for register in range(4):
            w = np.zeros((16, 16), np.float16)
            row, column = lane // 4 + register % 2 * 8, lane % 4 * 2 + register // 2 * 8
            w[row, column : column + 2] = 1, 2
            encoded = TcaBme.from_dense(w)
            assert encoded.bitmaps[:4].tolist() == [3 << 2 * lane if r == register else 0 for r in range(4)]
            assert encoded.values[:2].view(np.float16).tolist() == [1, 2]


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix("skewed", 300, 203, 0.6, 7, "fp16")
    want = TcaBme.from_dense(w)
    for elements in (1, 64 * 256 * 2, 64 * 256 * 3):
        monkeypatch.setattr(tca_bme, "_STRIP_ELEMENTS", elements)
        got = TcaBme.from_dense(w)
        for name, array in want.arrays().items():
            np.testing.assert_array_equal(got.arrays()[name], array)
        np.testing.assert_array_equal(got.to_dense().view(np.uint16), pruned(w))


def test_size_is_that_of_the_published_format() -> None:
    w = matrix("uniform", 512, 1024, 0.5, 1, "fp16")
    encoded = TcaBme.from_dense(w)
    tiles = 8 * 16
    counts = np.count_nonzero(pruned(w).reshape(8, 64, 16, 64), axis=(1, 3))
    values = int((-(-counts // 8) * 8).sum())
    assert encoded.nbytes == 2 * values + 8 * tiles * 64 + 4 * (tiles + 1) + 4 * tiles * 4
    assert abs(encoded.nbytes / w.size - 1.132) < 0.01


def test_temporaries_are_those_of_a_strip() -> None:
    w = matrix("uniform", 64 * 40, 64 * 40, 0.5, 2, "fp16")
    tracemalloc.start()
    encoded = TcaBme.from_dense(w)
    whole = tracemalloc.get_traced_memory()[1] - encoded.nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tca_bme, "_STRIP_ELEMENTS", w.size // 10)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        again = TcaBme.from_dense(w)
        strips = tracemalloc.get_traced_memory()[1] - before - again.nbytes
    tracemalloc.stop()
    assert strips < again.nbytes * 1.1 + 24 * w.size / 10  # the strips' results until they are joined
    assert strips < whole


def test_copy_shares_nothing() -> None:
    w = matrix("uniform", 130, 70, 0.5, 1, "fp16")
    encoded = TcaBme.from_dense(w)
    other = encoded.copy()
    for name, array in encoded.arrays().items():
        assert not np.shares_memory(array, other.arrays()[name])
        np.testing.assert_array_equal(array, other.arrays()[name])
        array.fill(0)
    np.testing.assert_array_equal(other.to_dense().view(np.uint16), pruned(w))
    assert (other.shape, other.nnz, other.fullest) == (encoded.shape, encoded.nnz, encoded.fullest)


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        ([[1.0]], "array"),
        (np.ones((2, 2), np.float32), "float16"),
        (np.ones((2, 2), ">f2"), "float16"),
        (np.ones(4, np.float16), "shape"),
        (np.ones((0, 4), np.float16), "shape"),
        (np.ones((4, 0), np.float16), "shape"),
        (np.ones((4, 8), np.float16)[:, ::2], "contiguous"),
        (np.asfortranarray(np.ones((4, 8), np.float16)), "contiguous"),
    ],
    ids=str,
)
def test_refuses_other_matrices(dense: Any, expected: str) -> None:
    with pytest.raises(ArgumentError, match=f"dense: expected .*{expected}"):
        TcaBme.from_dense(dense)


def test_refuses_more_values_than_offsets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.ones((65, 64), np.float16)
    monkeypatch.setattr(tca_bme, "MAX_VALUES", 4096 + 64)
    TcaBme.from_dense(w)
    monkeypatch.setattr(tca_bme, "MAX_VALUES", 4096 + 63)
    with pytest.raises(ArgumentError, match="at most 4159 stored values, got 4160"):
        TcaBme.from_dense(w)


def test_capacity_follows_the_fullest_tile() -> None:
    for count, capacity in ((0, 2304), (1, 2304), (2304, 2304), (2305, 4096), (4096, 4096)):
        w = np.zeros((128, 64), np.float16)
        w.reshape(-1)[:count] = 1
        w[64:, :10] = 1
        encoded = TcaBme.from_dense(w)
        assert encoded.fullest == max(640, -(-count // 8) * 8)
        assert encoded.capacity == capacity
        assert {choice.capacity for choice in encoded.choices(8, sm_count=4)} == {capacity}
    assert CAPACITIES[-1] == 64 * 64


@pytest.mark.parametrize("k", [1, 64, 65, 64 * 3, 64 * 8, 64 * 8 + 1, 64 * 700])
def test_splits_that_have_tiles_come_into_question(k: int) -> None:
    encoded = TcaBme.from_dense(np.zeros((1, k), np.float16))
    for n, width in ((1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (64, 64), (65, 64), (1000, 64)):
        choices = encoded.choices(n, sm_count=132)
        assert [choice.split for choice in choices] == [split for split in SPLITS if 64 * (split - 1) < k]
        assert {choice.n_block for choice in choices} == {width}
        assert choices[0].label == f"tca_bme<kN={width}> split 1"
    with pytest.raises(ArgumentError, match="n: expected"):
        encoded.choices(0, sm_count=132)


def test_every_kernel_of_a_product_is_listed() -> None:
    specs = tca_bme.specs()
    assert len(set(specs)) == len(specs) <= 12
    for w in (np.ones((130, 600), np.float16), np.zeros((130, 603), np.float16)):
        encoded = TcaBme.from_dense(w)
        for n in (1, 9, 17, 33, 65):
            x, y = np.zeros((n, w.shape[1]), np.float16), np.zeros((n, 130), np.float16)
            for choice in encoded.choices(n, sm_count=4):
                workspace = np.zeros(encoded.workspace_bytes(n, choice), np.uint8)
                steps = encoded.steps(x, y, workspace, choice)
                names = ["tca_bme_pad"] * (w.shape[1] == 603) + ["tca_bme"] + ["tca_bme_sum"] * (choice.split > 1)
                assert [step.spec.name for step in steps] == names
                assert all(step.spec in specs for step in steps)
    for spec in specs:
        for arch in ALL_ARCHS:
            assert spec.supports(arch)
            # Five blocks share an SM wherever there is as much shared memory as on a server GPU.
            assert 5 * (spec.shared_bytes + 1024) <= (shared_limit(arch) or 0) or arch in ("86", "89", "120a")


def test_workspace_is_for_sums_of_splits_and_for_rows_that_start_anywhere() -> None:
    for k, padded in ((600, 0), (603, 608)):
        encoded = TcaBme.from_dense(np.ones((130, k), np.float16))
        for choice in encoded.choices(5, sm_count=4):
            sums = choice.split * 5 * 192 * 4 if choice.split > 1 else 0
            assert encoded.workspace_bytes(5, choice) == sums + 5 * padded * 2


def test_refuses_operands_that_do_not_fit() -> None:
    encoded = TcaBme.from_dense(np.ones((100, 200), np.float16))
    choice = encoded.choices(5, sm_count=4)[1]
    x, y = np.zeros((5, 200), np.float16), np.zeros((5, 100), np.float16)
    workspace = np.zeros(encoded.workspace_bytes(5, choice), np.uint8)
    encoded.steps(x, y, workspace, choice)
    for wrong in (x[:, :199], x[0], x[:0], x.astype(np.float32), np.asfortranarray(x)):
        with pytest.raises(ArgumentError, match="x: expected"):
            encoded.steps(wrong, y, workspace, choice)
    for wrong in (y[:4], y[:, :99], y.T, y.view(np.uint16), np.asfortranarray(y)):
        with pytest.raises(ArgumentError, match="y: expected"):
            encoded.steps(x, wrong, workspace, choice)
    for wrong in (workspace[1:], workspace.view(np.float32), workspace[None]):
        with pytest.raises(ArgumentError, match="workspace: expected"):
            encoded.steps(x, y, wrong, choice)
    for changed in (replace(choice, split=5), replace(choice, split=0), replace(choice, capacity=2304)):
        with pytest.raises(ArgumentError, match="choice: expected"):
            encoded.steps(x, y, workspace, changed)


def test_is_the_system_of_its_name() -> None:
    assert weight_class("tca-bme") is TcaBme
    assert (TcaBme.SYSTEM, TcaBme.FORMAT, TcaBme.LAYOUT) == ("tca-bme", "tca-bme", "row")
    for density in (0.1, 0.5, 0.9):
        encoded = TcaBme.from_dense(matrix("uniform", 1024, 1024, density, 1, "fp16"))
        assert encoded.nbytes <= SYSTEMS["tca-bme"].bytes_per_element(density) * 1024 * 1024
