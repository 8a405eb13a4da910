# SPDX-License-Identifier: Apache-2.0
"""The GPU's bitmap encoder and decoder, run on the CPU: the same bytes as NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.encode import bitmap as encoder
from flashllm.encode.bitmap import run_arguments
from flashllm.encode.source import BITS16, ROUNDING
from flashllm.formats.base import RoundingReport
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import (
    GROUP,
    OWN_COLUMNS,
    PLACE_TILES,
    Position,
    _advance,
    chunks_for,
    encode_strips,
    places_at,
    unpack_masks,
)
from flashllm.formats.runs import runs_of
from flashllm.formats.tiles import tile_grid
from flashllm.jit.spec import KernelSpec
from products import NUMPY_DTYPE
from weight_cases import PATTERNS, bits, pruned

SPECS = {(spec.name, tuple(text for _, text in spec.template)): spec for spec in encoder.specs()}
SHAPES = ((1, 1), (128, 64), (127, 65), (130, 131), (300, 203), (9, 1000))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    emulator.preload(encoder.specs())


def kernel(name: str, *template: str) -> KernelSpec:
    return SPECS[f"bitmap_{name}", template]


def join_runs(
    lags: NDArray[np.uint8], fronts: NDArray[np.int32], places: NDArray[np.uint16], shape: tuple[int, int], **run: Any
) -> None:
    """Make the lags of the streams of ``lags``, which holds their counts, and fill ``fronts`` and ``places``."""
    tiles_m, tiles_k = tile_grid(shape)
    runs = (np.int32(tiles_m), np.int32(tiles_k), *run_arguments(shape))
    lengths = np.full(int(runs[2]), -1, np.int32)
    emulator.launch(kernel("place"), lengths.shape, (lags, fronts, lengths, places, *runs), **run)
    lengths.flags.writeable = False
    emulator.launch(kernel("join"), lengths.shape, (lengths, fronts, *runs), **run)


def encode(
    a: NDArray[Any],
    dtype: str,
    *,
    shape: tuple[int, int] | None = None,
    group_values: int = GROUP,
    seed: int = 0,
    sanitize: bool = False,
) -> tuple[Bitmap, NDArray[np.uint64]]:
    """Encode as flashllm.encode does on a GPU; also returns what the rounding did.

    ``shape``: of the matrix that ``a`` begins with.
    """
    source = ROUNDING[dtype] if a.dtype == np.float32 else BITS16
    rows, columns = shape or a.shape
    tiles_m, tiles_k = tile_grid((rows, columns))
    tiles = tiles_m * tiles_k
    matrix, size = (a, np.int64(a.shape[1])), (np.int32(rows), np.int32(columns))
    run: dict[str, Any] = {"seed": seed, "sanitize": sanitize}
    lags, totals = np.full((tiles, 4, 64), 0xEE, np.uint8), np.zeros(5, np.uint64)
    emulator.launch(kernel("count", source), (tiles,), (*matrix, lags, totals, *size), **run)
    fronts = np.full(tiles + 1, -1, np.int32)
    places = np.full((-(-tiles // 8), 4, 64), 0xEEEE, np.uint16)
    join_runs(lags, fronts, places, (rows, columns), **run)
    values = np.zeros((chunks_for(int(fronts[-1])), 4, 16, 32, 2), np.uint16)
    masks = np.full((tiles, 4, 32, 2), 0xDEADBEEF, np.uint32)
    lags.flags.writeable = fronts.flags.writeable = places.flags.writeable = False
    write = kernel("write", source, str(group_values))
    written = (lags, fronts, masks, values, places, *size, *run_arguments((rows, columns)))
    emulator.launch(write, (tiles,), (*matrix, *written), **run)
    packed = Bitmap(
        shape=(rows, columns),
        dtype=dtype,
        nnz=int(totals[0]),
        masks=masks,
        values=values,
        fronts=fronts,
        places=places,
    )
    return packed, totals[1:]


def decode(w: Bitmap, seed: int = 0, *, sanitize: bool = False, offset: int = 0) -> NDArray[np.uint16]:
    return run_decoder(encoder.decode_arguments, w, seed=seed, sanitize=sanitize, offset=offset)


def run_decoder(arguments_of: Any, w: Any, *, seed: int, sanitize: bool, offset: int) -> NDArray[np.uint16]:
    """What the decoder writes into noise, ``offset`` bytes past a multiple of 16; it must write nothing else."""
    fence, size = 1024, w.shape[0] * w.shape[1]
    buffer = np.full(2 * fence + size + 8, 0x7E5A, np.uint16)
    first = fence + (offset - buffer.ctypes.data) % 16 // 2
    out = buffer[first : first + size].reshape(w.shape)
    assert out.ctypes.data % 16 == offset
    spec, grid, arguments = arguments_of(w, out)
    emulator.launch(spec, grid, arguments, seed=seed, sanitize=sanitize)
    assert (buffer[:first] == 0x7E5A).all()
    assert (buffer[first + size :] == 0x7E5A).all()
    return out


def assert_same(got: Bitmap, want: Bitmap) -> None:
    for name, array in want.arrays().items():
        np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)
    assert got.metadata() == want.metadata()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bytes_for_every_pattern(pattern: str) -> None:
    for seed, (shape, density) in enumerate(zip(SHAPES, (1.0, 0.3, 0.02, 0.9, 0.2, 0.6), strict=True)):
        patterns = bits(pattern, *shape, density, seed)
        for dtype in ("fp16", "bf16"):
            want = Bitmap.from_dense(patterns.view(NUMPY_DTYPE[dtype]))
            got, _ = encode(patterns, dtype, seed=seed)
            assert_same(got, want)
        np.testing.assert_array_equal(decode(want, seed), pruned(patterns))


@pytest.mark.parametrize("tiles", [*range(1, 18), 40])
def test_same_bytes_for_any_number_of_tiles(tiles: int) -> None:
    """The walk over the tiles takes eight at a time; places of every eighth are stored."""
    patterns = bits("skewed", 130, 64 * tiles - 3, 0.5, tiles)
    want = Bitmap.from_dense(patterns.view(np.float16))
    assert_same(encode(patterns, "fp16", seed=tiles)[0], want)
    np.testing.assert_array_equal(decode(want, tiles), pruned(patterns))


@pytest.mark.parametrize(("shape", "runs"), [((130, 64 * 12), 3), ((500, 64 * 9), 4), ((300, 64 * 40), 15)], ids=str)
def test_same_bytes_for_several_runs(shape: tuple[int, int], runs: int) -> None:
    """Runs of different lengths, with streams that end at different rows where the next run begins."""
    patterns = bits("uniform", *shape, 0.5, runs)
    kept = np.linspace(0, 1, patterns.size).reshape(shape) ** 2  # nothing in the first elements, all in the last
    patterns[np.random.default_rng(runs).random(shape) > kept] = 0
    want = Bitmap.from_dense(patterns.view(np.float16))
    begins = runs_of(want.tiles).first_tiles()
    lengths = np.diff(want.fronts[[*begins, -1]])
    assert len(begins) == runs
    assert lengths.max() > 2 * lengths.min() > 0
    assert_same(encode(patterns, "fp16", seed=runs)[0], want)
    np.testing.assert_array_equal(decode(want, runs), pruned(patterns))


@pytest.mark.parametrize("shape", [(1, 1), (128, 64 * 15), (300, 64 * 7)], ids=str)
def test_empty_matrix(shape: tuple[int, int]) -> None:
    """Zeros of either sign: no run has a row and no mask has a bit. One run, and two."""
    patterns = np.where(np.indices(shape).sum(axis=0) % 2, 0x8000, 0).astype(np.uint16)
    want = Bitmap.from_dense(patterns.view(np.float16))
    assert want.nnz == 0
    assert not want.fronts.any()
    assert_same(encode(patterns, "fp16", seed=1)[0], want)
    assert not decode(want).any()


@pytest.mark.parametrize(("grid", "runs"), [((61, 52), 396), ((56, 57), 392), ((1, 3168), 396), ((3, 5), 1)], ids=str)
def test_streams_of_as_many_runs_as_there_can_be(grid: tuple[int, int], runs: int) -> None:
    """Lags and fronts from counts alone, more runs than a warp has lanes: against the walk of the NumPy encoder."""
    tiles = grid[0] * grid[1]
    rng = np.random.default_rng(runs)
    counts = rng.binomial(32, rng.random((tiles, 1, 1)) ** 2, (tiles, 4, 64))
    of_format = runs_of(grid)
    assert of_format.count == runs
    want = np.zeros(tiles + 1, np.int64)
    position, walked = Position.at_front(0), []
    for first in range(0, tiles, grid[1]):  # by rows of tiles, as matrices come
        row = slice(first, first + grid[1])
        fronts = want[first : first + grid[1] + 1]
        walked.append(_advance(counts[row], position, fronts, first, of_format.first_tiles()))
    starts, columns, padding = map(np.concatenate, zip(*walked, strict=True))
    assert padding.any()
    lags, fronts = counts.astype(np.uint8), np.full(tiles + 1, -1, np.int32)
    places = np.full((-(-tiles // 8), 4, 64), 0xEEEE, np.uint16)
    join_runs(lags, fronts, places, (grid[0] * 128, grid[1] * 64), seed=runs)
    np.testing.assert_array_equal(fronts, want)
    np.testing.assert_array_equal(lags, want[:-1, None, None] - starts)
    wanted = places_at(np.arange(tiles), want[:-1], starts, columns, OWN_COLUMNS, of_format.first_tiles())
    np.testing.assert_array_equal(places, wanted.pack())


def test_zeros_that_let_streams_catch_up() -> None:
    """All streams except one catch up, at places that may hold -0.0."""
    patterns = np.full((128, 64 * 11), 0x8000, np.uint16)
    patterns[37, 1::16] = 0x3C00
    want = Bitmap.from_dense(patterns.view(np.float16))
    assert want.fronts[-1] == 32
    for seed in range(4):
        assert_same(encode(patterns, "fp16", seed=seed)[0], want)
    np.testing.assert_array_equal(decode(want), pruned(patterns))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_zeros_go_only_into_groups_that_have_room(density: float) -> None:
    """No group has more than two values, even with zeros; one stream has two in every group, so others catch up."""
    rng = np.random.default_rng(int(density * 10))
    for shape in ((128, 64 * 11), (130, 64 * 9 + 5), (9, 700)):
        row, column = np.indices(shape)
        upper, odd = row % 16 < 8, column % 2 == 1
        which = rng.integers(0, 2, shape)[row - row % 16 + row % 8 if shape[0] > 16 else row % 8, column - column % 2]
        patterns = rng.integers(1, 1 << 15, shape).astype(np.uint16)
        patterns[np.where(which, upper, odd) | (rng.random(shape) > density)] = 0x8000
        patterns[5] = np.where(np.arange(shape[1]) % 8 < 2, 0x3C00, 0)
        patterns[13 : min(14, shape[0])] = 0x8000
        strips = (patterns[first : first + 128] for first in range(0, shape[0], 128))
        want = encode_strips(strips, shape, group_values=2)
        got, _ = encode(patterns, "fp16", group_values=2, seed=shape[0])
        for name in Bitmap.BUFFERS:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        kept = unpack_masks(want.masks)
        assert kept.sum() > want.nnz
        assert kept.reshape(-1, GROUP).sum(axis=1).max() == 2
        np.testing.assert_array_equal(decode(got), pruned(patterns))


def test_rows_of_a_wider_matrix() -> None:
    """The pitch is not the number of columns: what lies outside the matrix is neither read nor stored."""
    whole = bits("uniform", 140, 210, 0.4, 5)
    for shape in ((140, 200), (140, 64), (129, 1), (1, 130)):
        part = np.ascontiguousarray(whole[: shape[0], : shape[1]])
        assert_same(encode(whole, "fp16", shape=shape, seed=3)[0], Bitmap.from_dense(part.view(np.float16)))
    floats = np.full((130, 70), np.nan, np.float32)
    floats[:, :66] = whole[:130, :66] % 7
    want = Bitmap.from_dense(floats[:, :66].astype(np.float16))
    assert_same(encode(floats, "fp16", shape=(130, 66))[0], want)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(dtype: str) -> None:
    rng = np.random.default_rng(2)
    patterns = rng.integers(0, 1 << 32, (140, 130), dtype=np.uint64).astype(np.uint32)
    edges = [0x33000000, 0x33000001, 0x38800000, 0x387FFFFF, 0x477FF000, 0x477FEFFF, 0x7F800000, 0xFF800001, 0x80000000]
    patterns[: len(edges), 0] = edges
    patterns[40:90][rng.random((50, 130)) < 0.7] = 0
    near = rng.random(patterns.shape) < 0.5  # half of them within or near the range of fp16
    patterns[near] = patterns[near] & 0x80FFFFFF | rng.integers(0x32, 0x49, near.sum(), dtype=np.uint32) << 24
    a = patterns.view(np.float32)
    reports: list[RoundingReport] = []
    with np.errstate(all="ignore"):
        want = Bitmap.from_dense(a, dtype=dtype, report=reports.append)
    got, rounding = encode(a, dtype, seed=1)
    assert_same(got, want)
    report = reports[0]
    assert rounding.tolist() == [report.total, report.changed, report.became_zero, report.became_infinite]


@pytest.mark.parametrize(
    ("shape", "offset"), [((150, 200), 0), ((150, 200), 2), ((129, 72), 0), ((130, 65), 0)], ids=str
)
def test_decodes_in_vectors_and_without(shape: tuple[int, int], offset: int) -> None:
    """Rows that are whole vectors, end inside a tile, or start at any address; the last group has few tiles."""
    patterns = bits("uniform", *shape, 0.4, shape[1])
    want = Bitmap.from_dense(patterns.view(np.float16))
    np.testing.assert_array_equal(decode(want, offset, offset=offset), pruned(patterns))


@pytest.mark.parametrize(
    ("pattern", "density"), [("lagging", 0.4), ("empty-tiles", 0.5), ("block", 0.3), ("full", 1.0)]
)
def test_decodes_groups_of_tiles_that_runs_begin_in(pattern: str, density: float) -> None:
    """Streams that lag by 31 rows, tiles without a value and full ones, two rows of tiles in a group."""
    patterns = bits(pattern, 380, 64 * 12 - 8, density, 2)
    want = Bitmap.from_dense(patterns.view(np.float16))
    begins = runs_of(want.tiles).first_tiles()
    assert any(first % PLACE_TILES for first in begins)
    np.testing.assert_array_equal(decode(want, 3), pruned(patterns))
