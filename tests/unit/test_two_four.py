# SPDX-License-Identifier: Apache-2.0
"""The 2:4 format: what it holds, where, and what it refuses; how its products are planned."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.baselines import two_four
from flashllm.baselines.two_four import SPLITS, TILE_METADATA, TILE_VALUES, TwoFour
from flashllm.errors import ArgumentError
from flashllm.jit.spec import ALL_ARCHS, shared_limit
from weight_cases import PATTERNS, matrix, pruned

SHAPES = ((1, 1), (7, 72), (128, 64), (129, 65), (200, 456), (384, 203), (1, 130), (300, 2))
DENSITIES = {"full": 1.0, "empty": 0.0}


def first_two_of(w: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of ``w``, element by element: in every group of four columns, all but the first two nonzeros are zero."""
    out = pruned(w)
    for row in out:
        for first in range(0, len(row), 4):
            places = [k for k in range(first, min(first + 4, len(row))) if row[k]]
            row[places[2:]] = 0
    return out


def stored(w: TwoFour, row: int, column: int) -> tuple[list[int], list[int]]:
    """The two places and bits stored for the group of ``column``, by the formulas of the format's description."""
    tile = w.tiles[row // 128, column // 64]
    warp, rows, g, h = row % 128 // 32, row % 32 // 16, row % 8, row % 16 // 8
    step, j, t = column % 64 // 32, column % 32 // 16, column % 16 // 4
    values = tile[:TILE_VALUES].reshape(4, 2, 2, 32, 8)
    metadata = tile[TILE_VALUES:].reshape(4, 32, 2, 2)
    code = int(metadata[warp, 4 * g + 2 * rows + j, step, h]) >> (4 * t)
    bits = values[warp, step, rows, 4 * g + t, 4 * j + 2 * h :][:2]
    return [code & 3, code >> 2 & 3], [int(b) for b in bits]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_two_decode_to_what_they_are(shape: tuple[int, int], pattern: str) -> None:
    for density in (0.1, 0.5, 1.0):
        w = matrix(pattern, *shape, DENSITIES.get(pattern, density), 3, "fp16")
        want = first_two_of(w)
        part = TwoFour.first_two(w)
        assert part.shape == shape
        decoded = part.to_dense()
        assert decoded.dtype == np.float16
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded.view(np.uint16), want)
        # It is a 2:4 matrix, and encoding that gives the same bytes.
        again = TwoFour.from_dense(want.view(np.float16))
        np.testing.assert_array_equal(again.tiles, part.tiles)


def test_order_in_memory() -> None:
    shape = (200, 136)
    w = first_two_of(matrix("uniform", *shape, 0.4, 5, "fp16"))
    made = TwoFour.from_dense(w.view(np.float16))
    assert made.tiles.shape == (2, 3, TILE_VALUES + TILE_METADATA)
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(0, shape[0], 500), rng.integers(0, shape[1] // 4, 500) * 4, strict=True):
        group = w[row, column : column + 4]
        places, bits = stored(made, int(row), int(column))
        assert places[0] < places[1]
        assert bits == [int(group[place]) for place in places]
        assert {int(k) for k in np.flatnonzero(group)} <= set(places)


def test_groups_with_fewer_nonzeros_take_the_lowest_other_places() -> None:
    w = np.zeros((1, 20), np.float16)
    w[0, 4] = w[0, 9] = w[0, 14] = w[0, 19] = 1
    made = TwoFour.from_dense(w)
    got = [stored(made, 0, column) for column in range(0, 20, 4)]
    one = 0x3C00
    assert got == [
        ([0, 1], [0, 0]),
        ([0, 1], [one, 0]),
        ([0, 1], [0, one]),
        ([0, 2], [0, one]),
        ([0, 3], [0, one]),
    ]


def test_padding_is_zeros_at_rising_places() -> None:
    tile = TwoFour.from_dense(np.ones((1, 1), np.float16)).tiles[0, 0]
    assert np.count_nonzero(tile[:TILE_VALUES]) == 1
    assert set(tile[TILE_VALUES:].tolist()) == {0x4444}


@pytest.mark.parametrize(
    ("shape", "padded"), [((128, 64), (128, 64)), ((512, 1024), (512, 1024)), ((1, 65), (128, 128))]
)
def test_takes_nine_sixteenths(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    assert TwoFour.from_dense(np.zeros(shape, np.float16)).nbytes * 16 == padded[0] * padded[1] * 2 * 9


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix("skewed", 700, 260, 0.6, 9, "fp16")
    whole = TwoFour.first_two(w)
    for elements in (1, 2 * 128 * 320):  # one tile of rows each; two, with the last alone
        monkeypatch.setattr(two_four, "_STRIP_ELEMENTS", elements)
        parts = TwoFour.first_two(w)
        np.testing.assert_array_equal(parts.tiles, whole.tiles)
        np.testing.assert_array_equal(parts.to_dense().view(np.uint16), first_two_of(w))
        with pytest.raises(ArgumentError, match=r"3 in row 650, columns 256 to 259"):
            TwoFour.from_dense(_crowded((700, 260), 650, [256, 257, 259]))


def test_temporaries_are_those_of_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_four, "_STRIP_ELEMENTS", 1 << 18)
    w = matrix("uniform", 2048, 2048, 0.3, 1, "fp16")
    tracemalloc.start()
    try:
        part = TwoFour.first_two(w)
        encoding = tracemalloc.get_traced_memory()[1] - part.nbytes
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        decoded = part.to_dense()
        decoding = tracemalloc.get_traced_memory()[1] - held - decoded.nbytes
    finally:
        tracemalloc.stop()
    assert encoding < 16 << 18
    assert decoding < 16 << 18


def _crowded(shape: tuple[int, int], row: int, columns: list[int]) -> NDArray[Any]:
    w = np.zeros(shape, np.float16)
    w[row, columns] = 1
    return w


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (_crowded((3, 9), 1, [4, 5, 6]), "3 in row 1, columns 4 to 7"),
        (_crowded((300, 70), 299, [64, 65, 66, 67]), "4 in row 299, columns 64 to 67"),
        (np.zeros((2, 2), np.float32), "float32"),
        (np.zeros((2, 2), ">f2"), "float16"),
        (np.zeros(4, np.float16), r"shape \[4\]"),
        (np.zeros((0, 4), np.float16), "shape"),
        (np.zeros((4, 4), np.float16).T[:, :2], "strides"),
        ([[1.0]], "list"),
    ],
    ids=["three", "four", "fp32", "byte order", "1-D", "no rows", "strides", "a list"],
)
def test_refuses(w: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        TwoFour.from_dense(w)
    assert caught.value.argument == "dense"


def test_a_group_may_have_two_nonzeros_anywhere() -> None:
    w = np.zeros((6, 4), np.float16)
    for row, pair in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        w[row, pair[0]], w[row, pair[1]] = np.nan, -np.inf
    np.testing.assert_array_equal(TwoFour.from_dense(w).to_dense(), w)


def test_a_copy_has_buffers_of_its_own() -> None:
    made = TwoFour.from_dense(first_two_of(matrix("uniform", 9, 9, 0.3, 1, "fp16")).view(np.float16))
    other = made.copy()
    np.testing.assert_array_equal(other.tiles, made.tiles)
    other.tiles[:] = 0
    assert made.tiles.any()
    assert other.shape == made.shape


def _empty(rows: int, columns: int) -> TwoFour:
    """A weight of that shape whose tiles are never read."""
    tiles = np.broadcast_to(np.uint16(0), (-(-rows // 128), -(-columns // 64), TILE_VALUES + TILE_METADATA))
    return TwoFour(shape=(rows, columns), tiles=tiles)


@pytest.mark.parametrize("n", [1, 8, 9, 16, 17, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("columns", [1, 64, 129, 7168, 12288, 12289, 49152, 98304, 98305, 200000])
def test_choices(columns: int, n: int) -> None:
    w = _empty(7168, columns)
    for options in ({}, {"column": True, "add": True}):
        choices = w.choices_as(n, sm_count=132, **options)
        assert choices
        assert len(set(choices)) == len(choices)
        for choice in choices:
            assert choice.n_block >= min(n, 64)
            assert choice.n_block < 2 * n or choice.n_block == 8
            tiles = -(-columns // 64)
            assert choice.splits <= tiles
            assert -(-tiles // choice.splits) <= 192, "as many sums as a tensor core may add up"
            assert choice.splits in SPLITS or columns > 98304
            assert choice.spec in two_four.specs_as(**options)
            assert w.workspace_bytes(n, choice) == (choice.splits * 7168 * n * 4 if choice.splits > 1 else 0)
    assert w.choices(n, sm_count=132) == w.choices_as(n, sm_count=132)


def test_every_split_is_tried_where_k_allows_it() -> None:
    choices = _empty(7168, 7168).choices(16, sm_count=132)
    assert sorted(choice.splits for choice in choices) == list(SPLITS)
    # 56 tiles of rows, 112 along K: two splits are 112 blocks of 56 tiles, one for each SM; three, two for some of 38.
    assert choices[0].splits == 2
    assert choices[-1].splits == 1


def test_specs_fit_every_architecture() -> None:
    specs = {*two_four.specs(), *two_four.specs_as(column=True, add=True)}
    assert len(specs) == 12
    for spec in specs:
        for arch in ALL_ARCHS:
            limit = shared_limit(arch)
            assert spec.supports(arch)
            assert limit is not None
            assert spec.shared_bytes <= limit


def test_labels_tell_choices_apart() -> None:
    choices = _empty(4096, 4096).choices(20, sm_count=132)
    assert len({choice.label for choice in choices}) == len(choices) == 12


@pytest.mark.parametrize("numbers", [(0, 132), (-1, 132), (8, 0)])
def test_choices_refuse(numbers: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="numbers >= 1"):
        _empty(8, 8).choices(numbers[0], sm_count=numbers[1])


def test_steps_refuse_what_does_not_fit() -> None:
    w = _empty(200, 456)
    row = next(c for c in w.choices(5, sm_count=4) if c.splits == 3)
    column = next(c for c in w.choices_as(5, sm_count=4, column=True) if c.splits == 3)
    half = {shape: np.zeros(shape, np.float16) for shape in ((5, 456), (5, 200), (456, 5), (200, 5), (6, 200))}
    workspace = np.zeros(3 * 200 * 5 * 4, np.uint8)
    assert len(w.steps(half[5, 456], half[5, 200], workspace, row)) == 2
    assert len(w.steps(half[456, 5], half[200, 5], workspace, column)) == 2
    for x, y, choice in (
        (half[456, 5], half[200, 5], row),
        (half[5, 456], half[5, 200], column),
        (half[5, 456], half[6, 200], row),
        (half[5, 200], half[5, 200], row),
    ):
        with pytest.raises(ArgumentError, match="x, y: expected shapes"):
            w.steps(x, y, workspace, choice)
    with pytest.raises(ArgumentError, match="at least 12000 bytes, got 11999"):
        w.steps(half[5, 456], half[5, 200], workspace[1:], row)
