# SPDX-License-Identifier: Apache-2.0
"""Bitmap on the host: encode, decode, layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bitmap_reference as reference
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weight_cases as cases
from flashllm.errors import ArgumentError
from flashllm.formats import bitmap_encode, runs
from flashllm.formats.base import RoundingReport
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import (
    PLACE_TILES,
    SLACK,
    STREAM_ELEMENTS,
    Places,
    Position,
    estimated_value_bytes,
    flag_counts,
    stream_starts,
    unpack_masks,
)
from flashllm.formats.runs import runs_of
from flashllm.formats.weight import SparseWeight
from flashllm.jit.sources import cuda_root

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitmap_v4.safetensors"

sizes = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 191, 256]), st.integers(1, 300))
densities = st.one_of(st.sampled_from([0.0, 1e-4, 1.0]), st.floats(0, 1))
settings.register_profile("bitmap", deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_as_written(w: Bitmap, bits: np.ndarray) -> None:
    """The bytes of ``w`` are those of the written format."""
    want = reference.encode(bits)
    assert w.masks.ravel().tolist() == want.masks
    assert w.fronts.tolist() == want.fronts
    assert w.places.ravel().tolist() == want.places
    assert w.values.ravel().tolist() == want.values
    assert w.nnz == want.nnz


def check_streams(w: Bitmap) -> int:
    """Columns continue where they ended, and no stream falls behind too far. Returns the zeros that were added."""
    counts = flag_counts(unpack_masks(w.masks))
    restarts = runs_of(w.tiles).first_tiles()
    starts, columns = stream_starts(counts, Position.at_front(0), w.fronts, w.places, 0, restarts)
    ends = starts + counts
    fronts = w.fronts.astype(np.int64)[:, None, None]
    behind = fronts[1:] - ends
    assert behind.min() >= 0
    assert behind.max() <= SLACK
    assert (behind.min(axis=(1, 2)) == 0).all()
    assert fronts[0] == 0
    assert 0 <= np.diff(w.fronts).min() <= np.diff(w.fronts).max() <= STREAM_ELEMENTS
    places = Places.unpack(w.places)
    np.testing.assert_array_equal((fronts[:-1] - starts)[::PLACE_TILES], places.lags)
    np.testing.assert_array_equal(columns[::PLACE_TILES], 2 * places.lanes + np.arange(64) % 2)
    by_column = [np.empty_like(starts), np.empty_like(starts)]
    for rows, at in zip((starts, ends), by_column, strict=True):
        np.put_along_axis(at, columns, rows, axis=2)
    goes_on = ~np.isin(np.arange(1, len(counts)), restarts)
    np.testing.assert_array_equal(by_column[0][1:][goes_on], np.maximum(by_column[1], 0)[:-1][goes_on])
    return int(counts.sum()) - w.nnz


@settings(settings.get_profile("bitmap"), max_examples=250)
@given(
    rows=sizes,
    columns=sizes,
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    dtype=st.sampled_from(["fp16", "bf16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(rows: int, columns: int, density: float, pattern: str, dtype: str, seed: int) -> None:
    a = cases.matrix(pattern, rows, columns, density, seed, dtype)
    w = Bitmap.from_dense(a)
    w.validate()
    want = cases.pruned(a)
    back = w.to_dense()
    assert back.dtype == a.dtype
    assert back.shape == a.shape
    np.testing.assert_array_equal(back.view(np.uint16), want)
    assert w.nnz == np.count_nonzero(want)
    assert w.dtype == dtype
    assert len(w.values) == (w.fronts[-1] + 1) // 16 + 1
    assert check_streams(w) >= 0


@settings(settings.get_profile("bitmap"), max_examples=30)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    density=densities,
    pattern=st.sampled_from(cases.PATTERNS),
    dtype=st.sampled_from(["fp16", "bf16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_equal_the_written_format(
    rows: int, columns: int, density: float, pattern: str, dtype: str, seed: int
) -> None:
    bits = cases.bits(pattern, rows, columns, density, seed)
    assert_as_written(Bitmap.from_dense(bits.view(cases.NUMPY_DTYPE[dtype])), bits)


@pytest.mark.parametrize("pattern", cases.PATTERNS)
def test_bytes_equal_the_written_format_where_streams_catch_up(pattern: str) -> None:
    """Enough tiles that lags exceed the slack and are stored again; an odd K; both rows of tiles."""
    for seed, (shape, density) in enumerate((((130, 64 * 4 + 1), 0.6), ((17, 64 * 10 + 33), 0.3))):
        bits = cases.bits(pattern, *shape, density, seed)
        w = Bitmap.from_dense(bits.view(np.float16))
        assert_as_written(w, bits)
        want = reference.decode(*(a.ravel().tolist() for a in (w.masks, w.values, w.places)), shape)
        np.testing.assert_array_equal(want, cases.pruned(bits.view(np.float16)))


def test_one_stream_alone_makes_all_others_follow() -> None:
    bits = np.zeros((128, 64 * 9), np.uint16)
    bits[7, 4::16] = 0x3C00  # part 0, lane 30, the first halves of steps: 4 values per tile
    bits[100, 65] = 0x8000  # a negative zero where a zero is added, which stays a plain one
    w = Bitmap.from_dense(bits.view(np.float16))
    assert_as_written(w, bits)
    assert w.fronts.tolist() == [*range(0, 33, 4), 32]
    places = Places.unpack(w.places[1])
    assert (places.lags == 31).sum() == 255
    at = tuple(int(field[0, 60]) for field in places)
    assert at == (0, 0, 31), "in the ninth tile it has the column of the first that is behind"
    # The eighth tile advances every other stream by a row, the ninth none.
    assert np.count_nonzero(flag_counts(unpack_masks(w.masks))[7] == 1) == 255
    assert np.count_nonzero(flag_counts(unpack_masks(w.masks))[8]) == 1
    assert not (w.values == 0x8000).any()
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(bits.view(np.float16)))


def with_two_values_in_a_group(bits: np.ndarray, seed: int) -> np.ndarray:
    """``bits`` without some elements: no group of four keeps more than two."""
    rows, columns = -(-bits.shape[0] // 128) * 128, -(-bits.shape[1] // 64) * 64
    whole = np.zeros((rows, columns), np.uint16)
    whole[: bits.shape[0], : bits.shape[1]] = bits
    groups = whole.reshape(rows // 16, 2, 8, columns // 2, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(4), (len(groups), 1)), axis=1)
    taken = np.take_along_axis(groups & 0x7FFF != 0, order, axis=1)
    drop = taken & (np.cumsum(taken, axis=1) > 2)
    np.put_along_axis(groups, order, np.where(drop, 0, np.take_along_axis(groups, order, axis=1)), axis=1)
    back = groups.reshape(rows // 16, 8, columns // 2, 2, 2).transpose(0, 3, 1, 2, 4).reshape(rows, columns)
    return back[: bits.shape[0], : bits.shape[1]].copy()


@pytest.mark.parametrize("pattern", cases.PATTERNS)
def test_zeros_go_only_into_groups_that_have_room(pattern: str) -> None:
    """At most two values in a group, including padding; one stream is ahead by as much as a tile can hold."""
    for seed, density in enumerate((0.2, 0.6)):
        bits = with_two_values_in_a_group(cases.bits(pattern, 130, 64 * 9 + 5, density, seed), seed)
        bits[5, :] = np.where(np.arange(bits.shape[1]) % 8 < 2, 0x3C00, 0)  # row 13 is in the same groups
        bits[13, :] = 0x8000
        encoded = bitmap_encode.encode_strips(iter([bits[:128], bits[128:]]), bits.shape, group_values=2)
        want = reference.encode(bits, 2)
        assert encoded.masks.ravel().tolist() == want.masks
        assert encoded.fronts.tolist() == want.fronts
        assert encoded.places.ravel().tolist() == want.places
        assert encoded.values.ravel().tolist() == want.values
        kept = unpack_masks(encoded.masks)
        assert kept.sum() > encoded.nnz
        assert kept.reshape(-1, 4).sum(axis=1).max() == 2
        back = reference.decode(want.masks, want.values, want.places, bits.shape)
        np.testing.assert_array_equal(back, cases.pruned(bits.view(np.float16)))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_random_streams_need_few_zeros(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that let streams catch up, as a fraction of the values; also all those after the ends of streams."""
    rng = np.random.default_rng(1)
    a = (rng.random((1024, 16384)) < density).astype(np.float16)
    for count in (runs.RUNS, 60, 8):  # of 8, 34 and 256 tiles
        monkeypatch.setattr(runs, "RUNS", count)
        w = Bitmap.from_dense(a)
        assert 0 <= check_streams(w) / w.nnz < 0.01
        assert 0.95 < (w.values.nbytes - 16 * 512) / estimated_value_bytes(w.tiles, density) < 1.03
    assert w.values.nbytes < 1.04 * 2 * w.nnz, "streams that trade columns end at nearly the same row"


def test_values_of_a_dense_matrix_have_no_zeros_but_at_the_end() -> None:
    w = Bitmap.from_dense(np.ones((256, 640), np.float16))
    assert check_streams(w) == 0
    assert w.values.size == 256 * 640 + 16 * 256
    assert not Places.unpack(w.places).lags.any()
    assert (w.masks == 0xFFFFFFFF).all()


def golden_matrix() -> np.ndarray:
    """fp16 [129, 330] from a fixed recurrence: a tenth of it, and a full last row, which all streams must follow."""
    state = 12345
    out = np.zeros(129 * 330, np.uint16)
    for i in range(out.size):
        state = (1103515245 * state + 12345) % 2**31
        kept = (state >> 16) % 10 == 0 or i >= 128 * 330
        out[i] = (state >> 8) & 0xFFFF if kept else (0x8000 if state % 1024 < 16 else 0)
    out[[0, 69, 9099]] = 0x7E00, 0x7C00, 0xFC00
    return out.reshape(129, 330).view(np.float16)


def test_golden_file() -> None:
    """Byte for byte. The file was made by bitmap_reference and never changes."""
    a = golden_matrix()
    w = Bitmap.load(GOLDEN)
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))
    assert Places.unpack(w.places).lags[1].max() > 10
    assert check_streams(w) > 0
    again = Bitmap.from_dense(a)
    for name, array in w.arrays().items():
        assert getattr(again, name).tobytes() == array.tobytes(), name
    assert again.metadata() == w.metadata()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_pattern_is_stored_exactly(dtype: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(cases.NUMPY_DTYPE[dtype])
    w = Bitmap.from_dense(a)
    w.validate()
    assert w.nnz == (1 << 16) - 2
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))


def test_host_and_device_agree_on_the_constants() -> None:
    source = (cuda_root() / "flashllm/bitmap.cuh").read_text(encoding="utf-8")
    constants: dict[str, int] = {}
    for name, text in re.findall(r"constexpr (?:int|unsigned) (k\w+) = ([^;]+);", source):
        if re.fullmatch(r"[\w\s()*/+-]+", text) and "static_cast" not in text:
            constants[name] = eval(text.replace("/", "//"), {}, constants)
        if name == "kGroup":
            break
    assert constants["kTileM"] == bitmap_encode.TILE_M
    assert constants["kTileK"] == bitmap_encode.TILE_K
    assert constants["kParts"] == bitmap_encode.PARTS
    assert constants["kLanes"] == bitmap_encode.LANES
    assert constants["kGroup"] == bitmap_encode.GROUP
    assert constants["kPlaceTiles"] == bitmap_encode.PLACE_TILES
    assert constants["kSlack"] == bitmap_encode.SLACK
    assert constants["kChunkRows"] == bitmap_encode.CHUNK_ROWS
    assert constants["kStreamElements"] == bitmap_encode.STREAM_ELEMENTS
    assert constants["kRowBytes"] == 2 * bitmap_encode.STREAMS
    w = Bitmap.from_dense(np.ones((1, 1), np.float16))
    assert constants["kMaskBytes"] == w.masks.nbytes
    assert constants["kChunkBytes"] == w.values.nbytes


def test_facts() -> None:
    a = np.zeros((200, 100), np.float16)
    a[::2] = 1
    w = Bitmap.from_dense(a)
    assert isinstance(w, SparseWeight)
    assert (w.format, w.shape, w.dtype, w.tiles) == ("bitmap", (200, 100), "fp16", (2, 2))
    assert (w.nnz, w.density, w.sparsity) == (10_000, 0.5, 0.5)
    assert w.nbytes == 4 * 1024 + w.values.nbytes + 4 * 5 + 512
    assert not w.is_device
    assert w.to_host() is w
    assert set(w.arrays()) == {"masks", "values", "fronts", "places"}
    assert "array" not in repr(w)


def test_layouts_of_the_source() -> None:
    base = cases.matrix("uniform", 260, 260, 0.3, 5, "fp16")
    for a in (base[1:200, 3:130], base.T, base[::-1, ::-2], np.asfortranarray(base)):
        w = Bitmap.from_dense(a)
        np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(np.ascontiguousarray(a)))
    read_only = base.copy()
    read_only.flags.writeable = False
    Bitmap.from_dense(read_only)


def same(a: Bitmap, b: Bitmap) -> bool:
    arrays = zip(a.arrays().values(), b.arrays().values(), strict=True)
    return a.metadata() == b.metadata() and all(x.tobytes() == y.tobytes() for x, y in arrays)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("value", [np.float32, np.float64, np.int8, np.int64])
def test_scipy_equals_dense(layout: str, value: Any) -> None:
    a = np.where(cases.mask("uniform", 300, 150, 0.2, 9), 1, 0) * np.arange(1, 151) % 97
    a[7] = 0
    s = getattr(sp, f"{layout}_array")(a.astype(value))
    for dtype in ("fp16", "bf16"):
        dense = a.astype(cases.NUMPY_DTYPE[dtype])
        assert same(Bitmap.from_scipy(s, dtype=dtype), Bitmap.from_dense(dense))


def test_scipy_duplicates_explicit_zeros_and_special_values() -> None:
    row, column = np.array([2, 0, 2, 2, 1, 1, 0, 0]), np.array([5, 9, 5, 0, 3, 3, 1, 2])
    data = np.array([0.5, 0.0, 0.25, 4.0, 1.0, -1.0, np.nan, -np.inf], np.float32)
    w = Bitmap.from_scipy(sp.coo_array((data, (row, column)), shape=(3, 10)))
    w.validate()
    want = np.zeros((3, 10), np.float16)
    want[2, 5], want[2, 0], want[0, 1], want[0, 2] = 0.75, 4, np.nan, -np.inf
    assert w.nnz == 4
    np.testing.assert_array_equal(w.to_dense(), want)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_to_scipy(dtype: str) -> None:
    a = cases.matrix("skewed", 260, 140, 0.3, 4, dtype)
    s = Bitmap.from_dense(a).to_scipy()
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
        w = Bitmap.from_dense(source, report=reports.append)
        assert reports == [RoundingReport(total=7, changed=4, became_zero=1, became_infinite=1)]
        assert w.nnz == 6
        assert same(w, Bitmap.from_scipy(sp.csr_array(source), report=reports.append))
        assert reports[1] == reports[0]
    assert Bitmap.from_dense(a.astype(ml_dtypes.bfloat16)).dtype == "bf16"
    assert Bitmap.from_dense(a, dtype="bf16").to_dense().dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("a", "options", "argument"),
    [
        ([[1.0]], {}, "a"),
        (np.ones(4, np.float16), {}, "a"),
        (np.ones((0, 4), np.float16), {}, "a"),
        (np.ones((2, 2), np.int32), {}, "a"),
        (np.ones((2, 2), np.uint16), {"dtype": "bf16"}, "a"),
        (np.ones((2, 2), np.float16), {"dtype": "fp8"}, "dtype"),
    ],
)
def test_refused_sources(a: object, options: dict[str, str], argument: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Bitmap.from_dense(a, **options)
    assert error.value.argument == argument


def test_more_value_rows_than_int32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap_encode, "MAX_ROWS", 63)
    assert Bitmap.from_dense(np.ones((128, 64), np.float16)).fronts[-1] == 32
    with pytest.raises(ArgumentError, match="a: expected at most 63 value rows, got 64"):
        Bitmap.from_dense(np.ones((128, 128), np.float16))
