# SPDX-License-Identifier: Apache-2.0
"""Every breach of the slot24 format is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slot24_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

import weight_cases as cases
from flashllm.errors import FormatError
from flashllm.formats.bitmap_encode import Places
from flashllm.formats.slot24 import Slot24

Parts = dict[str, Any]
WINDOW = 232


def weight(part_rows: int = 32, group_values: int = 4) -> Slot24:
    """200 x 600 in windows of 232: 2 x 6 tiles that reach over both edges, three copies of each dummy."""
    density = {(32, 4): 0.27, (64, 4): 0.17, (32, 2): 0.14, (64, 2): 0.11}[part_rows, group_values]
    a = cases.matrix("uniform", 200, 600, density, 21, "fp16")
    w = Slot24.from_dense(a, window=WINDOW, part_rows=part_rows, group_values=group_values)
    assert w.tiles == (2, 6)
    assert Places.unpack(w.places).lags[1].max() > 5
    return w


def byte_of(tile: int, part: int, pair: int, side: int) -> int:
    """Index in ``columns`` of a side of pair ``pair`` (0..63) of a tile."""
    return ((tile * 4 + part) * 32 + 2 * (pair % 16) + side) * 4 + pair // 16


def word_and_bit(tile: int, row: int, pair: int) -> tuple[int, int]:
    """Index in ``picks`` of the word of a slot, and its bit."""
    return reference.place_of_pick(32, tile, row, pair // 16, pair % 16)


def slots_of(w: Slot24) -> np.ndarray:
    """Patterns of the slots [256, 384]."""
    slots: np.ndarray = w.slots.to_dense().view(np.uint16)
    return slots


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


setter("shape", "shape_of_one_number", shape=(200,))
setter("shape", "shape_with_zero", shape=(200, 0))
setter("shape", "shape_too_large", shape=(2**31, 600))
setter("shape", "shape_of_text", shape="ab")
setter("dtype", "dtype_unknown", dtype="fp8")
setter("nnz", "nnz_negative", nnz=-1)
setter("nnz", "nnz_larger_than_the_matrix", nnz=120_001)
setter("nnz", "nnz_larger_than_the_slots", nnz=200 * 384 + 1)
setter("nnz", "nnz_bool", nnz=True)
setter("nnz", "nnz_zero", nnz=0)
setter("nnz", "nnz_one_too_many", nnz=weight().nnz + 1)
for _number, _window in enumerate((0, -8, 120, 264, 244, 240.0, True, "240", None, [240], 2**70)):
    setter("window", f"window_{_number}", window=_window)
for _number, _rows in enumerate((0, 16, 48, 128, 32.0, True, "32", None, [32])):
    setter("part_rows", f"part_rows_{_number}", part_rows=_rows)
for _number, _values in enumerate((0, 1, 3, 5, 2.0, True, "4", None, [4])):
    setter("group_values", f"group_values_{_number}", group_values=_values)
setter("masks", "group_values_that_are_too_few", group_values=2)
setter("columns", "part_rows_of_other_columns", part_rows=64)
setter("masks", "window_of_other_tiles", window=128)
setter("columns", "window_of_the_same_tiles", window=240)
setter("masks", "shape_of_another_tile_grid", shape=(300, 600))
setter("masks", "shape_of_fewer_windows", shape=(200, 464))
setter("masks", "shape_of_fewer_rows", shape=(199, 600))
setter("columns", "shape_of_fewer_columns", shape=(200, 599))
setter("masks", "shape_huge", shape=(2**31 - 1, 2**31 - 1))

for _name, _wide, _signed in (
    ("masks", np.uint64, np.int32),
    ("values", np.uint32, np.int16),
    ("fronts", np.int64, np.uint32),
    ("places", np.uint32, np.int16),
    ("picks", np.uint64, np.int32),
    ("columns", np.uint16, np.int8),
):
    maker(_name, f"{_name}_wider", lambda a, wide=_wide: a.astype(wide))
    maker(_name, f"{_name}_of_the_other_sign", lambda a, signed=_signed: a.view(signed))
    maker(_name, f"{_name}_one_short", lambda a: a[:-1].copy())
    maker(_name, f"{_name}_one_more", lambda a: np.concatenate([a, a[-1:]]))
    maker(_name, f"{_name}_not_contiguous", lambda a: np.repeat(a, 2, axis=0)[::2])
    maker(_name, f"{_name}_with_an_axis_more", lambda a: a[..., None])
    maker(_name, f"{_name}_empty", lambda a: a[:0])
for _name in ("picks", "columns"):
    maker(_name, f"{_name}_flat", lambda a: a.reshape(-1))
    maker(_name, f"{_name}_parts_last", lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1)))
    maker(_name, f"{_name}_all_ones", lambda a: ~np.zeros_like(a))


def column(name: str, tile: int, part: int, pair: int, side: int, make: Callable[[int], int]) -> None:
    """One entry of the columns becomes another, and is named."""

    def change(p: Parts) -> int:
        at = byte_of(tile, part, pair, side)
        flat = p["columns"].reshape(-1)
        flat[at] = make(int(flat[at]))
        return at

    MUTATIONS[name] = ("columns", change)


MUTATIONS["columns_all_zero"] = ("columns", lambda p: p["columns"].fill(0))
MUTATIONS["picks_all_zero"] = ("columns", lambda p: p["picks"].fill(0))
column("column_beyond_the_dummies", 0, 0, 0, 0, lambda c: 240)
column("column_255", 11, 3, 63, 1, lambda c: 255)
column("right_on_the_left", 3, 2, 17, 0, lambda c: c ^ 4)
column("left_on_the_right", 3, 2, 17, 1, lambda c: c ^ 4)
column("left_dummy_on_the_right", 4, 1, 5, 1, lambda c: WINDOW)


@mutation("columns")
def column_twice_in_a_window(p: Parts) -> int:
    """The second of the two is named, in the other tile of the window."""
    flat = p["columns"].reshape(-1)
    flat[byte_of(9, 1, 33, 0)] = flat[byte_of(8, 1, 20, 0)]
    return byte_of(9, 1, 33, 0)


@mutation("columns")
def dummy_four_times(p: Parts) -> int:
    """The last of the four is named."""
    flat = p["columns"].reshape(-1)
    at = [byte_of(tile, 3, pair, 1) for tile in (6, 7) for pair in range(64)]
    one, other = (next(index for index in at if flat[index] == WINDOW + dummy) for dummy in (5, 6))
    flat[one] = flat[other]
    return [index for index in at if flat[index] == flat[other]][-1]


@mutation("columns")
def lefts_and_rights_exchanged(p: Parts) -> int:
    p["columns"] = np.ascontiguousarray(p["columns"].reshape(-1, 4, 16, 2, 4)[:, :, :, ::-1]).reshape(-1, 4, 32, 4)
    return 0


@mutation("columns")
def halves_of_two_windows_exchanged(p: Parts) -> None:
    p["columns"][[1, 2]] = p["columns"][[2, 1]]


@mutation("columns")
def value_in_a_dummy(p: Parts) -> int:
    """A dummy and a real column are swapped in one part: the values of one lie in the other."""
    flat = p["columns"].reshape(-1)
    at = [byte_of(tile, 0, pair, 0) for tile in (0, 1) for pair in range(64)]
    real = at[0]
    dummy = next(index for index in at if flat[index] == WINDOW + 2)
    flat[[real, dummy]] = flat[[dummy, real]]
    return real


@mutation("columns")
def value_beyond_the_last_column(p: Parts) -> int:
    """Window 2 has 136 columns in the matrix; one of them is swapped with a column after them."""
    flat = p["columns"].reshape(-1)
    at = [byte_of(tile, 2, pair, 1) for tile in (4, 5) for pair in range(64)]
    real = next(index for index in at if flat[index] < 136)
    outside = next(index for index in at if 136 <= flat[index] < WINDOW)
    flat[[real, outside]] = flat[[outside, real]]
    return real


def flip_pick(name: str, stored: bool, tile: int, row: int, field: str) -> None:
    """The pick of the first slot that has a value (or none) in a row of a tile is flipped."""

    def change(p: Parts) -> int:
        w = weight()
        inside = slots_of(w)[tile // 6 * 128 + row, tile % 6 * 64 :][:64] != 0
        pair = int(np.flatnonzero(inside == stored)[0])
        word, bit = word_and_bit(tile, row, pair)
        p["picks"].reshape(-1)[word] ^= np.uint32(1 << bit)
        return word

    MUTATIONS[name] = (field, change)


flip_pick("pick_of_an_empty_slot", False, 3, 77, "picks")
flip_pick("pick_of_the_first_row", False, 0, 0, "picks")
flip_pick("pick_of_the_last_row", False, 5, 127, "picks")
flip_pick("pick_in_the_last_row_of_the_matrix", False, 11, 71, "picks")
flip_pick("pick_below_the_matrix", False, 10, 72, "picks")
flip_pick("pick_at_the_bottom_of_the_tiles", False, 11, 127, "picks")


@mutation("columns")
def pick_of_a_dummy(p: Parts) -> int:
    """The value of a left whose right is a dummy goes to the dummy."""
    flat = p["columns"].reshape(-1)
    slots = slots_of(weight())
    row, slot = next(
        (row, slot)
        for row, slot in np.argwhere(slots[:128]).tolist()
        if flat[byte_of(slot // 64, row % 64 // 16, slot % 64, 1)] >= WINDOW
    )
    word, bit = word_and_bit(slot // 64, row, slot % 64)
    p["picks"].reshape(-1)[word] ^= np.uint32(1 << bit)
    return byte_of(slot // 64, row % 64 // 16, slot % 64, 1)


@mutation("fronts")
def all_masks_empty(p: Parts) -> int:
    p["masks"][:] = 0
    return 1


@mutation("places")
def lag_one_more(p: Parts) -> int:
    p["places"].reshape(-1)[300] += 1 << 10
    return 300


@mutation("values")
def negative_zero(p: Parts) -> int:
    at = int(np.flatnonzero(p["values"] == 0)[0])
    p["values"].reshape(-1)[at] = 0x8000
    return at


@mutation("nnz")
def value_lost(p: Parts) -> None:
    p["values"][0, 0, 0, 0, 0] = 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str) -> None:
    w = weight()
    parts: Parts = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    for buffer in w.BUFFERS:
        parts[buffer] = parts[buffer].copy()
    field, change = MUTATIONS[name]
    index = change(parts)
    with pytest.raises(FormatError) as error:
        Slot24(**parts).validate(path="some/file")
    assert error.value.field == field
    if index is not None:
        assert error.value.path == "some/file"
        assert error.value.index == index
        assert f"some/file: {field}[{index}]" in str(error.value)


@pytest.mark.parametrize("part_rows", [32, 64])
def test_places_are_named(part_rows: int) -> None:
    """The place of a column, of a pick and of a value past the last row, wherever they are."""
    w = weight(part_rows)
    slots = reference_slots(w)
    rng = np.random.default_rng(4)
    for _ in range(30):
        tile, band, pair, side = (int(rng.integers(n)) for n in (12, 128 // part_rows, 64, 2))
        at = reference.place_of_column(part_rows, tile, band, pair // 16, pair % 16, side)
        columns = w.columns.copy()
        columns.reshape(-1)[at] = 240
        refused(w.with_arrays({"columns": columns}), "columns", at)

        row, pair = int(rng.integers(128)), int(rng.integers(64))
        if slots[tile // 6 * 128 + row, tile % 6 * 64 + pair] == 0:
            at, bit = reference.place_of_pick(part_rows, tile, row, pair // 16, pair % 16)
            picks = w.picks.copy()
            picks.reshape(-1)[at] ^= np.uint32(1 << bit)
            refused(w.with_arrays({"picks": picks}), "picks", at)
    for rows in (199, 192, 130):
        with pytest.raises(FormatError, match=f"values only in rows of the matrix, below {rows}, got one at row") as e:
            dataclasses.replace(w, shape=(rows, 600)).validate()
        assert e.value.field == "masks"
        row, slot = np.argwhere(slots[rows:])[0].tolist()
        down, across = reference.stored_place(part_rows, rows + row - 128, slot % 64)
        lane = down % 8 * 4 + across % 8 // 2
        assert e.value.index == (((6 + slot // 64) * 4 + down // 16 % 4) * 32 + lane) * 2 + across // 32


def reference_slots(w: Slot24) -> np.ndarray:
    """Patterns of the slots [256, 384] in the order of the pairs."""
    stored, slots = slots_of(w), np.zeros((256, 384), np.uint16)
    for row, slot in np.ndindex(*slots.shape):
        down, across = reference.stored_place(w.part_rows, row % 128, slot % 64)
        slots[row, slot] = stored[row // 128 * 128 + down, slot // 64 * 64 + across]
    return slots


def refused(w: Slot24, field: str, index: int) -> None:
    with pytest.raises(FormatError) as error:
        w.validate()
    assert (error.value.field, error.value.index) == (field, index)


def test_messages() -> None:
    w = weight()
    columns = w.columns.copy()
    columns[0, 0, 6, 0] = 240
    message = r"columns\[24\]: expected every left of a window of 232 once, and 3 copies of its dummies, got 240$"
    with pytest.raises(FormatError, match=message):
        w.with_arrays({"columns": columns}).validate()
    columns[0, 0, 6, 0] = columns[0, 0, 4, 0]
    with pytest.raises(FormatError, match=rf"columns\[24\]: .*, got {columns[0, 0, 4, 0]} once more$"):
        w.with_arrays({"columns": columns}).validate()
    picks = ~np.zeros_like(w.picks)
    with pytest.raises(
        FormatError, match=r"picks\[\d+\]: expected bits only where a value is stored, got one at row 0"
    ):
        w.with_arrays({"picks": picks}).validate()


@pytest.mark.parametrize("part_rows", [32, 64])
def test_any_pairing_in_any_order_is_valid(part_rows: int) -> None:
    """A weight with other pairs than the encoder's, written by hand: each column beside a dummy or an empty one."""
    bits = cases.bits("uniform", 150, 300, 0.3, 8)
    rng = np.random.default_rng(3)
    lefts, rights = reference.lists_of(128)
    pairs = {}
    for strip, number, band in np.ndindex(2, 3, 128 // part_rows):
        alone = [(lefts[n], rights[127 - n]) for n in range(128)]  # real ones with dummies, which end both lists
        pairs[strip, number, band] = [alone[n] for n in rng.permutation(128)]
    written = reference.write(bits, 128, part_rows, pairs)
    w = Slot24(
        shape=(150, 300),
        dtype="fp16",
        nnz=written.bitmap.nnz,
        window=128,
        part_rows=part_rows,
        group_values=4,
        masks=np.array(written.bitmap.masks, np.uint32).reshape(-1, 4, 32, 2),
        values=np.array(written.bitmap.values, np.uint16).reshape(-1, 4, 16, 32, 2),
        fronts=np.array(written.bitmap.fronts, np.int32),
        places=np.array(written.bitmap.places, np.uint16).reshape(-1, 4, 64),
        picks=np.array(written.picks, np.uint32).reshape(-1, 4, 32, 2),
        columns=np.array(written.columns, np.uint8).reshape(-1, 4, 32, 128 // part_rows),
    )
    w.validate()
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(bits.view(np.float16)))
    assert (w.columns != Slot24.from_dense(w.to_dense(), window=128, part_rows=part_rows, group_values=4).columns).any()


FLIPPED = {(part_rows, values): weight(part_rows, values) for part_rows in (32, 64) for values in (2, 4)}
FLIPPED_CHOICE = st.sampled_from(sorted(FLIPPED))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bits_never_pass_as_another_shape(data: st.DataObject) -> None:
    """A flipped bit gives FormatError or a weight that decodes; nothing else is ever raised."""
    w = FLIPPED[data.draw(FLIPPED_CHOICE)]
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


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sets(st.sampled_from(Slot24.BUFFERS), min_size=1),
    which=FLIPPED_CHOICE,
)
def test_random_buffers_are_refused_and_nothing_else(seed: int, kinds: set[str], which: tuple[int, int]) -> None:
    """Whatever a file holds, what would lead a kernel astray is a FormatError."""
    rng = np.random.default_rng(seed)
    w = FLIPPED[which]
    arrays = {
        name: rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
        if name in kinds
        else array
        for name, array in w.arrays().items()
    }
    with pytest.raises(FormatError):
        w.with_arrays(arrays).validate()
