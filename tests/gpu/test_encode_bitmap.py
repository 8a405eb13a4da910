# SPDX-License-Identifier: Apache-2.0
"""The device encoder of bitmap gives the bytes of the NumPy encoder; the device decoder undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encode_tiled_csl import floats, patterns, to_cupy

from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import RoundingReport
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.runs import runs_of
from products import NUMPY_DTYPE
from weight_cases import PATTERNS, bits, pruned

SHAPES = [(1, 1), (1, 70), (70, 1), (128, 64), (129, 65), (256, 128), (130, 63), (300, 202), (64, 1007), (512, 1030)]


def assert_same(device: Bitmap, host: Bitmap) -> None:
    assert device.is_device
    assert device.metadata() == host.metadata()
    for name, array in host.arrays().items():
        found = getattr(device, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found.get(), array, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_same_bytes_as_on_the_host(cp: Any, shape: tuple[int, int], dtype: str) -> None:
    for seed, density in enumerate((0.0, 0.001, 0.02, 0.2, 0.5, 0.97, 0.9998, 1.0)):
        a = patterns(*shape, density, seed).view(NUMPY_DTYPE[dtype])
        w = Bitmap.from_dense(to_cupy(cp, a))
        assert_same(w, Bitmap.from_dense(a))
        w.validate()
        back = w.to_dense()
        assert back.dtype == a.dtype
        np.testing.assert_array_equal(back.view(np.uint16).get(), pruned(a))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(260, 200), (100, 64 * 33), (1500, 70)], ids=str)
def test_same_bytes_for_every_pattern(cp: Any, pattern: str, shape: tuple[int, int]) -> None:
    for seed, density in enumerate((0.05, 0.3, 0.7)):
        a = bits(pattern, *shape, density, seed).view(np.float16)
        w = Bitmap.from_dense(to_cupy(cp, a))
        assert_same(w, Bitmap.from_dense(a))
        np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(a))


@pytest.mark.parametrize("tiles", [*range(1, 19), 63, 64, 65, 1000])
def test_same_bytes_for_any_number_of_tiles(cp: Any, tiles: int) -> None:
    """The walk over the tiles takes eight at a time; places of every eighth are stored."""
    a = patterns(128, 64 * tiles, 0.4, tiles)
    a[5] = 0x3C00  # a full row, which the other streams follow
    a[:, ::7] = 0x8000
    half = a.view(np.float16)
    w = Bitmap.from_dense(to_cupy(cp, half))
    assert_same(w, Bitmap.from_dense(half))
    np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(half))


@pytest.mark.parametrize(("shape", "runs"), [((7700, 3300), 396), ((3500, 8000), 392), ((2100, 900), 31)], ids=str)
def test_same_bytes_for_many_runs(cp: Any, shape: tuple[int, int], runs: int) -> None:
    """As many runs as a matrix can have, starting inside rows of tiles or not, longer from the first to the last."""
    rng = np.random.default_rng(runs)
    a = rng.integers(1, 1 << 16, shape, dtype=np.uint16)
    a[rng.random(shape) > np.linspace(0, 0.9, shape[0])[:, None]] = 0
    half = a.view(np.float16)
    want = Bitmap.from_dense(half)
    assert runs_of(want.tiles).count == runs
    w = Bitmap.from_dense(to_cupy(cp, half))
    assert_same(w, want)
    np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(half))


@pytest.mark.parametrize("shape", [(128, 64), (300, 203), (1, 1), (140, 600)], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(cp: Any, shape: tuple[int, int], dtype: str) -> None:
    for seed, density in enumerate((0.0, 0.2, 1.0)):
        a = floats(*shape, density, seed)
        reports: list[RoundingReport] = []
        w = Bitmap.from_dense(cp.asarray(a), dtype=dtype, report=reports.append)
        with np.errstate(all="ignore"):
            want = Bitmap.from_dense(a, dtype=dtype, report=reports.append)
        assert_same(w, want)
        assert reports[0] == reports[1]


def test_bit_patterns_and_the_report_of_a_source_that_fits(cp: Any) -> None:
    a = patterns(200, 100, 0.3, 8)
    for dtype in ("fp16", "bf16"):
        reports: list[RoundingReport] = []
        w = Bitmap.from_dense(cp.asarray(a), dtype=dtype, report=reports.append)
        assert_same(w, Bitmap.from_dense(a.view(NUMPY_DTYPE[dtype])))
        assert reports == [RoundingReport(total=w.nnz, changed=0, became_zero=0, became_infinite=0)]


@pytest.mark.sanitize
@pytest.mark.parametrize("itemsize", [2, 4])
def test_views_with_any_pitch_and_alignment(cp: Any, itemsize: int) -> None:
    base = patterns(300, 220, 0.3, 5).view(np.float16) if itemsize == 2 else floats(300, 220, 0.3, 5)
    device = to_cupy(cp, base)
    for rows, columns in (
        (slice(None), slice(1, 201)),
        (slice(3, 290), slice(0, 200)),
        (slice(0, 300, 2), slice(2, 131)),
        (slice(5, 6), slice(7, 8)),
        (slice(None), slice(4, 219)),
    ):
        with np.errstate(all="ignore"):
            assert_same(Bitmap.from_dense(device[rows, columns]), Bitmap.from_dense(base[rows, columns]))


def test_repeats_give_the_same_bytes(cp: Any) -> None:
    a = to_cupy(cp, patterns(1024, 2048, 0.2, 1).view(np.float16))
    first = Bitmap.from_dense(a)
    for _ in range(5):
        again = Bitmap.from_dense(a)
        assert all(bool((getattr(again, name) == array).all()) for name, array in first.arrays().items())


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [64, 65, 530])
def test_decode_writes_every_element_and_nothing_else(cp: Any, columns: int) -> None:
    from flashllm.encode.bitmap import decode

    a = patterns(150, columns, 0.2, 4)
    a[a & 0x7FFF == 0] = 0
    w = Bitmap.from_dense(a.view(np.float16)).to_device()
    fence = 64
    buffer = cp.full(2 * fence + a.size, 0x7E55, np.uint16)
    out = buffer[fence:-fence].reshape(a.shape).view(np.float16)
    assert decode(w, out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16).get(), a)
    assert bool((buffer[:fence] == 0x7E55).all())
    assert bool((buffer[-fence:] == 0x7E55).all())


def test_moves_and_files(cp: Any, tmp_path: Path) -> None:
    host = Bitmap.from_dense(patterns(300, 600, 0.2, 6).view(np.float16))
    device = host.to_device()
    assert_same(device, host)
    assert device.to_device() is device
    np.testing.assert_array_equal(device.to_host().values, host.values)
    device.save(tmp_path / "w")
    np.testing.assert_array_equal(Bitmap.load(tmp_path / "w").values, host.values)
    assert (device.to_scipy() != host.to_scipy()).nnz == np.isnan(host.to_scipy().data).sum()
    places = device.places.copy()
    places[1, 2, 3] += 1 << 10
    with pytest.raises(FormatError, match=r"places\[387\]"):
        device.with_arrays({"places": places}).validate()


def test_refused_sources(cp: Any) -> None:
    from flashllm.encode.bitmap import decode, encode

    ones = cp.ones((8, 8), np.float16)
    for a, options, argument in (
        (cp.ones(4, np.float16), {}, "a"),
        (cp.ones((0, 4), np.float16), {}, "a"),
        (cp.ones((4, 4), np.float64), {}, "a"),
        (ones.T[:, :4], {}, "a"),
        (ones[:, ::2], {}, "a"),
        (ones[::-1], {}, "a"),
        (ones, {"dtype": "bf16"}, "dtype"),
        (ones, {"dtype": "int8"}, "dtype"),
        (ones.view(np.uint16), {}, "dtype"),
    ):
        with pytest.raises(ArgumentError) as error:
            Bitmap.from_dense(a, **options)
        assert error.value.argument == argument
    with pytest.raises(ArgumentError):
        encode(np.ones((4, 4), np.float16))
    host = Bitmap.from_dense(np.ones((4, 4), np.float16))
    with pytest.raises(ArgumentError):
        decode(host)
    for out in (np.empty((4, 4), np.float16), cp.empty((4, 5), np.float16), cp.empty((4, 4), np.float32)):
        with pytest.raises(ArgumentError):
            decode(host.to_device(), out=out)


def test_memory_beside_the_result(cp: Any) -> None:
    """256 bytes for each tile, and the fronts."""
    a = cp.zeros((4096, 4096), np.float32)
    a[::5] = 1
    Bitmap.from_dense(a)
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        w = Bitmap.from_dense(a)
        assert pool.total_bytes() <= w.nbytes + 2048 * 260 + (1 << 16)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(cp: Any) -> None:
    shape = (65536 + 5, 32768 + 2)
    if cp.cuda.runtime.memGetInfo()[0] < 3 * shape[0] * shape[1] * 2:
        pytest.skip("needs 13 GB of device memory")
    a = cp.zeros(shape, np.float16)
    rng = np.random.default_rng(0)
    row, column = rng.integers(0, shape[0], 100_000), rng.integers(0, shape[1], 100_000)
    row[:4], column[:4] = [0, 0, shape[0] - 1, shape[0] - 1], [0, shape[1] - 1, 0, shape[1] - 1]
    a[cp.asarray(row), cp.asarray(column)] = 2
    w = Bitmap.from_dense(a)
    w.validate()
    assert w.nnz == len(set(zip(row.tolist(), column.tolist(), strict=True)))
    back = w.to_dense()
    for start in range(0, shape[0], 8192):
        assert bool((back[start : start + 8192] == a[start : start + 8192]).all())
