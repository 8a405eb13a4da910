# SPDX-License-Identifier: Apache-2.0
"""The device encoder of slot24 gives the bytes of the NumPy encoder; the device decoder undoes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_encode_tiled_csl import floats, patterns, to_cupy

from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import RoundingReport
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_pairs import WINDOWS
from products import NUMPY_DTYPE
from weight_cases import PATTERNS, bits, pruned

both_parts = pytest.mark.parametrize("part_rows", [32, 64])
both_groups = pytest.mark.parametrize("group_values", [2, 4])
SHAPES = [(1, 1), (1, 270), (70, 1), (128, 256), (129, 257), (256, 128), (130, 63), (300, 502), (64, 1007), (512, 1030)]


def assert_same(device: Slot24, host: Slot24) -> None:
    assert device.is_device
    assert device.metadata() == host.metadata()
    for name, array in host.arrays().items():
        found = getattr(device, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found.get(), array, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("part_rows", [None, 32, 64])
def test_same_bytes_as_on_the_host(cp: Any, shape: tuple[int, int], dtype: str, part_rows: int | None) -> None:
    for seed, density in enumerate((0.0, 0.001, 0.02, 0.1, 0.2, 0.25, 0.3, 0.5, 0.97, 1.0)):
        a = patterns(*shape, density, seed).view(NUMPY_DTYPE[dtype])
        w = Slot24.from_dense(to_cupy(cp, a), part_rows=part_rows)
        assert_same(w, Slot24.from_dense(a, part_rows=part_rows))
        w.validate()
        back = w.to_dense()
        assert back.dtype == a.dtype
        np.testing.assert_array_equal(back.view(np.uint16).get(), pruned(a))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(260, 600), (100, 64 * 33), (1500, 300)], ids=str)
@both_parts
def test_same_bytes_for_every_pattern(cp: Any, pattern: str, shape: tuple[int, int], part_rows: int) -> None:
    for seed, density in enumerate((0.05, 0.2, 0.27, 0.7)):
        a = bits(pattern, *shape, density, seed).view(np.float16)
        w = Slot24.from_dense(to_cupy(cp, a), part_rows=part_rows)
        assert_same(w, Slot24.from_dense(a, part_rows=part_rows))
        np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(a))


@pytest.mark.sanitize
@pytest.mark.parametrize("window", range(128, 257, 8))
@both_parts
def test_same_bytes_for_every_window(cp: Any, window: int, part_rows: int) -> None:
    for columns in (2 * window + 1, window):
        a = patterns(130, columns, 0.08, window).view(np.float16)
        w = Slot24.from_dense(to_cupy(cp, a), window=window, part_rows=part_rows)
        assert_same(w, Slot24.from_dense(a, window=window, part_rows=part_rows))
        np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(a))


@both_parts
def test_same_bytes_with_two_values_in_a_group(cp: Any, part_rows: int) -> None:
    """Many problems, of which some need several attempts, in windows of every size; and some that none solves."""
    found = 0
    for seed, density in enumerate((0.02, 0.08, 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.18, 0.2, 0.25)):
        for window in (256, 248, 232, 200, 128):
            a = patterns(256, 3 * window + 9, density, seed).view(np.float16)
            options: dict[str, Any] = {"window": window, "part_rows": part_rows, "group_values": 2}
            try:
                want = Slot24.from_dense(a, **options)
            except ArgumentError:
                with pytest.raises(ArgumentError, match="window"):
                    Slot24.from_dense(to_cupy(cp, a), **options)
                continue
            w = Slot24.from_dense(to_cupy(cp, a), **options)
            assert_same(w, want)
            np.testing.assert_array_equal(w.to_dense().view(np.uint16).get(), pruned(a))
            found += 1
    assert 10 < found < 60


@both_parts
def test_same_bytes_where_greedy_pairs_must_change(cp: Any, part_rows: int) -> None:
    """Many problems at densities at which lefts find no partner at first, and at which windows are too large."""
    windows = set()
    for seed, density in enumerate((0.19, 0.2, 0.21, 0.22, 0.23, 0.24, 0.25, 0.26, 0.27, 0.28, 0.29, 0.3, 0.32, 0.34)):
        a = patterns(256, 4096, density * (1 if part_rows == 32 else 0.75), seed).view(np.float16)
        w = Slot24.from_dense(to_cupy(cp, a), part_rows=part_rows, group_values=4)
        assert_same(w, Slot24.from_dense(a, part_rows=part_rows, group_values=4))
        windows.add(w.window)
    assert len(windows) > 6


@pytest.mark.parametrize("shape", [(128, 256), (300, 503), (1, 1), (140, 600)], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(cp: Any, shape: tuple[int, int], dtype: str) -> None:
    for seed, density in enumerate((0.0, 0.2, 1.0)):
        a = floats(*shape, density, seed)
        reports: list[RoundingReport] = []
        w = Slot24.from_dense(cp.asarray(a), dtype=dtype, report=reports.append)
        with np.errstate(all="ignore"):
            want = Slot24.from_dense(a, dtype=dtype, report=reports.append)
        assert_same(w, want)
        assert reports[0] == reports[1]


def test_bit_patterns_and_the_report_of_a_source_that_fits(cp: Any) -> None:
    a = patterns(200, 400, 0.2, 8)
    for dtype in ("fp16", "bf16"):
        reports: list[RoundingReport] = []
        w = Slot24.from_dense(cp.asarray(a), dtype=dtype, report=reports.append)
        assert_same(w, Slot24.from_dense(a.view(NUMPY_DTYPE[dtype])))
        assert reports == [RoundingReport(total=w.nnz, changed=0, became_zero=0, became_infinite=0)]


@pytest.mark.sanitize
@pytest.mark.parametrize("itemsize", [2, 4])
def test_views_with_any_pitch_and_alignment(cp: Any, itemsize: int) -> None:
    base = patterns(300, 420, 0.2, 5).view(np.float16) if itemsize == 2 else floats(300, 420, 0.2, 5)
    device = to_cupy(cp, base)
    for rows, columns in (
        (slice(None), slice(1, 401)),
        (slice(3, 290), slice(0, 400)),
        (slice(0, 300, 2), slice(2, 331)),
        (slice(5, 6), slice(7, 8)),
        (slice(None), slice(4, 219)),
    ):
        with np.errstate(all="ignore"):
            assert_same(Slot24.from_dense(device[rows, columns]), Slot24.from_dense(base[rows, columns]))


def test_repeats_give_the_same_bytes(cp: Any) -> None:
    a = to_cupy(cp, patterns(1024, 2048, 0.22, 1).view(np.float16))
    first = Slot24.from_dense(a)
    for _ in range(5):
        again = Slot24.from_dense(a)
        assert again.window == first.window
        assert all(bool((getattr(again, name) == array).all()) for name, array in first.arrays().items())


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [64, 257, 530])
@both_parts
@both_groups
def test_decode_writes_every_element_and_nothing_else(cp: Any, columns: int, part_rows: int, group_values: int) -> None:
    from flashllm.encode.slot24 import decode

    a = patterns(150, columns, 0.2 if group_values == 4 else 0.08, 4)
    a[a & 0x7FFF == 0] = 0
    w = Slot24.from_dense(a.view(np.float16), part_rows=part_rows, group_values=group_values).to_device()
    fence = 64
    buffer = cp.full(2 * fence + a.size, 0x7E55, np.uint16)
    out = buffer[fence:-fence].reshape(a.shape).view(np.float16)
    assert decode(w, out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16).get(), a)
    assert bool((buffer[:fence] == 0x7E55).all())
    assert bool((buffer[-fence:] == 0x7E55).all())


def test_moves(cp: Any) -> None:
    host = Slot24.from_dense(patterns(300, 600, 0.2, 6).view(np.float16))
    device = host.to_device()
    assert_same(device, host)
    assert device.to_device() is device
    np.testing.assert_array_equal(device.to_host().columns, host.columns)
    assert (device.to_scipy() != host.to_scipy()).nnz == np.isnan(host.to_scipy().data).sum()
    columns = device.columns.copy()
    columns[0, 1, 2, 3] ^= 1
    with pytest.raises(FormatError, match="columns"):
        device.with_arrays({**device.arrays(), "columns": columns}).validate()


def test_refused_sources(cp: Any) -> None:
    from flashllm.encode.slot24 import decode, encode

    ones = cp.ones((8, 200), np.float16)
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
        (ones, {"window": 130}, "window"),
        (ones, {"group_values": 3}, "group_values"),
        (cp.ones((16, 200), np.float16), {"group_values": 2}, "group_values"),
        *((ones, {"window": window}, "window") for window in WINDOWS[:-1]),
    ):
        with pytest.raises(ArgumentError) as error:
            Slot24.from_dense(a, **options)
        assert error.value.argument == argument
    assert Slot24.from_dense(ones, window=128).window == 128
    with pytest.raises(ArgumentError):
        encode(np.ones((4, 4), np.float16))
    host = Slot24.from_dense(np.ones((4, 4), np.float16))
    with pytest.raises(ArgumentError):
        decode(host)
    for out in (np.empty((4, 4), np.float16), cp.empty((4, 5), np.float16), cp.empty((4, 4), np.float32)):
        with pytest.raises(ArgumentError):
            decode(host.to_device(), out=out)


def test_memory_beside_the_result(cp: Any) -> None:
    """The matrix of slots, the masks of the columns, and 260 bytes for each tile of slots."""
    a = cp.zeros((4096, 4096), np.float32)
    a[::5, ::7] = 1
    Slot24.from_dense(a, part_rows=32)
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        w = Slot24.from_dense(a, part_rows=32)
        assert w.window == 256
        assert pool.total_bytes() <= w.nbytes + a.size + a.size // 8 + 1024 * 260 + (1 << 16)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(cp: Any) -> None:
    shape = (65536 + 5, 32768 + 2)
    if cp.cuda.runtime.memGetInfo()[0] < 4 * shape[0] * shape[1] * 2:
        pytest.skip("needs 17 GB of device memory")
    a = cp.zeros(shape, np.float16)
    rng = np.random.default_rng(0)
    row, column = rng.integers(0, shape[0], 100_000), rng.integers(0, shape[1], 100_000)
    row[:4], column[:4] = [0, 0, shape[0] - 1, shape[0] - 1], [0, shape[1] - 1, 0, shape[1] - 1]
    a[cp.asarray(row), cp.asarray(column)] = 2
    w = Slot24.from_dense(a)
    assert w.nnz == len(set(zip(row.tolist(), column.tolist(), strict=True)))
    back = w.to_dense()
    for start in range(0, shape[0], 8192):
        assert bool((back[start : start + 8192] == a[start : start + 8192]).all())


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.5])
def test_speed(cp: Any, density: float) -> None:
    """Under 50 ms, ten times what is expected of an H100."""
    a = (cp.random.default_rng(0).random((28672, 8192), dtype=np.float32) < density).astype(np.float16)
    Slot24.from_dense(a)
    start, end = cp.cuda.Event(), cp.cuda.Event()
    times = []
    for _ in range(5):
        start.record()
        w = Slot24.from_dense(a)
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    pairing = f"window {w.window} for {w.part_rows} rows, {w.group_values} values in a group"
    print(f"encode {a.shape} at {density}: {min(times):.2f} ms, {pairing}, {w.nbytes / 1e6:.0f} MB")
    assert min(times) < 50
