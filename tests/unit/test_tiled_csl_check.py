# SPDX-License-Identifier: Apache-2.0
"""Every breach of the Tiled-CSL format is found and named."""

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
from flashllm.formats.tiled_csl import TiledCSL

Parts = dict[str, Any]


def weight() -> TiledCSL:
    """200 x 100, so that tiles extend beyond both edges; every tile has padding and some elements."""
    a = cases.matrix("uniform", 200, 100, 0.1, 21, "fp16")
    w = TiledCSL.from_dense(a, order="row")
    counts = np.diff(w.tile_offsets)[:-1]
    assert counts.min() > 3
    return w


def word(row: int, column: int, value: int = 0x3C00) -> int:
    return (row * 64 + (column ^ ((row & 7) * 8))) << 16 | value


def zeros_of_first_tile(p: Parts) -> list[int]:
    taken = set((p["words"][: 4 * p["tile_offsets"][1]] >> 16).tolist())
    return [place for place in range(8192) if place not in taken]


MUTATIONS: dict[str, tuple[str, Callable[[Parts], Any]]] = {}


def mutation(field: str) -> Callable[[Callable[[Parts], Any]], Callable[[Parts], Any]]:
    def add(change: Callable[[Parts], Any]) -> Callable[[Parts], Any]:
        MUTATIONS[change.__name__] = (field, change)
        return change

    return add


def setter(field: str, name: str, **values: Any) -> None:
    def change(p: Parts) -> None:
        p.update(values)

    change.__name__ = name
    MUTATIONS[name] = (field, change)


setter("shape", "shape_of_one_number", shape=(200,))
setter("shape", "shape_with_zero", shape=(200, 0))
setter("shape", "shape_negative", shape=(-200, 100))
setter("shape", "shape_too_large", shape=(2**31, 100))
setter("shape", "shape_of_floats", shape=(200.0, 100.0))
setter("shape", "shape_of_text", shape="ab")
setter("dtype", "dtype_unknown", dtype="fp8")
setter("dtype", "dtype_list", dtype=["fp16"])
setter("order", "order_unknown", order="random")
setter("nnz", "nnz_negative", nnz=-1)
setter("nnz", "nnz_larger_than_the_matrix", nnz=20_001)
setter("nnz", "nnz_bool", nnz=True)
setter("max_tile_words", "max_tile_words_odd", max_tile_words=6)
setter("max_tile_words", "max_tile_words_over_a_tile", max_tile_words=8196)
setter("max_tile_words", "max_tile_words_zero", max_tile_words=0)


@mutation("nnz")
def nnz_one_too_many(p: Parts) -> None:
    p["nnz"] += 1


@mutation("max_tile_words")
def max_tile_words_too_large(p: Parts) -> None:
    p["max_tile_words"] += 4


@mutation("tile_offsets")
def shape_of_another_tile_grid(p: Parts) -> None:
    p["shape"] = (300, 100)


@mutation("tile_offsets")
def offsets_one_short(p: Parts) -> None:
    p["tile_offsets"] = p["tile_offsets"][:-1]


@mutation("tile_offsets")
def offsets_of_64_bits(p: Parts) -> None:
    p["tile_offsets"] = p["tile_offsets"].astype(np.int64)


@mutation("tile_offsets")
def offsets_not_contiguous(p: Parts) -> None:
    p["tile_offsets"] = np.repeat(p["tile_offsets"], 2)[::2]


@mutation("tile_offsets")
def offsets_start_late(p: Parts) -> None:
    p["tile_offsets"][0] = 1


@mutation("tile_offsets")
def offsets_start_negative(p: Parts) -> None:
    p["tile_offsets"][0] = -1


@mutation("tile_offsets")
def offsets_fall(p: Parts) -> None:
    p["tile_offsets"][2] = p["tile_offsets"][1] - 1


@mutation("tile_offsets")
def offsets_past_the_words(p: Parts) -> None:
    p["tile_offsets"][-2:] += 1


@mutation("tile_offsets")
def offsets_before_the_end(p: Parts) -> None:
    p["tile_offsets"][-2:] -= 1


@mutation("tile_offsets")
def offsets_total_not_repeated(p: Parts) -> None:
    p["tile_offsets"][-1] += 1


@mutation("tile_offsets")
def offsets_huge(p: Parts) -> None:
    p["tile_offsets"][1] = 2**31 - 1


@mutation("tile_offsets")
def tile_with_more_words_than_places(p: Parts) -> None:
    p["words"] = np.concatenate([np.zeros(8192, np.uint32), p["words"]])
    p["tile_offsets"][1:] += 2048


@mutation("words")
def words_of_64_bits(p: Parts) -> None:
    p["words"] = p["words"].astype(np.uint64)


@mutation("words")
def words_signed(p: Parts) -> None:
    p["words"] = p["words"].view(np.int32)


@mutation("words")
def words_two_dimensional(p: Parts) -> None:
    p["words"] = p["words"].reshape(-1, 4)


@mutation("words")
def words_one_short(p: Parts) -> None:
    p["words"] = p["words"][:-1]


@mutation("words")
def location_past_the_tile(p: Parts) -> int:
    p["words"][5] |= 0x2000 << 16
    return 5


@mutation("words")
def location_with_the_top_bit(p: Parts) -> int:
    p["words"][0] |= 0x8000 << 16
    return 0


@mutation("words")
def location_used_twice(p: Parts) -> int:
    p["words"][3] = (p["words"][2] & 0xFFFF0000) | 0x3C00
    return 2


@mutation("words")
def padding_on_a_value(p: Parts) -> int:
    pad = int(np.flatnonzero((p["words"] & 0x7FFF) == 0)[0])
    p["words"][pad] = p["words"][0] & 0xFFFF0000
    return pad


@mutation("words")
def padding_negative_zero(p: Parts) -> int:
    pad = int(np.flatnonzero((p["words"] & 0x7FFF) == 0)[0])
    p["words"][pad] |= 0x8000
    return pad


@mutation("words")
def four_padding_words(p: Parts) -> int:
    free = zeros_of_first_tile(p)[:4]
    p["words"] = np.concatenate([np.array(free, np.uint32) << 16, p["words"]]).astype(np.uint32)
    p["tile_offsets"][1:] += 1
    p["max_tile_words"] = int(4 * np.diff(p["tile_offsets"]).max())
    return 3


@mutation("words")
def value_below_the_last_row(p: Parts) -> int:
    at = int(p["tile_offsets"][2]) * 4
    p["words"][at] = word(72, 0)
    return at


@mutation("words")
def value_right_of_the_last_column(p: Parts) -> int:
    at = int(p["tile_offsets"][1]) * 4
    p["words"][at] = word(0, 36)
    return at


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str) -> None:
    w = weight()
    parts: Parts = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    parts["words"], parts["tile_offsets"] = parts["words"].copy(), parts["tile_offsets"].copy()
    field, change = MUTATIONS[name]
    index = change(parts)
    with pytest.raises(FormatError) as error:
        TiledCSL(**parts).validate(path="some/file")
    assert error.value.field == field
    if index is not None:
        assert error.value.index == index
        assert error.value.path == "some/file"
        assert f"some/file: {field}[{index}]" in str(error.value)


def test_padding_may_lie_outside_the_matrix_and_repeat_a_place() -> None:
    # The published encoder reuses one zero of the tile for all padding words.
    w = TiledCSL.from_dense(np.ones((1, 1), np.float16))
    words = w.words.copy()
    words[(words & 0x7FFF) == 0] = 8191 << 16
    again = dataclasses.replace(w, words=words)
    again.validate()
    assert again.to_dense().tolist() == [[1.0]]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits_never_pass_as_another_shape(data: st.DataObject) -> None:
    """A flipped bit gives FormatError or a weight that decodes; nothing else is ever raised."""
    w = weight()
    words, offsets = w.words.copy(), w.tile_offsets.copy()
    array = data.draw(st.sampled_from([words, offsets]))
    at = data.draw(st.integers(0, array.size - 1))
    array[at] ^= array.dtype.type(1 << data.draw(st.integers(0, 30)))
    try:
        changed = dataclasses.replace(w, words=words, tile_offsets=offsets)
        changed.validate()
    except FormatError:
        return
    assert np.count_nonzero(changed.to_dense().view(np.uint16)) == w.nnz


def test_many_tiles_are_checked_in_parts() -> None:
    a = cases.matrix("uniform", 128, 64 * 600, 0.01, 2, "bf16")
    w = TiledCSL.from_dense(a)
    w.validate()
    words = w.words.copy()
    stored = np.flatnonzero(words & 0x7FFF)
    words[stored[-1]] = words[stored[-2]]
    with pytest.raises(FormatError, match="used once in its tile"):
        dataclasses.replace(w, words=words).validate()
