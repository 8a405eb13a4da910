# SPDX-License-Identifier: Apache-2.0
"""Slot24 for 64 columns of x: two teams of warps, one for the first tile of each window and one for the second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_slot24_products import LAYOUTS, every_layout, meets_banks

from flashllm.backends import emulator
from flashllm.formats import runs
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_parts import PARTS_OF
from flashllm.matmul import slot24
from flashllm.matmul.stream_k import StreamK
from products import NUMPY_DTYPE, assert_exact, exact, integers, weight

ARCH = "90a"
WINDOW_BYTES = 256 * 64 * 2
CHUNK_BYTES = 8192
pytestmark = pytest.mark.usefixtures("kernels")


def wide(w: Slot24) -> slot24.Choice:
    """The wide instance for the layout of ``w``."""
    return slot24.default_choice(w, slot24.WIDE, arch=ARCH)


def encode(w: NDArray[Any], layout: tuple[int, int], **options: Any) -> Slot24:
    return Slot24.from_dense(w, part_rows=layout[0], group_values=layout[1], **options)


def density(layout: tuple[int, int], most: float) -> float:
    """``most``, or what a weight of the layout can have."""
    return most if layout[1] == 4 else min(most, Slot24.densest(group_values=2))


def check(sparse: Slot24, w: NDArray[Any], n: int, seed: int, **split: int) -> emulator.Counts:
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), sparse.dtype)
    got, counts = emulator.spmm(x, sparse, choice=wide(sparse), arch=ARCH, seed=seed, **split)
    assert_exact(got, exact(x, w, sparse.dtype))
    return counts


@every_layout
def test_exact_for_every_n(layout: tuple[int, int]) -> None:
    """Up to 64 columns in one block, more in two: odd numbers where 32 rows pair alike, even ones where 64 do."""
    weights = [
        (w, encode(w, layout))
        for w in (
            weight("uniform", (130, 392), density(layout, 0.2), "fp16"),
            weight("skewed", (130, 395), density(layout, 0.2), "bf16"),
        )
    ]
    for n in range(layout[0] // 32, 71, 2):
        w, sparse = weights[(n // 2 + layout[1] // 4) % 2]
        check(sparse, w, n, n, blocks=1 + n % 3)
    for w, sparse in weights:
        check(sparse, w, 130, 1)


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        (layout, pattern)
        for layout in LAYOUTS
        for pattern in ("uniform", "full", "skewed", "column", "even-columns", "block", "empty-tiles")
        if layout[1] == 4 or pattern not in ("full", "block")
    ],
    ids=str,
)
def test_exact_while_the_ring_turns(pattern: str, layout: tuple[int, int]) -> None:
    """In one run, in several that begin and end anywhere, and in one for every window."""
    longer = 1 if layout[1] == 4 else 3  # so few values do not fill it as often
    w = weight(pattern, (258, 1307 * longer), density(layout, 0.5), "fp16", 3)
    # The largest window for a full column and groups of two takes seconds to find.
    sparse = encode(w, layout, window=128 if (pattern, layout[1]) == ("column", 2) else None)
    windows = sparse.tiles[0] * sparse.tiles[1] // 2
    assert sparse.fronts[-1] >= 2 * wide(sparse).ring_rows
    for seed, blocks in enumerate((1, 4, 7, windows)):
        check(sparse, w, 64 - 9 * seed, seed, blocks=blocks, row_cost=seed % 2 if blocks < windows else 0)


@every_layout
def test_exact_where_runs_of_the_format_begin_in_either_tile(
    layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of both teams start anew there, within a run of windows: before, inside and after a window."""
    met = set()
    for seed, count in enumerate((3, 5, 9, 40)):
        monkeypatch.setattr(runs, "RUNS", count)
        w = weight("skewed", (256, 2100), density(layout, 0.3), "bf16", seed)
        sparse = encode(w, layout)
        met |= {runs.runs_of(sparse.tiles).first_tile(run) % 2 for run in range(runs.runs_of(sparse.tiles).count)}
        for blocks in (1, 2, 5):
            check(sparse, w, 40, seed, blocks=blocks)
    assert met == {0, 1}


@every_layout
@pytest.mark.parametrize("window", [128, 136, 200, 248])
def test_exact_for_every_window(window: int, layout: tuple[int, int]) -> None:
    """Windows that end with the matrix, and last ones of one column, of eight, of one less than the others."""
    for seed, extra in enumerate((0, 1, 8, 65, window - 1)):
        w = weight("uniform", (130, 2 * window + extra), 0.06, "fp16", seed)
        check(encode(w, layout, window=window), w, 33 + seed, seed, blocks=1 + seed % 4)


@every_layout
def test_exact_for_rows_of_several_chains(layout: tuple[int, int]) -> None:
    """More windows than one chain has."""
    w = weight("uniform", (128, 128 * 104), 0.03, "fp16")
    sparse = encode(w, layout, window=128)
    split = slot24.split_for(sparse, 64, wide(sparse), sm_count=1)
    assert isinstance(split, StreamK)
    assert split.tiles_k > split.max_chain
    for seed, blocks in enumerate((1, 2)):
        check(sparse, w, 64 - seed, seed, blocks=blocks)


@every_layout
def test_a_value_read_ahead_is_not_used(layout: tuple[int, int]) -> None:
    """Lanes without a value still load the next one of their stream: a NaN or infinity of a later tile."""
    w = weight("uniform", (256, 1536), density(layout, 0.2), "fp16")
    w[128:][w[128:] != 0] = np.nan
    w[200:][w[200:] != 0] = np.inf
    x = integers(np.random.default_rng(1), (50, w.shape[1]), "fp16")
    sparse = encode(w, layout)
    for seed, blocks in enumerate((1, 3, 12)):
        got, _ = emulator.spmm(x, sparse, choice=wide(sparse), arch=ARCH, seed=seed, blocks=blocks)
        assert_exact(np.ascontiguousarray(got[:, :128]), exact(x, w[:128], "fp16"))
        assert not np.isfinite(got[:, 128:].astype(np.float32)).any()


@pytest.mark.parametrize(
    ("layout", "dtype"), list(zip(LAYOUTS, ("fp16", "bf16", "bf16", "fp16"), strict=True)), ids=str
)
def test_repeats_give_the_same_bits(dtype: str, layout: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((300, 1500)).astype(NUMPY_DTYPE[dtype])
    w[rng.random(w.shape) >= density(layout, 0.2)] = 0
    x = rng.standard_normal((40, 1500)).astype(NUMPY_DTYPE[dtype])
    sparse = encode(w, layout)
    for blocks in (None, 5, 13):
        how = {"choice": wide(sparse), "arch": ARCH, "blocks": blocks}
        results = [emulator.spmm(x, sparse, seed=seed, **how)[0].tobytes() for seed in range(5)]
        assert len(set(results)) == 1


@every_layout
def test_counts(layout: tuple[int, int]) -> None:
    """W is decoded once for all columns of x: as many loads of values as for 32, each multiplied twice as often."""
    part_rows, values = layout
    w = weight("uniform", (256, 1000), density(layout, 0.2), "fp16")
    sparse = encode(w, layout)
    tiles_m, tiles_k = sparse.tiles
    windows = tiles_m * tiles_k // 2
    choice = wide(sparse)
    weights = sum(array.nbytes for name, array in sparse.arrays().items() if name not in ("fronts", "places"))
    mirrored = -(-len(sparse.values) // (choice.ring_rows // 16)) * CHUNK_BYTES
    counts = check(sparse, w, 64, 0, blocks=1)
    assert counts.bulk_copy_bytes == weights + mirrored + (windows - 1) * WINDOW_BYTES
    assert counts.copy_async_bytes == 0
    assert counts.mma == {"sp.m16n8k32": tiles_m * tiles_k * 4 * 4 * 2 * 8}
    assert counts.ldmatrix.requests == tiles_m * tiles_k * 4 * PARTS_OF[part_rows].steps * 8
    assert not meets_banks(counts, sparse)
    assert counts.ldmatrix.conflicts == 0 or values == 2
    # The warps of a block meet when its barriers are ready; those that multiply meet when x is; those of a band meet
    # twice for each of their fragments of 16 rows, for each row of tiles.
    bands, slices = 128 // part_rows, 2 * PARTS_OF[part_rows].halves
    assert counts.barriers == 2 + tiles_m * bands * slices * 2
