# SPDX-License-Identifier: Apache-2.0
"""The device encoder gives the bytes of the NumPy encoder; the device decoder undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import RoundingReport
from flashllm.formats.tiled_csl import TiledCSL

pytestmark = pytest.mark.gpu

NUMPY_DTYPE: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES = [(1, 1), (1, 70), (70, 1), (128, 64), (129, 65), (256, 128), (130, 63), (300, 202), (64, 7), (512, 1030)]


def patterns(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    """Any 16-bit patterns (NaN, infinity, subnormal numbers), pruned to ``density``; a few zeros are -0.0."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 1 << 16, (rows, columns)).astype(np.uint16)
    out[rng.random((rows, columns)) >= density] = 0
    out[(out == 0) & (rng.random((rows, columns)) < 0.02)] = 0x8000
    return out


def floats(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    """float32 over the whole range of exponents, ties and special values, pruned to ``density``."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, (rows, columns), dtype=np.uint64).astype(np.uint32)
    middle = rng.integers(0x32000000, 0x48000000, (rows, columns)).astype(np.uint32)
    ties = (middle & 0xFFFFE000) | 0x1000
    out = np.choose(rng.integers(0, 3, (rows, columns)), [bits, middle, ties]).astype(np.uint32)
    out[rng.random((rows, columns)) >= density] = 0
    return out.view(np.float32)


def assert_same(device: TiledCSL, host: TiledCSL) -> None:
    assert device.is_device
    assert device.metadata() == host.metadata()
    np.testing.assert_array_equal(device.tile_offsets.get(), host.tile_offsets)
    np.testing.assert_array_equal(device.words.get(), host.words)


def to_cupy(cp: Any, a: np.ndarray) -> Any:
    """Upload by bit pattern, so that no conversion touches the values."""
    return cp.asarray(np.ascontiguousarray(a).view(np.uint16)).view(a.dtype) if a.itemsize == 2 else cp.asarray(a)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["bank", "row"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_same_bytes_as_on_the_host(cp: Any, shape: tuple[int, int], order: str, dtype: str) -> None:
    for seed, density in enumerate((0.0, 0.001, 0.02, 0.2, 0.5, 0.97, 0.9998, 1.0)):
        a = patterns(*shape, density, seed).view(NUMPY_DTYPE[dtype])
        w = TiledCSL.from_dense(to_cupy(cp, a), order=order)
        assert_same(w, TiledCSL.from_dense(a, order=order))
        w.validate()
        back = w.to_dense()
        assert back.dtype == a.dtype
        expected = a.view(np.uint16).copy()
        expected[expected & 0x7FFF == 0] = 0
        np.testing.assert_array_equal(back.view(np.uint16).get(), expected)


@pytest.mark.parametrize("order", ["bank", "row"])
@pytest.mark.parametrize("pattern", ["per-row", "block", "column", "empty-tiles", "even-columns", "one-bank"])
def test_same_bytes_for_uneven_tiles(cp: Any, order: str, pattern: str) -> None:
    rows, columns = 260, 200
    a = patterns(rows, columns, 0.3, 3)
    row, column = np.indices(a.shape)
    keep = {
        "per-row": (column + row) % 5 == 0,
        "block": (row // 16 + column // 16) % 3 == 0,
        "column": column == 70,
        "empty-tiles": (row // 128 + column // 64) % 2 == 0,
        "even-columns": column % 2 == 0,
        "one-bank": (((column % 64) ^ (row % 8 * 8)) >> 1) == 9,
    }[pattern]
    if pattern != "empty-tiles":
        a[a == 0] = 0x3C00
    a[~keep] = 0
    half = a.view(np.float16)
    assert_same(TiledCSL.from_dense(to_cupy(cp, half), order=order), TiledCSL.from_dense(half, order=order))


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 127, 128, 129, 4095, 4096, 4097, 8188, 8189, 8190, 8191, 8192])
@pytest.mark.parametrize("order", ["bank", "row"])
def test_counts_around_the_vector_and_group_sizes(cp: Any, keep: int, order: str) -> None:
    flat = np.zeros(8192, np.float16)
    flat[np.random.default_rng(keep).permutation(8192)[:keep]] = 1
    a = flat.reshape(128, 64)
    assert_same(TiledCSL.from_dense(cp.asarray(a), order=order), TiledCSL.from_dense(a, order=order))


@pytest.mark.parametrize("shape", [(128, 64), (300, 203), (1, 1), (140, 130)], ids=str)
@pytest.mark.parametrize("order", ["bank", "row"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(cp: Any, shape: tuple[int, int], order: str, dtype: str) -> None:
    for seed, density in enumerate((0.0, 0.2, 1.0)):
        a = floats(*shape, density, seed)
        reports: list[RoundingReport] = []
        w = TiledCSL.from_dense(cp.asarray(a), dtype=dtype, order=order, report=reports.append)
        assert_same(w, TiledCSL.from_dense(a, dtype=dtype, order=order, report=reports.append))
        assert reports[0] == reports[1]


def test_report_of_a_source_that_fits(cp: Any) -> None:
    reports: list[RoundingReport] = []
    a = patterns(140, 70, 0.4, 1).view(np.float16)
    w = TiledCSL.from_dense(to_cupy(cp, a), report=reports.append)
    assert reports == [RoundingReport(total=w.nnz, changed=0, became_zero=0, became_infinite=0)]


def test_bit_patterns_as_uint16(cp: Any) -> None:
    a = patterns(200, 100, 0.3, 8)
    for dtype in ("fp16", "bf16"):
        w = TiledCSL.from_dense(cp.asarray(a), dtype=dtype)
        assert_same(w, TiledCSL.from_dense(a.view(NUMPY_DTYPE[dtype])))


@pytest.mark.sanitize
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("order", ["bank", "row"])
def test_views_with_any_pitch_and_alignment(cp: Any, itemsize: int, order: str) -> None:
    base = patterns(300, 220, 0.3, 5).view(np.float16) if itemsize == 2 else floats(300, 220, 0.3, 5)
    device = to_cupy(cp, base)
    for rows, columns in (
        (slice(None), slice(1, 201)),
        (slice(3, 290), slice(0, 200)),
        (slice(0, 300, 2), slice(2, 131)),
        (slice(5, 6), slice(7, 8)),
        (slice(None), slice(4, 219)),
    ):
        w = TiledCSL.from_dense(device[rows, columns], order=order)
        assert_same(w, TiledCSL.from_dense(base[rows, columns], order=order))


def test_repeats_give_the_same_bytes(cp: Any) -> None:
    a = to_cupy(cp, patterns(1024, 2048, 0.2, 1).view(np.float16))
    first = TiledCSL.from_dense(a)
    for _ in range(5):
        again = TiledCSL.from_dense(a)
        assert bool((again.words == first.words).all())


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [64, 65, 130])
def test_decode_writes_every_element_and_nothing_else(cp: Any, columns: int) -> None:
    from flashllm.encode.tiled_csl import decode

    a = patterns(150, columns, 0.2, 4)
    a[a & 0x7FFF == 0] = 0
    w = TiledCSL.from_dense(a.view(np.float16)).to_device()
    fence = 64
    buffer = cp.full(2 * fence + a.size, 0x7E55, np.uint16)
    out = buffer[fence:-fence].reshape(a.shape).view(np.float16)
    assert decode(w, out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16).get(), a)
    assert bool((buffer[:fence] == 0x7E55).all())
    assert bool((buffer[-fence:] == 0x7E55).all())


def test_moves_and_files(cp: Any, tmp_path: Path) -> None:
    host = TiledCSL.from_dense(patterns(300, 100, 0.2, 6).view(np.float16))
    device = host.to_device()
    assert_same(device, host)
    assert device.to_device() is device
    np.testing.assert_array_equal(device.to_host().words, host.words)
    device.save(tmp_path / "w")
    np.testing.assert_array_equal(TiledCSL.load(tmp_path / "w").words, host.words)
    assert (device.to_scipy() != host.to_scipy()).nnz == np.isnan(host.to_scipy().data).sum()
    words = device.words.copy()
    stored = np.flatnonzero(host.words[: host.tile_offsets[1] * 4] & 0x7FFF)
    words[stored[1]] = words[stored[0]]
    with pytest.raises(FormatError, match="used once"):
        TiledCSL(
            **{**device.metadata(), "shape": device.shape}, words=words, tile_offsets=device.tile_offsets
        ).validate()


def test_refused_sources(cp: Any) -> None:
    ones = cp.ones((8, 8), np.float16)
    for a, options, argument in (
        (cp.ones(4, np.float16), {}, "a"),
        (cp.ones((0, 4), np.float16), {}, "a"),
        (cp.ones((4, 4), np.float64), {}, "a"),
        (cp.ones((4, 4), np.int32), {}, "a"),
        (ones.T[:, :4], {}, "a"),
        (ones[:, ::2], {}, "a"),
        (ones[::-1], {}, "a"),
        (ones, {"dtype": "bf16"}, "dtype"),
        (ones, {"dtype": "int8"}, "dtype"),
        (ones.view(np.uint16), {}, "dtype"),
        (ones, {"order": "best"}, "order"),
    ):
        with pytest.raises(ArgumentError) as error:
            TiledCSL.from_dense(a, **options)
        assert error.value.argument == argument
    from flashllm.encode.tiled_csl import decode, encode

    with pytest.raises(ArgumentError):
        encode(np.ones((4, 4), np.float16))
    host = TiledCSL.from_dense(np.ones((4, 4), np.float16))
    with pytest.raises(ArgumentError):
        decode(host)
    for out in (np.empty((4, 4), np.float16), cp.empty((4, 5), np.float16), cp.empty((4, 4), np.float32)):
        with pytest.raises(ArgumentError):
            decode(host.to_device(), out=out)


def test_memory_beside_the_result(cp: Any) -> None:
    a = cp.zeros((4096, 4096), np.float32)
    a[::5] = 1
    TiledCSL.from_dense(a)
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        w = TiledCSL.from_dense(a)
        assert pool.total_bytes() <= w.nbytes + (a.nbytes + w.nbytes) // 4


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
    w = TiledCSL.from_dense(a)
    w.validate()
    assert w.nnz == len(set(zip(row.tolist(), column.tolist(), strict=True)))
    back = w.to_dense()
    for start in range(0, shape[0], 8192):
        assert bool((back[start : start + 8192] == a[start : start + 8192]).all())


@pytest.mark.slow
def test_speed(cp: Any) -> None:
    """At least 2 G elements/s, a tenth of what any supported GPU should reach."""
    a = cp.zeros((28672, 8192), np.float16)
    a.ravel()[::5] = 1
    TiledCSL.from_dense(a)
    start, end = cp.cuda.Event(), cp.cuda.Event()
    times = []
    for _ in range(5):
        start.record()
        w = TiledCSL.from_dense(a)
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    rate = a.size / min(times) / 1e6
    print(f"encode {a.shape}: {min(times):.2f} ms, {rate:.1f} G elements/s, {w.nbytes / 1e6:.0f} MB")
    assert rate > 2
