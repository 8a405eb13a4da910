# SPDX-License-Identifier: Apache-2.0
"""The device encoders and the decoder, run on the CPU: the same bytes as NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import TiledCSL
from flashllm.backends import emulator
from flashllm.encode import tiled_csl as encoder
from flashllm.encode.source import BITS16, ROUNDING
from flashllm.formats.base import RoundingReport
from flashllm.jit.spec import KernelSpec
from products import NUMPY_DTYPE
from weight_cases import PATTERNS, bits, pruned

SPECS = {(spec.name, tuple(text for _, text in spec.template)): spec for spec in encoder.specs()}
SHAPES = ((1, 1), (128, 64), (127, 65), (130, 131), (300, 203))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    emulator.preload(encoder.specs())


def kernel(name: str, *template: str) -> KernelSpec:
    return SPECS[name, template]


def encode(
    a: NDArray[Any], dtype: str, order: str, *, seed: int = 0, sanitize: bool = False
) -> tuple[TiledCSL, NDArray[np.uint64]]:
    """Encode as flashllm.encode does on a GPU; also returns what the rounding did."""
    source = ROUNDING[dtype] if a.dtype == np.float32 else BITS16
    rows, columns = a.shape
    grid_m, grid_k = -(-rows // 128), -(-columns // 64)
    tiles = grid_m * grid_k
    pitch = a.strides[0] // a.itemsize if rows > 1 else columns
    pairs = columns % 2 == 0 and pitch % 2 == 0 and a.ctypes.data % (2 * a.itemsize) == 0
    matrix = (a, np.int64(rows), np.int64(columns), np.int64(pitch), np.int32(grid_k), np.int32(pairs))
    counts, rounding = np.full(tiles, -1, np.int32), np.zeros(4, np.uint64)
    emulator.launch(
        kernel("tiled_csl_count", source), (tiles,), (*matrix, counts, rounding), seed=seed, sanitize=sanitize
    )
    vectors = (counts + 3) // 4
    offsets = np.zeros(tiles + 2, np.int32)
    offsets[1:-1] = np.cumsum(vectors)
    offsets[-1] = offsets[-2]
    words = np.full(int(offsets[-1]) * 4, 0xDEADBEEF, np.uint32)
    if words.size:
        fill = kernel("tiled_csl_fill", source, "true" if order == "bank" else "false")
        emulator.launch(fill, (tiles,), (*matrix, offsets, words), seed=seed, sanitize=sanitize)
    packed = TiledCSL(
        shape=a.shape,
        dtype=dtype,
        nnz=int(counts.sum()),
        words=words,
        tile_offsets=offsets,
        order=order,
        max_tile_words=int(vectors.max()) * 4,
    )
    return packed, rounding


def decode(w: TiledCSL, seed: int = 0, *, sanitize: bool = False) -> NDArray[np.uint16]:
    rows, columns = w.shape
    out = np.full((rows, columns), 0x7E5A, np.uint16)
    pairs = columns % 2 == 0 and out.ctypes.data % 4 == 0
    size = (np.int64(rows), np.int64(columns), np.int32(w.tiles[1]), np.int32(pairs))
    emulator.launch(
        kernel("tiled_csl_decode"),
        (w.tiles[0] * w.tiles[1],),
        (w.words, w.tile_offsets, *size, out),
        seed=seed,
        sanitize=sanitize,
    )
    return out


def assert_same(got: TiledCSL, want: TiledCSL) -> None:
    np.testing.assert_array_equal(got.tile_offsets, want.tile_offsets)
    np.testing.assert_array_equal(got.words, want.words)
    assert (got.nnz, got.max_tile_words) == (want.nnz, want.max_tile_words)


@pytest.mark.parametrize("order", ["bank", "row"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bytes_for_every_pattern(pattern: str, order: str) -> None:
    for seed, (shape, density) in enumerate(zip(SHAPES, (1.0, 0.3, 0.02, 0.9, 0.2), strict=True)):
        patterns = bits(pattern, *shape, density, seed)
        for dtype in ("fp16", "bf16"):
            want = TiledCSL.from_dense(patterns.view(NUMPY_DTYPE[dtype]), order=order)
            got, _ = encode(patterns, dtype, order, seed=seed)
            assert_same(got, want)
        np.testing.assert_array_equal(decode(want, seed), pruned(patterns))


@pytest.mark.parametrize("order", ["bank", "row"])
def test_counts_around_the_vector_and_group_sizes(order: str) -> None:
    for keep in (0, 1, 3, 4, 5, 127, 128, 129, 4095, 4096, 4097, 8189, 8191, 8192):
        flat = np.zeros(8192, np.uint16)
        flat[np.random.default_rng(keep).permutation(8192)[:keep]] = 0x3C00
        a = flat.reshape(128, 64)
        assert_same(encode(a, "fp16", order, seed=keep)[0], TiledCSL.from_dense(a.view(np.float16), order=order))


@pytest.mark.parametrize("order", ["bank", "row"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(dtype: str, order: str) -> None:
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
        want = TiledCSL.from_dense(a, dtype=dtype, order=order, report=reports.append)
    got, rounding = encode(a, dtype, order, seed=1)
    assert_same(got, want)
    report = reports[0]
    assert rounding.tolist() == [report.total, report.changed, report.became_zero, report.became_infinite]
