# SPDX-License-Identifier: Apache-2.0
"""Pairs of slot24 whose slots have at most two values in a group of four."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import slot24_reference as reference
from test_slot24_check import weight

import weight_cases as cases
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats import slot24_check, slot24_groups
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_pairs import tried

both_parts = pytest.mark.parametrize("part_rows", [32, 64])


@dataclasses.dataclass
class Attempts:
    """For each attempt of the encoder: whether it kept equal residues apart, how many problems it solved and left."""

    careful: list[bool]
    found: list[int]
    left: list[int]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """The attempts of all encodings in a test."""
    seen = Attempts([], [], [])
    arrange = slot24_groups._arrange

    def spy(lefts: Any, *rest: Any, careful: bool) -> Any:
        found, order = arrange(lefts, *rest, careful=careful)
        seen.careful.append(careful)
        seen.found.append(int(found.sum()))
        seen.left.append(int((~found).sum()))
        return found, order

    monkeypatch.setattr(slot24_groups, "_arrange", spy)
    return seen


@both_parts
@pytest.mark.parametrize("pattern", ["uniform", "per-row", "block", "empty-tiles", "even-columns"])
def test_bytes_equal_the_written_format(pattern: str, part_rows: int) -> None:
    matrices = ((130, 257), 0.1, 256), ((40, 450), 0.12, 232), ((9, 9), 0.3, 128)
    for seed, (shape, density, window) in enumerate(matrices):
        bits = cases.bits(pattern, *shape, density, seed)
        options = {"window": window, "part_rows": part_rows, "group_values": 2}
        want = reference.encode(bits, **options)
        if want is None:
            with pytest.raises(ArgumentError, match="window"):
                Slot24.from_dense(bits.view(np.float16), **options)
            continue
        w = Slot24.from_dense(bits.view(np.float16), **options)
        w.validate()
        reference.assert_as_written(w, want)
        np.testing.assert_array_equal(reference.decode(want, shape), cases.pruned(bits.view(np.float16)))


# Problems for which the first attempts find no neighbours: some that one of the six careful ones finds, some that only
# a careless one finds, and some that none does.
@pytest.mark.parametrize(("part_rows", "window", "density"), [(64, 256, 0.12), (32, 256, 0.14), (32, 232, 0.16)])
def test_bytes_equal_the_written_format_after_several_attempts(
    part_rows: int, window: int, density: float, attempts: Attempts
) -> None:
    bits = cases.bits("uniform", 128, window + 5, density, 3)
    options = {"window": window, "part_rows": part_rows, "group_values": 2}
    want = reference.encode(bits, **options)
    assert want is not None
    reference.assert_as_written(Slot24.from_dense(bits.view(np.float16), **options), want)
    assert len(attempts.careful) > 3
    assert attempts.left[-1] == 0
    assert attempts.careful == [number < 6 for number in range(len(attempts.careful))]
    if window == 232:
        assert not attempts.careful[-1]


def test_no_attempt_finds_neighbours(attempts: Attempts) -> None:
    bits = cases.bits("uniform", 128, 237, 0.2, 3)
    assert reference.encode(bits, 232, 32, 2) is None
    with pytest.raises(ArgumentError, match="window"):
        Slot24.from_dense(bits.view(np.float16), window=232, part_rows=32, group_values=2)
    assert attempts.careful == [True] * 6 + [False] * 2
    with pytest.raises(ArgumentError, match=r"group_values: expected None or 4: .*, got 2$"):
        Slot24.from_dense(np.ones((16, 200), np.float16), group_values=2)


@both_parts
def test_the_number_of_values_in_a_group_is_what_the_words_say(part_rows: int) -> None:
    """Bits of the two words meet where two slots have more than two values, in two rows eight apart."""
    rng = np.random.default_rng(part_rows)
    dense = rng.random((200, part_rows)) < 0.2
    dtype = np.uint32 if part_rows == 32 else np.uint64
    words = np.array([sum(1 << int(row) for row in np.flatnonzero(rows)) for rows in dense], dtype)
    first, second = slot24_groups.group_words(words)
    counts = dense.reshape(200, -1, 2, 8).sum(axis=2)
    too_many = (counts[:, None] + counts > 2).any(axis=(2, 3))
    np.testing.assert_array_equal((first[:, None] & second) != 0, too_many)
    assert 0.1 < too_many.mean() < 0.99


def test_what_is_tried() -> None:
    """Groups of two first, only in large windows unless they are requested, and where slots are not too full."""
    for window in (None, 128, 232, 248, 256):
        for part_rows in (None, 32, 64):
            for values in (None, 2, 4):
                for nnz, elements in ((0, 1000), (135, 1000), (136, 1000), (139, 1000), (140, 1000), (1000, 1000)):
                    bits = np.zeros((1, elements), np.uint16)
                    bits[0, :nnz] = 1
                    found = tried(window, part_rows, values, nnz / elements)
                    want = reference.tries(bits, window, part_rows, values)
                    assert [(how.group_values, how.parts.rows, how.window) for how in found] == want


@pytest.mark.parametrize(("density", "how"), [(0.05, (256, 64, 2)), (0.1, (256, 64, 2)), (0.2, (256, 32, 4))])
def test_random_matrices_have_two_values_in_a_group_where_they_can(density: float, how: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    w = Slot24.from_dense((rng.random((512, 2048)) < density).astype(np.float16))
    assert (w.window, w.part_rows, w.group_values) == how


@pytest.mark.parametrize("part_rows", [32, 64])
@pytest.mark.parametrize("full", [3, 4])
def test_groups_that_are_too_full_are_found(full: int, part_rows: int) -> None:
    """One more bit in a group of two, whatever its value: the index is the word's."""
    w = weight(part_rows, 2)
    w.validate()
    for index in (0, 777, w.masks.size - 1):
        masks = w.masks.copy()
        flags = [0x01010101 << group for group in range(8)]
        groups = [int(masks.reshape(-1)[index]) & flag for flag in flags]
        group = next(n for n in range(8) if groups[n].bit_count() > 0) if any(groups) else 7
        whole = flags[group] if full == 4 else flags[group] & ~(1 << group)
        masks.reshape(-1)[index] |= np.uint32(whole)
        found = int(np.flatnonzero(masks.reshape(-1) != w.masks.reshape(-1))[0])
        changed = w.with_arrays({"masks": masks})
        with pytest.raises(FormatError):
            changed.validate()
        message = rf"masks\[{found}\]: expected at most 2 bits for a group of 4 slots, got 0x"
        with pytest.raises(FormatError, match=message):
            slot24_check._check_groups(masks, 2, None)
        slot24_check._check_groups(masks, 4, None)


def test_a_group_of_three_is_found_where_all_else_is_right() -> None:
    """A weight with groups of up to four values that claims to have at most two."""
    w = weight()
    dataclasses.replace(w, group_values=4).validate()
    words = w.masks.reshape(-1)
    counts = sum((words >> np.uint32(8 * b) & 0xFF)[:, None] >> np.arange(8) & 1 for b in range(4))
    at = int(np.argmax((counts > 2).any(axis=1)))
    with pytest.raises(FormatError, match="expected at most 2 bits for a group of 4 slots") as error:
        dataclasses.replace(w, group_values=2).validate(path="some/file")
    assert (error.value.path, error.value.field, error.value.index) == ("some/file", "masks", at)
