# SPDX-License-Identifier: Apache-2.0
"""What only the bitmap kernel has to get right: its ring of value rows, places of streams, runs that start anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.formats import runs
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import CHUNK_ROWS, SLACK, Places
from flashllm.formats.runs import runs_of
from flashllm.matmul.bitmap import RING_ROWS
from products import assert_exact, exact, integers, weight

pytestmark = pytest.mark.usefixtures("kernels")
every_arch = pytest.mark.parametrize("arch", ["80", "90a", "120a"])


def check(w: NDArray[Any], n: int, arch: str, seed: int = 0, **split: int) -> emulator.Counts:
    """The product is exact; ``split``: blocks and row_cost."""
    dtype = "fp16" if w.dtype == np.float16 else "bf16"
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), dtype)
    got, counts = emulator.spmm(x, Bitmap.from_dense(w), arch=arch, seed=seed, **split)
    assert_exact(got, exact(x, w, dtype))
    return counts


@every_arch
@pytest.mark.parametrize("pattern", ["uniform", "full", "skewed", "column", "even-columns", "block"])
def test_exact_while_the_ring_turns(pattern: str, arch: str) -> None:
    """Rows of tiles whose values go through the ring many times over, in one run and in several."""
    for seed, (tiles, n, blocks) in enumerate(((40, 9, 1), (33, 24, 2), (26, 40, 3))):
        w = weight(pattern, (130, 64 * tiles - 5), 0.6, "fp16", seed)
        assert Bitmap.from_dense(w).fronts[-1] > 3.5 * RING_ROWS[16]
        check(w, n, arch, seed=seed, blocks=blocks)


@every_arch
@pytest.mark.parametrize("pattern", ["uniform", "skewed", "column", "empty-tiles"])
def test_exact_for_runs_that_start_at_any_tile(pattern: str, arch: str) -> None:
    """At any number of tiles after places were last stored, with streams that lag by anything up to the slack."""
    tiles = 19
    for seed, (density, blocks) in enumerate(((0.5, tiles), (0.3, 2 * tiles), (0.9, 11), (0.1, 7))):
        w = weight(pattern, (256, 64 * tiles), density, "bf16", seed)
        sparse = Bitmap.from_dense(w)
        assert np.unique(Places.unpack(sparse.places[1:]).lags).size > 10
        check(w, 8 if seed % 2 else 34, arch, seed=seed, blocks=blocks)


@every_arch
@pytest.mark.parametrize("lane", [0, 13, 31])
def test_exact_where_one_stream_leads_all_others(lane: int, arch: str) -> None:
    """All lag by the whole slack, and all their values are zeros that let them catch up."""
    w = np.zeros((128, 64 * 20), np.float16)
    w[16 * (lane % 4) + lane // 4, lane % 4 * 2 + 1 :: 16] = 3
    sparse = Bitmap.from_dense(w)
    assert (Places.unpack(sparse.places[1]).lags == SLACK).sum() == 255
    for seed, blocks in enumerate((1, 3, 20)):
        check(w, 9 + 24 * seed, arch, seed=seed, blocks=blocks)


@every_arch
@pytest.mark.parametrize("columns", [64 * 120, 64 * 120 - 1])
def test_exact_where_all_streams_but_one_lag_with_values(
    columns: int, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a slow stream needs is all there is between a row and the one that takes its place."""
    monkeypatch.setattr(runs, "RUNS", 1)  # otherwise no stream would lag where places are stored
    for seed, (density, n, blocks) in enumerate(((0.5, 8, 1), (0.9, 16, 3), (0.25, 33, 1), (0.7, 9, 60))):
        w = weight("lagging", (128, columns), density, "fp16", seed)
        sparse = Bitmap.from_dense(w)
        assert all((lags == SLACK).sum() == 255 for lags in Places.unpack(sparse.places[1:]).lags)
        if columns % 64 == 0:
            assert sparse.nnz == np.count_nonzero(w)
        assert len(set(sparse.fronts % CHUNK_ROWS)) == CHUNK_ROWS
        check(w, n, arch, seed=seed, blocks=blocks)


@every_arch
def test_exact_for_few_values_in_many_tiles(arch: str) -> None:
    for seed, density in enumerate((0.0003, 0.003, 0.0)):
        w = weight("uniform", (300, 64 * 21 + 7), density, "fp16", seed)
        check(w, 5, arch, seed=seed)
        check(w, 37, arch, seed=seed, blocks=16, row_cost=seed)


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_exact_wherever_the_last_row_lies_in_its_chunk(arch: str) -> None:
    """The values end anywhere in their last chunk, whose next row is requested as well."""
    for last in range(14, 50):
        w = np.zeros((128, 64 * 2), np.float16)
        columns = [64 * tile + 16 * step for tile in (0, 1) for step in range(4)]
        stream = [(row, column + e) for column in columns for row in (0, 8, 64, 72) for e in (0, 1)]
        w[tuple(np.transpose(stream[:last]))] = np.resize([1, 2, 3], last)
        assert Bitmap.from_dense(w).fronts[-1] == last
        check(w, 8, arch, seed=last, blocks=1 + last % 2)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("n", [65, 70, 129, 200])
def test_exact_for_several_column_blocks(n: int, arch: str) -> None:
    for seed, blocks in enumerate((1, 5)):
        check(weight("uniform", (200, 456), 0.4, "fp16", seed), n, arch, seed=seed, blocks=blocks)
        check(weight("skewed", (130, 203), 0.5, "bf16", seed), n, arch, seed=seed, blocks=blocks)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_exact_for_dense_rows_of_several_chains(dtype: str, arch: str) -> None:
    """More tiles than one chain has, at a density at which the ring is always full."""
    w = weight("uniform", (128, 64 * 199), 0.5, dtype)
    for seed, blocks in enumerate((1, 2)):
        check(w, 8, arch, seed=seed, blocks=blocks)


@every_arch
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_value_read_ahead_is_not_used(dtype: str, arch: str) -> None:
    """Lanes without a value still load the next one of their stream: a NaN or infinity of a later tile."""
    w = weight("uniform", (256, 64 * 12), 0.4, dtype)
    w[128:][w[128:] != 0] = np.nan
    w[200:][w[200:] != 0] = np.inf
    x = integers(np.random.default_rng(1), (9, w.shape[1]), dtype)
    for seed, blocks in enumerate((1, 5, 24)):
        got, _ = emulator.spmm(x, Bitmap.from_dense(w), arch=arch, seed=seed, blocks=blocks)
        assert_exact(np.ascontiguousarray(got[:, :128]), exact(x, w[:128], dtype))
        assert not np.isfinite(got[:, 128:].astype(np.float32)).any()


def copied_bytes(sparse: Bitmap, first: int, end: int) -> int:
    """Bytes of masks and values that a block with tiles ``first`` to ``end`` loads; at a run's start none before it."""
    begins = first in runs_of(sparse.tiles).first_tiles()
    front = max(int(sparse.fronts[first]) - (0 if begins else SLACK), 0)
    chunks = (int(sparse.fronts[end]) + 1) // CHUNK_ROWS + 1 - front // CHUNK_ROWS  # a row after the front too
    twice = -(-chunks * CHUNK_ROWS // RING_ROWS[16])  # those at the ring's first place, for pointers past its end
    return sparse.masks[first:end].nbytes + (chunks + twice) * sparse.values[0].nbytes


@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_what_a_block_brings(density: float, blocks: int) -> None:
    """A block loads masks once, each chunk with values of its run once and no other chunk, x, and nothing else."""
    w = weight("uniform", (256, 512), density, "fp16")
    sparse = Bitmap.from_dense(w)
    bytes_of_x = 16 * 64 * 2 * 16
    wanted = sum(copied_bytes(sparse, first, first + 16 // blocks) for first in range(0, 16, 16 // blocks))
    if blocks == 1:
        assert wanted >= sparse.masks.nbytes + sparse.values.nbytes
    for seed in range(2):
        bulk = check(w, 16, "90a", seed=seed, blocks=blocks)
        assert (bulk.bulk_copy_bytes, bulk.copy_async_bytes) == (wanted, bytes_of_x)
        single = check(w, 16, "80", seed=seed, blocks=blocks)
        assert (single.bulk_copy_bytes, single.copy_async_bytes) == (0, wanted + bytes_of_x)
        assert single.ldmatrix.conflicts == bulk.ldmatrix.conflicts == 0
        # One barrier at the start of the run, none on the way.
        assert single.barriers == bulk.barriers == blocks
