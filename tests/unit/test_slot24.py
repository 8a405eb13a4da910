# SPDX-License-Identifier: Apache-2.0
"""Slot24 on the host: encode, decode, layout."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
import slot24_reference as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_slot24_files import same

import weight_cases as cases
from flashllm.errors import ArgumentError
from flashllm.formats import bitmap_encode, slot24_encode
from flashllm.formats.base import RoundingReport
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import unpack_masks
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_encode import unpack_picks
from flashllm.formats.slot24_parts import PARTS_OF, STEPS
from flashllm.formats.weight import SparseWeight
from flashllm.jit.sources import cuda_root
from products import every_pair

some_columns = st.one_of(st.sampled_from([1, 2, 127, 128, 129, 247, 248, 255, 256, 257]), st.integers(1, 600))
some_rows = st.one_of(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257]), st.integers(1, 260))
"""Up to three strips, which are independent of each other: more would only take longer."""
densities = st.one_of(st.sampled_from([0.0, 1e-4, 0.2, 0.25, 1.0]), st.floats(0, 0.5))
windows = st.sampled_from([None, None, 128, 136, 200, 248, 256])
shapes_of_parts = st.sampled_from([None, 32, 64])
values_of_groups = st.sampled_from([None, None, 2, 4])
both_parts = pytest.mark.parametrize("part_rows", [32, 64])
settings.register_profile("slot24", deadline=None, suppress_health_check=[HealthCheck.too_slow])


def listed(w: Slot24) -> np.ndarray:
    """Columns in the window [strips, bands, windows, 128, 2]."""
    tiles_m, tiles_k = w.tiles
    parts = PARTS_OF[w.part_rows]
    rows = w.columns.reshape(tiles_m, tiles_k, 4, 32, parts.steps)
    return np.stack([parts.unpack_columns(row) for row in rows]).reshape(tiles_m, parts.bands, -1, 128, 2)


@settings(settings.get_profile("slot24"), max_examples=200)
@given(
    rows=some_rows,
    columns=some_columns,
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    dtype=st.sampled_from(["fp16", "bf16"]),
    window=windows,
    part_rows=shapes_of_parts,
    group_values=values_of_groups,
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    rows: int,
    columns: int,
    density: float,
    pattern: str,
    dtype: str,
    window: int | None,
    part_rows: int | None,
    group_values: int | None,
    seed: int,
) -> None:
    a = cases.matrix(pattern, rows, columns, density, seed, dtype)
    try:
        w = Slot24.from_dense(a, window=window, part_rows=part_rows, group_values=group_values)
    except ArgumentError:  # the next test says when
        assert window not in (None, 128) or group_values == 2
        return
    assert window in (None, w.window)
    assert part_rows in (None, w.part_rows)
    assert group_values in (None, w.group_values)
    w.validate()
    want = cases.pruned(a)
    back = w.to_dense()
    assert back.dtype == a.dtype
    assert back.shape == a.shape
    np.testing.assert_array_equal(back.view(np.uint16), want)
    assert w.nnz == np.count_nonzero(want)
    assert w.dtype == dtype
    every = listed(w)
    if w.group_values == 4:
        residues = np.sort(every.reshape(*every.shape[:3], 32, 8) % 8, axis=-1)
        assert (residues == np.arange(8)).all(), "residues of the sets"
        assert (every[..., 0] % 8 == np.arange(128) % 4).all()
    else:
        assert (every[..., 0] % 2 == np.arange(128) % 2).all()
        assert unpack_masks(w.masks).reshape(-1, 4).sum(axis=1).max(initial=0) <= 2


@settings(settings.get_profile("slot24"), max_examples=20)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 270),
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    dtype=st.sampled_from(["fp16", "bf16"]),
    window=windows,
    part_rows=shapes_of_parts,
    group_values=values_of_groups,
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_equal_the_written_format(
    rows: int,
    columns: int,
    density: float,
    pattern: str,
    dtype: str,
    window: int | None,
    part_rows: int | None,
    group_values: int | None,
    seed: int,
) -> None:
    bits = cases.bits(pattern, rows, columns, density, seed)
    want = reference.encode(bits, window, part_rows, group_values)
    a = bits.view(cases.NUMPY_DTYPE[dtype])
    options: dict[str, Any] = {"window": window, "part_rows": part_rows, "group_values": group_values}
    if want is None:
        with pytest.raises(ArgumentError, match="group_values" if window is None else "window"):
            Slot24.from_dense(a, **options)
        return
    reference.assert_as_written(Slot24.from_dense(a, **options), want)


@every_pair(
    "pattern, matrix, part_rows",
    cases.PATTERNS,
    [((64, 300), 0.27, None), ((129, 500), 0.05, 248), ((33, 131), 0.5, 128)],
    (32, 64),
)
def test_bytes_equal_the_written_format_in_every_pattern(
    pattern: str, matrix: tuple[tuple[int, int], float, int | None], part_rows: int
) -> None:
    shape, density, window = matrix
    bits = cases.bits(pattern, *shape, density, 7)
    want = reference.encode(bits, window, part_rows, None)
    if want is None:
        assert (pattern, window) == ("full", 248)
        return
    w = Slot24.from_dense(bits.view(np.float16), window=window, part_rows=part_rows)
    reference.assert_as_written(w, want)
    np.testing.assert_array_equal(reference.decode(want, shape), cases.pruned(bits.view(np.float16)))


@both_parts
@pytest.mark.parametrize(("window", "density", "group_values"), [(None, 0.15, 4), (128, 0.15, 4), (240, 0.1, 2)])
def test_product_as_the_instruction_reads_it(
    window: int | None, density: float, group_values: int, part_rows: int
) -> None:
    """Metadata from the picks, operands by the logical columns: what the sparse instruction would add up."""
    a = cases.mask("uniform", 130, 500, density, 3) * np.random.default_rng(4).integers(-3, 4, (130, 500))
    w = Slot24.from_dense(a.astype(np.float16), window=window, part_rows=part_rows, group_values=group_values)
    x = np.random.default_rng(5).integers(-4, 5, 500)
    stored = w.slots.to_dense().astype(np.int64)
    y = np.zeros(256, np.int64)
    tiles_m, tiles_k = w.tiles
    for tile, part, lane in np.ndindex(tiles_m * tiles_k, 4, 32):
        top, left = tile // tiles_k * 128, tile % tiles_k * 64
        window_first = tile % tiles_k // 2 * w.window
        g, t = divmod(lane, 4)
        for v, i in np.ndindex(2, 2):
            word_half, half = divmod(t, 2)  # the instruction's selector, and its half of 8 slots
            step = 2 * v + word_half if part_rows == 32 else v
            metadata = int(w.picks[tile, part, lane, v]) >> i & 0x55555555 | 0x88888888
            for b, group in np.ndindex(2, 4):
                stored_row = top + 64 * i + 16 * part + 8 * b + g
                row = stored_row if part_rows == 32 else top + 64 * (part // 2) + 32 * word_half + 16 * i + 8 * b + g
                first, second = (metadata >> (16 * b + 4 * group + 2 * e) & 3 for e in range(2))
                assert first < second
                for e, position in ((0, first), (1, second)):
                    logical = 4 * (4 * half + group) + position
                    column = int(w.columns[tile, part, logical, step])
                    real = column < w.window and window_first + column < 500
                    value = stored[stored_row, left + 32 * v + 16 * word_half + 8 * half + 2 * group + e]
                    y[row] += value * (x[window_first + column] if real else 0)
    np.testing.assert_array_equal(y[:130], a @ x)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 0.9])
def test_bytes_are_estimated(density: float) -> None:
    a = (np.random.default_rng(2).random((1024, 1280)) < density).astype(np.float16)
    assert 0.85 < Slot24.from_dense(a).nbytes / Slot24.estimated_bytes(a.shape, density) < 1.02


def test_columns_that_are_used_up_evenly_need_no_more_zeros_than_a_bitmap() -> None:
    """With a window of 128 every slot has one column; the dummies must not gather heavy columns in one lane."""
    a = (np.random.default_rng(1).random((1024, 1024)) < 0.5).astype(np.float16)
    w = Slot24.from_dense(a)
    assert w.window == 128
    assert w.values.size < 1.01 * Bitmap.from_dense(a).values.size


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_pattern_is_stored_exactly(dtype: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(cases.NUMPY_DTYPE[dtype])
    w = Slot24.from_dense(a)
    w.validate()
    assert (w.nnz, w.window) == ((1 << 16) - 2, 128)
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))


def test_host_and_device_agree_on_the_constants() -> None:
    header = (cuda_root() / "flashllm/slot24.cuh").read_text(encoding="utf-8")
    constants = dict(re.findall(r"constexpr int (k\w+) = ([^;]+);", header))
    assert int(constants["kWindowTiles"]) == slot24_encode.TILES
    assert int(constants["kSteps"]) == STEPS
    assert constants["kPickBytes"] == "bitmap::kTileThreads * 8"
    assert constants["kBands"] == "bitmap::kTileM / kPartRows"
    assert constants["kHalves"] == "bitmap::kParts / kBands"
    assert constants["kPartSteps"] == "kSteps / kHalves"
    assert constants["kColumnBytes"] == "bitmap::kTileThreads * kPartSteps"
    for parts in PARTS_OF.values():
        w = Slot24.from_dense(np.ones((1, 1), np.float16), part_rows=parts.rows)
        tiles = w.tiles[0] * w.tiles[1]
        threads = bitmap_encode.PARTS * bitmap_encode.LANES
        assert (w.picks.nbytes, w.columns.nbytes) == (threads * 8 * tiles, threads * parts.steps * tiles)
        assert (parts.bands, parts.halves) == (128 // parts.rows, parts.rows // 32)


def test_empty_matrix() -> None:
    w = Slot24.from_dense(np.full((3, 300), -0.0, np.float16))
    w.validate()
    assert (w.nnz, w.window, w.tiles) == (0, 256, (1, 4))
    assert not w.picks.any()
    assert not w.masks.any()
    assert not w.to_dense().view(np.uint16).any()
    assert w.to_scipy().nnz == 0


def test_facts() -> None:
    a = np.zeros((200, 300), np.float16)
    a[::2, ::2] = 1
    w = Slot24.from_dense(a, window=128, part_rows=32, group_values=4)
    assert isinstance(w, SparseWeight)
    assert (w.format, w.shape, w.dtype, w.tiles, w.window) == ("slot24", (200, 300), "fp16", (2, 6), 128)
    assert (w.nnz, w.density, w.sparsity) == (15_000, 0.25, 0.75)
    assert w.nbytes == 12 * (1024 + 1024 + 512) + w.values.nbytes + 4 * 13 + 1024
    tall = Slot24.from_dense(a, window=128, part_rows=64, group_values=4)
    assert tall.nbytes == 12 * (1024 + 1024 + 256) + tall.values.nbytes + 4 * 13 + 1024
    assert not w.is_device
    assert w.to_host() is w
    assert set(w.arrays()) == {"masks", "values", "fronts", "places", "picks", "columns"}
    metadata = {"shape": [200, 300], "dtype": "fp16", "nnz": 15_000, "window": 128, "part_rows": 32, "group_values": 4}
    assert w.metadata() == metadata
    assert "array" not in repr(w)
    for options in Slot24.ENCODINGS.values():
        np.testing.assert_array_equal(Slot24.from_dense(a, **options).to_dense(), a)


@both_parts
def test_slots_are_a_bitmap_that_shares_the_buffers(part_rows: int) -> None:
    w = Slot24.from_dense(cases.matrix("uniform", 200, 700, 0.2, 5, "bf16"), part_rows=part_rows)
    s = w.slots
    s.validate()
    assert (s.shape, s.dtype, s.nnz, s.tiles) == ((256, w.tiles[1] * 64), "bf16", w.nnz, w.tiles)
    assert all(s.arrays()[name] is w.arrays()[name] for name in Bitmap.BUFFERS)
    picks = PARTS_OF[part_rows].restored(unpack_picks(w.picks.reshape(2, -1, 4, 32, 2)[1]))
    assert not picks[72:].any()
    assert 0.4 < picks.sum() / np.count_nonzero(s.to_dense().view(np.uint16)[128:]) < 0.6


def test_the_order_of_slots_in_a_tile() -> None:
    """Each of the two shapes, against the written format; arrays and single places agree."""
    tiles = np.arange(128 * 192, dtype=np.uint16).reshape(128, 192)
    for rows, parts in PARTS_OF.items():
        stored = parts.stored(tiles)
        for row, slot in np.ndindex(128, 192):
            place = reference.stored_place(rows, row, slot % 64)
            assert parts.place(row, slot) == (place[0], slot // 64 * 64 + place[1])
            assert stored[parts.place(row, slot)] == tiles[row, slot]
        np.testing.assert_array_equal(parts.restored(stored), tiles)


def test_layouts_of_the_source() -> None:
    base = cases.matrix("uniform", 260, 260, 0.2, 5, "fp16")
    for a in (base[1:200, 3:130], base.T, base[::-1, ::-2], np.asfortranarray(base)):
        w = Slot24.from_dense(a)
        np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(np.ascontiguousarray(a)))
    read_only = base.copy()
    read_only.flags.writeable = False
    Slot24.from_dense(read_only)
    np.testing.assert_array_equal(read_only.view(np.uint16), base.view(np.uint16))


@cache
def from_dense(a: bytes, dtype: str, **options: int) -> Slot24:
    """Weights of the integers [300, 150]: the same for all layouts and value types."""
    dense = np.frombuffer(a, np.int64).reshape(300, 150)
    return Slot24.from_dense(dense.astype(cases.NUMPY_DTYPE[dtype]), **options)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("value", [np.float32, np.float64, np.int8, np.int64])
def test_scipy_equals_dense(layout: str, value: Any) -> None:
    a = np.where(cases.mask("uniform", 300, 150, 0.2, 9), 1, 0) * np.arange(1, 151) % 97
    a[7] = 0
    s = getattr(sp, f"{layout}_array")(a.astype(value))
    for dtype in ("fp16", "bf16"):
        for options in ({}, {"window": 128}, {"part_rows": 64}, {"part_rows": 32}, {"group_values": 4}):
            assert same(Slot24.from_scipy(s, dtype=dtype, **options), from_dense(a.tobytes(), dtype, **options))


def test_scipy_duplicates_explicit_zeros_and_special_values() -> None:
    row, column = np.array([2, 0, 2, 2, 1, 1, 0, 0]), np.array([5, 9, 5, 0, 3, 3, 1, 2])
    data = np.array([0.5, 0.0, 0.25, 4.0, 1.0, -1.0, np.nan, -np.inf], np.float32)
    w = Slot24.from_scipy(sp.coo_array((data, (row, column)), shape=(3, 10)))
    w.validate()
    want = np.zeros((3, 10), np.float16)
    want[2, 5], want[2, 0], want[0, 1], want[0, 2] = 0.75, 4, np.nan, -np.inf
    assert w.nnz == 4
    np.testing.assert_array_equal(w.to_dense(), want)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_to_scipy(dtype: str) -> None:
    a = cases.matrix("skewed", 260, 340, 0.2, 4, dtype)
    s = Slot24.from_dense(a).to_scipy()
    assert s.dtype == np.float32
    s.check_format(full_check=True)
    assert s.has_canonical_format
    finite = np.nan_to_num(a.astype(np.float32), nan=7, posinf=8, neginf=9)
    s.data = np.nan_to_num(s.data, nan=7, posinf=8, neginf=9)
    np.testing.assert_array_equal(s.toarray(), finite)


def test_report_and_rounding() -> None:
    a = np.zeros((130, 70))
    a[0, :8] = [1.0, 1 + 2**-20, 1e-9, 1e6, np.inf, np.nan, -0.0, -3e-8]
    for source in (a, a.astype(np.float32)):
        reports: list[RoundingReport] = []
        w = Slot24.from_dense(source, report=reports.append)
        assert reports == [RoundingReport(total=7, changed=4, became_zero=1, became_infinite=1)]
        assert w.nnz == 6
        assert same(w, Slot24.from_scipy(sp.csr_array(source), report=reports.append))
        assert reports[1] == reports[0]
    assert Slot24.from_dense(a.astype(ml_dtypes.bfloat16)).dtype == "bf16"
    assert Slot24.from_dense(a, dtype="bf16").to_dense().dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("a", "options", "argument"),
    [
        ([[1.0]], {}, "a"),
        (np.ones(4, np.float16), {}, "a"),
        (np.ones((0, 4), np.float16), {}, "a"),
        (np.ones((2, 2), np.int32), {}, "a"),
        (np.ones((2, 2), np.uint16), {"dtype": "bf16"}, "a"),
        (np.ones((2, 2), np.float16), {"dtype": "fp8"}, "dtype"),
        *((np.ones((2, 2), np.float16), {"window": w}, "window") for w in (0, 120, 132, 257, 264, 128.0, True, "256")),
        (np.ones((2, 200), np.float16), {"window": 256}, "window"),
        *((np.ones((2, 2), np.float16), {"part_rows": r}, "part_rows") for r in (0, 16, 128, 64.0, True, "32")),
        *((np.ones((2, 2), np.float16), {"group_values": v}, "group_values") for v in (0, 1, 3, 2.0, True, "4")),
        (np.ones((16, 200), np.float16), {"group_values": 2}, "group_values"),
        (np.ones((16, 200), np.float16), {"window": 128, "group_values": 2}, "window"),
    ],
)
def test_refused_sources(a: object, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Slot24.from_dense(a, **options)
    assert error.value.argument == argument


def test_refused_windows_of_sparse_sources() -> None:
    s = sp.csr_array(np.ones((16, 200)))
    for window in (100, 256):
        with pytest.raises(ArgumentError, match=f"window: .*, got {window}"):
            Slot24.from_scipy(s, window=window)
    for group_values in (2, 3):
        with pytest.raises(ArgumentError, match=f"group_values: .*, got {group_values}"):
            Slot24.from_scipy(s, group_values=group_values)
