# SPDX-License-Identifier: Apache-2.0
"""Every breach of the bitmap format is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weight_cases as cases
from flashllm.errors import FormatError
from flashllm.formats import bitmap_check
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import Places

Parts = dict[str, Any]


def weight() -> Bitmap:
    """200 x 600: 20 tiles that reach over both edges, streams that caught up, places stored three times."""
    w = Bitmap.from_dense(cases.matrix("uniform", 200, 600, 0.4, 21, "fp16"))
    assert w.places.shape == (3, 4, 64)
    places = Places.unpack(w.places)
    assert places.lags[1].max() > 20
    assert (places.lanes[1] != np.arange(64) // 2).any()
    assert w.fronts[-1] % 16 not in (0, 15)
    return w


def mask_index(tile: int, part: int, lane: int, word: int) -> int:
    return ((tile * 4 + part) * 32 + lane) * 2 + word


MUTATIONS: dict[str, tuple[str, Callable[[Parts], Any]]] = {}


def mutation(field: str) -> Callable[[Callable[[Parts], Any]], Callable[[Parts], Any]]:
    """A change to the parts of a weight for which ``field`` is blamed; it may return the index."""

    def add(change: Callable[[Parts], Any]) -> Callable[[Parts], Any]:
        MUTATIONS[change.__name__] = (field, change)
        return change

    return add


def setter(field: str, name: str, **values: Any) -> None:
    MUTATIONS[name] = (field, lambda p: p.update(values))


def maker(field: str, name: str, make: Callable[[Any], Any]) -> None:
    """``field`` becomes ``make(field)``."""
    MUTATIONS[name] = (field, lambda p: p.update({field: make(p[field])}))


def poke(field: str, name: str, index: int, make: Callable[[int], int], found_at: int | None = None) -> None:
    """One entry of a buffer becomes another, and is named: ``found_at``, where that is another place."""

    def change(p: Parts) -> int:
        flat = p[field].reshape(-1)
        flat[index] = make(int(flat[index]))
        return index % flat.size if found_at is None else found_at

    MUTATIONS[name] = (field, change)


setter("shape", "shape_of_one_number", shape=(200,))
setter("shape", "shape_with_zero", shape=(200, 0))
setter("shape", "shape_negative", shape=(-200, 600))
setter("shape", "shape_too_large", shape=(2**31, 600))
setter("shape", "shape_of_floats", shape=(200.0, 600.0))
setter("shape", "shape_of_bools", shape=(True, True))
setter("shape", "shape_of_text", shape="ab")
setter("dtype", "dtype_unknown", dtype="fp8")
setter("dtype", "dtype_list", dtype=["fp16"])
setter("nnz", "nnz_negative", nnz=-1)
setter("nnz", "nnz_larger_than_the_matrix", nnz=120_001)
setter("nnz", "nnz_bool", nnz=True)
setter("nnz", "nnz_of_float", nnz=5.0)
setter("nnz", "nnz_zero", nnz=0)
setter("masks", "shape_of_another_tile_grid", shape=(300, 600))
setter("masks", "shape_within_the_tiles", shape=(140, 600))
setter("masks", "shape_of_fewer_columns", shape=(200, 590))
setter("masks", "shape_huge", shape=(2**31 - 1, 2**31 - 1))

for _name, _wide, _signed in (
    ("masks", np.uint64, np.int32),
    ("values", np.uint32, np.int16),
    ("fronts", np.int64, np.uint32),
    ("places", np.uint32, np.int16),
):
    maker(_name, f"{_name}_wider", lambda a, wide=_wide: a.astype(wide))
    maker(_name, f"{_name}_of_the_other_sign", lambda a, signed=_signed: a.view(signed))
    maker(
        _name, f"{_name}_of_the_other_bytes", lambda a: a.astype(a.dtype.newbyteorder(">") if a.itemsize > 1 else "i1")
    )
    maker(_name, f"{_name}_one_short", lambda a: a[:-1].copy())
    maker(_name, f"{_name}_one_more", lambda a: np.concatenate([a, a[-1:]]))
    maker(_name, f"{_name}_not_contiguous", lambda a: np.repeat(a, 2, axis=0)[::2])
    maker(_name, f"{_name}_with_an_axis_more", lambda a: a[..., None])
    maker(_name, f"{_name}_empty", lambda a: a[:0])
for _name in ("masks", "values", "places"):
    maker(_name, f"{_name}_flat", lambda a: a.reshape(-1))
    maker(_name, f"{_name}_parts_last", lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1)))
maker("values", "values_half_a_chunk_longer", lambda a: a.reshape(-1, 4, 8, 32, 2))

poke("fronts", "fronts_start_late", 0, lambda v: 1)
poke("fronts", "fronts_start_negative", 0, lambda v: -1)
poke("fronts", "fronts_fall", 5, lambda v: 0)
poke("fronts", "fronts_rise_by_more_than_a_tile_holds", 1, lambda v: 33)
poke("fronts", "fronts_huge", 7, lambda v: 2**31 - 1)
poke("fronts", "fronts_least", 7, lambda v: -(2**31))
poke("fronts", "fronts_late", 9, lambda v: v + 1)
poke("fronts", "fronts_early", 9, lambda v: v - 1)
poke("places", "lag_not_zero_at_the_start", 6, lambda v: v | 1 << 10)
poke("places", "lag_one_more", 300, lambda v: v + (1 << 10))
poke("places", "lag_one_less", 326, lambda v: v - (1 << 10) if v >> 10 else v + (1 << 10))
poke("places", "lag_of_63_rows", 400, lambda v: v | 63 << 10)
poke("places", "bit_above_the_lag", 500, lambda v: v | 1 << 15)
poke("places", "last_lag", 3 * 256 - 1, lambda v: v ^ 1 << 10)
poke("places", "giver_at_the_start", 8, lambda v: v ^ 2)
poke("places", "another_giver", 700, lambda v: v ^ 1)
poke("places", "last_giver", 3 * 256 - 1, lambda v: v ^ 16)


@mutation("places")
def a_lane_twice(p: Parts) -> int:
    """The second of two streams of a half that have the same column."""
    two = p["places"][1, 2, [5, 9]]
    p["places"][1, 2, 9] = two[1] ^ (two[0] ^ two[1]) & 31 << 5
    return (4 + 2) * 64 + 9


@mutation("places")
def streams_trade_where_a_run_begins(p: Parts) -> int:
    p["places"][0, 1, [4, 8]] = p["places"][0, 1, [8, 4]]
    return 64 + 4


@mutation("places")
def two_streams_in_the_columns_of_each_other(p: Parts) -> int:
    """They continue where others ended, at other rows."""
    places = Places.unpack(p["places"][1, 0, ::2])
    first, second = next((i, j) for i in range(32) for j in range(i) if places.lags[i] != places.lags[j])
    places.givers[[first, second]] = places.givers[[second, first]]
    places.lanes[[first, second]] = places.lanes[[second, first]]
    p["places"][1, 0, ::2] = places.pack()
    return 256 + 2 * second


@mutation("values")
def last_front_at_the_end_of_the_values(p: Parts) -> None:
    """No row is left for a stream at the front to read ahead."""
    p["fronts"][-1] = 16 * len(p["values"])


@mutation("fronts")
def bit_too_many(p: Parts) -> int:
    """The stream continues one value late, so its last values are read beyond the front."""
    front = p["masks"].reshape(-1)
    counts = bitmap_check.flag_counts(bitmap_check.unpack_masks(p["masks"]))
    restarts = bitmap_check.runs_of((2, 10)).first_tiles()
    at = bitmap_check.Position.at_front(0)
    starts, _ = bitmap_check.stream_starts(counts, at, p["fronts"], p["places"], 0, restarts)
    tile, part, stream = map(int, np.argwhere(starts + counts == p["fronts"][1:, None, None])[-1])
    place = mask_index(tile, part, stream // 2, 0)
    bits = 0x55555555 if stream % 2 == 0 else 0xAAAAAAAA
    for word in (place, place + 1):
        free = ~int(front[word]) & bits
        if free:
            front[word] |= np.uint32(free & -free)
            return tile + 1
    raise AssertionError


@mutation("fronts")
def bits_of_a_stream_taken_away(p: Parts) -> int:
    """It falls behind by more than a kernel keeps."""
    for tile in range(3):
        p["masks"][tile, 2, 5] &= np.uint32(0xAAAAAAAA)
    return 2


@mutation("fronts")
def all_masks_full(p: Parts) -> int:
    p["masks"][:] = 0xFFFFFFFF
    return 1


@mutation("fronts")
def all_masks_empty(p: Parts) -> int:
    p["masks"][:] = 0
    return 1


@mutation("places")
def places_of_another_matrix(p: Parts) -> None:
    places = Places.unpack(p["places"])
    p["places"][:] = places._replace(lags=np.roll(places.lags, 2, axis=2)).pack()


@mutation("values")
def negative_zero(p: Parts) -> int:
    at = int(np.flatnonzero(p["values"] == 0)[0])
    p["values"].reshape(-1)[at] = 0x8000
    return at


@mutation("values")
def value_behind_the_last_front(p: Parts) -> None:
    p["values"][-1, 3, 15, 31, 1] = 0x3C00


@mutation("nnz")
def nnz_one_too_many(p: Parts) -> None:
    p["nnz"] += 1


@mutation("nnz")
def value_lost(p: Parts) -> None:
    p["values"][0, 0, 0, 0, 0] = 0


def tile_with_one_value(row: int, column: int) -> Bitmap:
    """A 70 x 40 matrix whose tile has one element, outside of it when the place is."""
    a = np.zeros((128, 64), np.float16)
    a[row, column] = 1
    return dataclasses.replace(Bitmap.from_dense(a), shape=(70, 40))


@pytest.mark.parametrize(
    ("row", "column", "index"),
    [(70, 0, mask_index(0, 0, 24, 0)), (127, 39, mask_index(0, 3, 31, 1)), (0, 40, mask_index(0, 0, 0, 1)),
     (69, 63, mask_index(0, 0, 23, 1))],
)  # fmt: skip
def test_values_outside_the_matrix_are_found(row: int, column: int, index: int) -> None:
    with pytest.raises(
        FormatError, match=rf"masks\[{index}\]: expected values inside 70 x 40.*row {row}, column {column}"
    ):
        tile_with_one_value(row, column).validate()


def test_values_just_inside_the_matrix_pass() -> None:
    for row, column in ((69, 39), (0, 39), (69, 0)):
        tile_with_one_value(row, column).validate()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str) -> None:
    w = weight()
    parts: Parts = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    for buffer in w.BUFFERS:
        parts[buffer] = parts[buffer].copy()
    field, change = MUTATIONS[name]
    index = change(parts)
    with pytest.raises(FormatError) as error:
        Bitmap(**parts).validate(path="some/file")
    assert error.value.field == field
    if index is not None:
        assert error.value.path == "some/file"
        assert error.value.index == index
        assert f"some/file: {field}[{index}]" in str(error.value)


def test_padding_may_lie_anywhere() -> None:
    """Zeros that let a stream catch up may be at any places, including outside the matrix."""
    a = np.zeros((100, 64 * 9), np.float16)
    a[0, np.arange(64 * 9) // 8 % 2 == 0] = 1
    w = Bitmap.from_dense(a)
    assert w.fronts[-1] == 64
    masks = w.masks.copy()
    part, lane = 2, 17  # rows 36, 44, 100, 108: all its values are padding
    for tile in np.flatnonzero(masks[:, part, lane].any(axis=1)):
        masks[tile, part, lane] = masks[tile, part, lane][::-1]
    again = w.with_arrays({"masks": masks})
    assert (masks != w.masks).any()
    again.validate()
    np.testing.assert_array_equal(again.to_dense(), a)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bits_never_pass_as_another_shape(data: st.DataObject) -> None:
    """A flipped bit gives FormatError or a weight that decodes; nothing else is ever raised."""
    w = FLIPPED
    arrays = {name: array.copy() for name, array in w.arrays().items()}
    flat = arrays[data.draw(st.sampled_from(w.BUFFERS))].reshape(-1)
    at = data.draw(st.integers(0, flat.size - 1))
    flat[at : at + 1].view(f"u{flat.itemsize}")[0] ^= 1 << data.draw(st.integers(0, 8 * flat.itemsize - 1))
    try:
        changed = w.with_arrays(arrays)
        changed.validate()
    except FormatError:
        return
    assert np.count_nonzero(changed.to_dense().view(np.uint16)) == w.nnz


FLIPPED = weight()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kinds=st.sets(st.sampled_from(Bitmap.BUFFERS), min_size=1))
def test_random_buffers_are_refused_and_nothing_else(seed: int, kinds: set[str]) -> None:
    """Whatever a file holds, what would lead a kernel astray is a FormatError."""
    rng = np.random.default_rng(seed)
    w = FLIPPED
    arrays = {
        name: rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
        if name in kinds
        else array
        for name, array in w.arrays().items()
    }
    with pytest.raises(FormatError):
        w.with_arrays(arrays).validate()


def test_many_tiles_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaches in a later part carry the index of the whole buffer."""
    monkeypatch.setattr(bitmap_check, "_CHUNK_TILES", 3)
    w = weight()
    w.validate()
    places = w.places.copy()
    places[2, 1, 5] ^= 1 << 10
    with pytest.raises(FormatError, match=rf"places\[{2 * 256 + 64 + 5}\]"):
        w.with_arrays({"places": places}).validate()
    masks = w.masks.copy()
    masks[17:, 3, 30] = 0
    with pytest.raises(FormatError, match=r"fronts\[\d+\]: expected no stream more than 31 rows behind") as error:
        w.with_arrays({"masks": masks}).validate()
    assert 18 <= error.value.index <= 20
