# SPDX-License-Identifier: Apache-2.0
"""Tiled-CSL on the host: encode, decode, layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiled_csl_reference as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weight_cases as cases
from flashllm.errors import ArgumentError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.formats.weight import SparseWeight

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "tiled_csl_v1_row.safetensors"

sizes = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 256]), st.integers(1, 300))
densities = st.one_of(st.sampled_from([0.0, 1e-4, 1.0]), st.floats(0, 1))
settings.register_profile("formats", deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(settings.get_profile("formats"), max_examples=250)
@given(
    rows=sizes,
    columns=sizes,
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    dtype=st.sampled_from(["fp16", "bf16"]),
    order=st.sampled_from(["bank", "row"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(rows: int, columns: int, density: float, pattern: str, dtype: str, order: str, seed: int) -> None:
    a = cases.matrix(pattern, rows, columns, density, seed, dtype)
    w = TiledCSL.from_dense(a, order=order)
    w.validate()
    want = cases.pruned(a)
    back = w.to_dense()
    assert back.dtype == a.dtype
    assert back.shape == a.shape
    np.testing.assert_array_equal(back.view(np.uint16), want)
    assert w.nnz == np.count_nonzero(want)
    assert w.dtype == dtype
    assert w.words.size == 4 * w.tile_offsets[-1]
    assert w.max_tile_words == 4 * np.diff(w.tile_offsets).max()


@settings(settings.get_profile("formats"), max_examples=60)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    order=st.sampled_from(["bank", "row"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_equal_the_written_format(
    rows: int, columns: int, density: float, pattern: str, order: str, seed: int
) -> None:
    a = cases.matrix(pattern, rows, columns, density, seed, "fp16")
    w = TiledCSL.from_dense(a, order=order)
    words, offsets = reference.encode(a.view(np.uint16), order)
    assert w.tile_offsets.tolist() == offsets
    assert w.words.tolist() == words


@pytest.mark.parametrize("order", ["bank", "row"])
def test_bytes_equal_the_written_format_over_many_tiles(order: str) -> None:
    # More tiles in a row than are encoded at once, and an odd K, so that rows start at odd addresses.
    a = cases.matrix("uniform", 3, 64 * 65 + 1, 0.3, 7, "bf16")
    words, offsets = reference.encode(a.view(np.uint16), order)
    w = TiledCSL.from_dense(a, order=order)
    assert w.tile_offsets.tolist() == offsets
    assert w.words.tolist() == words


def golden_matrix() -> np.ndarray:
    """fp16 [130, 70] from a fixed recurrence: half zeros, some -0.0, one NaN, both infinities."""
    state = 12345
    out = np.zeros(130 * 70, np.uint16)
    for i in range(out.size):
        state = (1103515245 * state + 12345) % 2**31
        out[i] = (state >> 8) & 0xFFFF if state >> 30 else (0x8000 if state % 1024 < 16 else 0)
    out[[0, 69, 9099]] = 0x7E00, 0x7C00, 0xFC00
    return out.reshape(130, 70).view(np.float16)


def test_golden_file() -> None:
    """The published word order, byte for byte. The file was made by tiled_csl_reference and never changes."""
    a = golden_matrix()
    w = TiledCSL.load(GOLDEN)
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))
    again = TiledCSL.from_dense(a, order="row")
    assert again.words.tobytes() == w.words.tobytes()
    assert again.tile_offsets.tobytes() == w.tile_offsets.tobytes()
    assert again.metadata() == w.metadata()


@pytest.mark.parametrize("pattern", cases.PATTERNS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.5, 0.95])
def test_bank_order(pattern: str, density: float) -> None:
    a = cases.matrix(pattern, 128, 64, density, 11, "fp16")
    bank = TiledCSL.from_dense(a, order="bank")
    row = TiledCSL.from_dense(a, order="row")
    stored = [np.sort(w.words[(w.words & 0x7FFF) != 0]) for w in (bank, row)]
    np.testing.assert_array_equal(*stored)
    assert bank.tile_offsets.tolist() == row.tile_offsets.tolist()
    if not bank.words.size:
        return
    per_bank = np.bincount([reference.bank_of(int(word) >> 16) for word in bank.words], minlength=32)
    rounds = reference.rounds(bank.words)
    full = 4 * (bank.words.size // 128)
    for number in range(min(full, per_bank.min())):
        assert rounds[number] == list(range(32)), f"clean round {number}"
    passes = reference.wavefronts(bank.words)
    assert passes <= reference.wavefronts(row.words)
    # No order can manage with fewer passes than there are words in one bank, or rounds.
    assert passes <= max(per_bank.max(), len(rounds)) + 12


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_pattern_is_stored_exactly(dtype: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(cases.NUMPY_DTYPE[dtype])
    w = TiledCSL.from_dense(a)
    w.validate()
    assert w.nnz == (1 << 16) - 2
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 5, 127, 128, 129, 4096, 4097, 8188, 8189, 8190, 8191, 8192])
@pytest.mark.parametrize("order", ["bank", "row"])
def test_counts_around_the_vector_and_group_sizes(keep: int, order: str) -> None:
    flat = np.zeros(8192, np.float16)
    flat[np.random.default_rng(keep).permutation(8192)[:keep]] = 1
    a = flat.reshape(128, 64)
    w = TiledCSL.from_dense(a, order=order)
    w.validate()
    assert w.words.size == w.max_tile_words == -(-keep // 4) * 4
    assert w.words.tolist() == reference.encode(a.view(np.uint16), order)[0]
    np.testing.assert_array_equal(w.to_dense(), a)


def test_padding_never_carries_a_negative_zero() -> None:
    a = np.full((128, 64), -0.0, np.float16)
    a[5, 5] = 1
    for order in ("bank", "row"):
        w = TiledCSL.from_dense(a, order=order)
        w.validate()
        assert sorted(w.words & 0xFFFF) == [0, 0, 0, 0x3C00]


def test_facts() -> None:
    a = np.zeros((200, 100), np.float16)
    a[::2] = 1
    w = TiledCSL.from_dense(a)
    assert isinstance(w, SparseWeight)
    assert (w.format, w.shape, w.dtype, w.tiles, w.order) == ("tiled-csl", (200, 100), "fp16", (2, 2), "bank")
    assert (w.nnz, w.density, w.sparsity) == (10_000, 0.5, 0.5)
    assert w.nbytes == 4 * w.words.size + 4 * 6
    assert w.bytes_per_element == w.nbytes / 20_000
    assert not w.is_device
    assert w.to_host() is w
    assert set(w.arrays()) == {"words", "tile_offsets"}
    assert "array" not in repr(w)


def test_layouts_of_the_source() -> None:
    base = cases.matrix("uniform", 260, 260, 0.3, 5, "fp16")
    for a in (base[1:200, 3:130], base.T, base[::-1, ::-2], np.asfortranarray(base)):
        w = TiledCSL.from_dense(a)
        np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(np.ascontiguousarray(a)))
    read_only = base.copy()
    read_only.flags.writeable = False
    TiledCSL.from_dense(read_only)


@pytest.mark.parametrize(
    ("a", "options", "argument"),
    [
        ([[1.0]], {}, "a"),
        (np.ones(4, np.float16), {}, "a"),
        (np.ones((2, 2, 2), np.float16), {}, "a"),
        (np.ones((0, 4), np.float16), {}, "a"),
        (np.ones((4, 0), np.float16), {}, "a"),
        (np.ones((2, 2), np.int32), {}, "a"),
        (np.ones((2, 2), np.uint16), {"dtype": "bf16"}, "a"),
        (np.ones((2, 2), np.complex64), {}, "a"),
        (np.ones((2, 2), ">f4"), {}, "a"),
        (np.ones((2, 2), np.float16), {"dtype": "fp8"}, "dtype"),
        (np.ones((2, 2), np.float16), {"order": "column"}, "order"),
    ],
)
def test_refused_sources(a: object, options: dict[str, str], argument: str) -> None:
    with pytest.raises(ArgumentError) as error:
        TiledCSL.from_dense(a, **options)
    assert error.value.argument == argument
