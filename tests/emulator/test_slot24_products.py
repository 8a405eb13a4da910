# SPDX-License-Identifier: Apache-2.0
"""What only the slot24 kernel has to get right: windows of x, the gather of its columns, picks, runs from any tile."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import plan
from flashllm.backends import emulator
from flashllm.formats import slot24_encode
from flashllm.formats.bitmap_encode import CHUNK_ROWS, Places
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_parts import PARTS_OF
from flashllm.matmul import slot24
from flashllm.matmul.stream_k import StreamK
from products import NUMPY_DTYPE, assert_exact, every_pair, exact, integers, narrow, weight

CHUNK_BYTES = 8192
COLUMN_BYTES = {8: 16, 16: 32, 32: 80}
"""Bytes of one column of a window of x, by its rows."""
pytestmark = pytest.mark.usefixtures("kernels")
every_arch = pytest.mark.parametrize("arch", ["80", "90a", "120a"])
both_parts = pytest.mark.parametrize("part_rows", [32, 64])
LAYOUTS = ((32, 4), (64, 4), (32, 2), (64, 2))
"""Rows that pair alike, and values of a group."""
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
PATHS = ("80", "90a")
both_paths = pytest.mark.parametrize("arch", PATHS)


def check(
    w: NDArray[Any],
    n: int,
    arch: str,
    seed: int = 0,
    window: int | None = None,
    part_rows: int | None = None,
    group_values: int | None = None,
    **split: int,
) -> emulator.Counts:
    """The product is exact; ``split``: blocks and row_cost."""
    sparse = Slot24.from_dense(w, window=window, part_rows=part_rows, group_values=group_values)
    return check_packed(sparse, w, n, arch, seed, **split)


def check_packed(sparse: Slot24, w: NDArray[Any], n: int, arch: str, seed: int = 0, **split: int) -> emulator.Counts:
    x = integers(np.random.default_rng(seed), (n, w.shape[1]), sparse.dtype)
    got, counts = emulator.spmm(x, sparse, choice=narrow(sparse, n, arch), arch=arch, seed=seed, **split)
    assert_exact(got, exact(x, w, sparse.dtype))
    return counts


@cache
def encoded(
    pattern: str,
    shape: tuple[int, int],
    density: float,
    dtype: str,
    seed: int,
    window: int | None,
    layout: tuple[int | None, int | None] = (None, None),
) -> tuple[NDArray[Any], Slot24]:
    """A weight that many instances multiply, and its slots, cached: packing takes as long as a product.

    It is at most as dense as a weight of the layout can be.
    """
    part_rows, group_values = layout
    if group_values == 2:
        pattern = "skewed" if pattern == "full" else pattern
        density = min(density, Slot24.densest(group_values=2))
    w = weight(pattern, shape, density, dtype, seed)
    return w, Slot24.from_dense(w, window=window, part_rows=part_rows, group_values=group_values)


def ring_rows(sparse: Slot24, n: int, arch: str) -> int:
    """Value rows that a block keeps of each part."""
    return narrow(sparse, n, arch).ring_rows


def meets_banks(counts: emulator.Counts, sparse: Slot24) -> bool:
    """Whether there are more bank conflicts than allowed: none, unless pairs are made for groups of two values."""
    allowed = 0 if sparse.group_values == 4 else counts.ldmatrix.ideal // 3
    return counts.ldmatrix.conflicts > allowed


def runs(sparse: Slot24, blocks: int, row_cost: int = 0) -> list[tuple[int, int]]:
    """First tile and one past the last of every block."""
    tiles_m, tiles_k = sparse.tiles
    split = StreamK(tiles_m=tiles_m, tiles_k=tiles_k, blocks=blocks, n_block=8, row_cost=row_cost)
    return [(split.first_tile(block), split.first_tile(block + 1)) for block in range(blocks)]


@pytest.mark.parametrize(
    ("arch", "choice"),
    [
        (arch, c)
        for arch in PATHS
        for number, spec in enumerate(dict.fromkeys(c.spec for c in slot24.typical(arch)))
        for c in slot24.typical(arch)
        if c.spec == spec and c.aligned == (number.bit_count() % 2 == 0)
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.spec.label}{'' if value.aligned else ' any K'}",
)
def test_exact_for_every_instance(arch: str, choice: slot24.Choice) -> None:
    """Runs of one tile, of a few and of all tiles, beginning in the first and in the second tile of a window.

    A kernel serves any K; each is tested with one K, so that both kinds of K meet every width, layout and type.
    """
    columns, layout = 1024 if choice.aligned else 1021, (choice.part_rows, choice.group_values)
    for seed, (pattern, density, window) in enumerate(
        (("uniform", 0.1, 256), ("uniform", 0.3, None), ("skewed", 0.3, None), ("full", 1.0, None))
    ):
        w, sparse = encoded(pattern, (200, columns), density, choice.dtype, seed, window, layout)
        split = slot24.split_for(sparse, choice.n_block, choice, sm_count=1)
        x = integers(np.random.default_rng(seed), (choice.n_block - seed % 3, columns), choice.dtype)
        for blocks in (1, 5, split.tiles):
            got, _ = emulator.spmm(x, sparse, choice=choice, arch=arch, seed=seed + blocks, blocks=blocks)
            assert_exact(got, exact(x, w, choice.dtype))


@every_pair("layout, pattern, arch", LAYOUTS, ("uniform", "full", "skewed", "column"), PATHS)
def test_exact_while_the_ring_turns(pattern: str, layout: tuple[int, int], arch: str) -> None:
    """Rows of tiles whose values go through the ring many times over, in one run and in several."""
    longer = 1 if layout[1] == 4 else 3  # so few values do not fill it as often
    window = 128 if (pattern, layout[1]) == ("column", 2) else None  # the largest that fits takes seconds to find
    for seed, (columns, n, blocks) in enumerate(((2555, 9, 1), (2107, 24, 2), (1659, 40, 3))):
        w, sparse = encoded(pattern, (130, columns * longer), 0.6, "fp16", seed, window, layout)
        assert sparse.fronts[-1] >= (3 if longer == 1 else 1.5) * ring_rows(sparse, n, arch)
        check_packed(sparse, w, n, arch, seed=seed, blocks=blocks)


@both_paths
@both_parts
@pytest.mark.parametrize("window", [128, 136, 200, 256])
def test_exact_for_every_window(window: int, part_rows: int, arch: str) -> None:
    """Windows that end with the matrix, and last ones of one column, of eight, of one less than the others."""
    for seed, extra in enumerate((0, 1, 8, 65, window - 1)):
        w, sparse = encoded("uniform", (130, 2 * window + extra), 0.08, "fp16", seed, window, (part_rows, None))
        n = (8, 13, 30)[(seed + window // 8) % 3]
        check_packed(sparse, w, n, arch, seed, blocks=1 + seed)


@both_paths
@both_parts
def test_exact_for_every_width_of_the_last_window(part_rows: int, arch: str) -> None:
    for columns in range(1, 281, 9):
        w, sparse = encoded("uniform", (100, columns), 0.12, "fp16", columns, None, (part_rows, None))
        check_packed(sparse, w, 8 + columns % 25, arch, columns, blocks=2)


@every_pair("layout, arch, pattern", LAYOUTS, PATHS, ("uniform", "skewed"))
def test_exact_for_runs_that_start_at_any_tile(pattern: str, layout: tuple[int, int], arch: str) -> None:
    """At both tiles of a window, at any number of tiles after stored places, with streams that lag up to the slack."""
    for seed, (density, columns) in enumerate(((0.5, 1300), (0.2, 2400), (0.1, 2400), (0.03, 2400))):
        w, sparse = encoded(pattern, (256, columns), density, "bf16", seed, None, layout)
        assert layout[1] == 2 or seed == 3 or np.unique(Places.unpack(sparse.places[1:]).lags).size > 10
        tiles = sparse.tiles[0] * sparse.tiles[1]
        for blocks in (tiles, tiles * 2 // 3, tiles // 2 - 1, 9):
            begins = runs(sparse, blocks)
            assert {first % 2 for first, _ in begins} == {0, 1}
            assert blocks < tiles or {end - first for first, end in begins} == {1}
            check_packed(sparse, w, 8 if seed % 2 else 34, arch, seed, blocks=blocks)


@every_pair("layout, n, arch", LAYOUTS, (8, 16, 32), PATHS)
def test_exact_for_runs_over_rows_of_tiles(n: int, layout: tuple[int, int], arch: str) -> None:
    """Blocks that end a row of tiles and begin the next: the windows of x start over, once or many times."""
    splits = ((100, 1, 0), (100, 3, 0), (300, 2, 0), (700, 4, 2), (700, 3, 1))
    for seed, (columns, blocks, row_cost) in enumerate(splits):
        w, sparse = encoded("uniform", (128 * 5 - 3, columns), 0.1, "fp16", seed, None, layout)
        tiles_k = sparse.tiles[1]
        assert any((end - 1) // tiles_k > first // tiles_k for first, end in runs(sparse, blocks, row_cost))
        check_packed(sparse, w, n, arch, seed, blocks=blocks, row_cost=row_cost)


@both_paths
@both_parts
def test_exact_for_every_n(part_rows: int, arch: str) -> None:
    """1 to 70 columns of x: one block of them to three; each for both weights, on one of the paths."""
    weights = (
        encoded("uniform", (130, 392), 0.2, "fp16", 0, None, (part_rows, None)),
        encoded("skewed", (130, 395), 0.2, "bf16", 0, None, (part_rows, None)),
    )
    for n in range(1, 71):
        w, sparse = weights[(n + PATHS.index(arch)) % 2]
        check_packed(sparse, w, n, arch, n, blocks=1 + n // 2 % 4)


@every_pair("arch, part_rows, dtype", ("80", "90a", "120a"), (32, 64), ("fp16", "bf16"))
def test_exact_for_dense_and_empty_matrices(dtype: str, part_rows: int, arch: str) -> None:
    for seed, rows in enumerate((1, 64, 127, 129)):
        dense, sparse = encoded("full", (rows, 700), 1.0, dtype, seed, None)
        assert sparse.window == 128
        check(dense, 12, arch, seed, part_rows=part_rows, blocks=3)
        check(np.zeros_like(dense), 12, arch, seed, part_rows=part_rows, blocks=3)
        one = np.zeros_like(dense)
        one[rows - 1, 699 - seed] = 3
        check(one, 31, arch, seed, part_rows=part_rows, blocks=2)


@every_arch
@both_parts
def test_exact_where_one_row_is_dense(part_rows: int, arch: str) -> None:
    """All columns meet in that row, so none share a slot in its band; other bands have as many dummies without need."""
    for seed, row in enumerate((0, 15, 64, 100)):
        w = weight("uniform", (128, 900), 0.05, "fp16", seed)
        w[row] = integers(np.random.default_rng(seed), (1, 900), "fp16")
        check(w, 9 + 8 * seed, arch, seed, part_rows=part_rows, blocks=1 + seed)


@both_paths
@both_parts
def test_exact_for_rows_of_several_chains(part_rows: int, arch: str) -> None:
    """More tiles than one chain has: with a window of 128, two for each 128 columns."""
    w, sparse = encoded("uniform", (128, 128 * 104), 0.03, "fp16", 0, 128, (part_rows, None))
    for seed, blocks in enumerate((1, 2)):
        choice = slot24.default_choice(sparse, 8, arch=arch)
        split = slot24.split_for(sparse, 8, choice, sm_count=1)
        assert split.tiles_k > 2 * split.max_chain
        check_packed(sparse, w, 8 + 9 * seed, arch, seed, blocks=blocks)


@both_paths
@both_parts
def test_exact_for_any_pairing_in_any_order(part_rows: int, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on the order of the pairs; only the absence of bank conflicts does.

    This holds for groups of four values: groups have at most two values only if the right slots make up a group.
    """

    def shuffled(masks: Any, how: Any) -> Any:
        pairs = real(masks, how)
        if pairs is None:
            return None
        order = np.random.default_rng(5).permuted(np.broadcast_to(np.arange(128), pairs[0].shape), axis=-1)
        return tuple(np.take_along_axis(side, order, axis=-1) for side in pairs)

    real = slot24_encode.pair_up
    w = weight("uniform", (200, 700), 0.2, "fp16")
    for n in (8, 16, 32):
        assert check(w, n, arch, n, None, part_rows, 4, blocks=3).ldmatrix.conflicts == 0
        with monkeypatch.context() as patch:
            patch.setattr(slot24_encode, "pair_up", shuffled)
            assert check(w, n, arch, n, None, part_rows, 4, blocks=3).ldmatrix.conflicts > 0


@every_pair("layout, arch, dtype", LAYOUTS, PATHS, ("fp16", "bf16"))
def test_a_value_read_ahead_is_not_used(dtype: str, layout: tuple[int, int], arch: str) -> None:
    """Lanes without a value still load the next one of their stream: a NaN or infinity of a later tile."""
    w = weight("uniform", (256, 1536), 0.2 if layout[1] == 4 else 0.08, dtype)
    w[128:][w[128:] != 0] = np.nan
    w[200:][w[200:] != 0] = np.inf
    x = integers(np.random.default_rng(1), (9, w.shape[1]), dtype)
    sparse = Slot24.from_dense(w, part_rows=layout[0], group_values=layout[1])
    for seed, blocks in enumerate((1, 5, 16)):
        got, _ = emulator.spmm(x, sparse, arch=arch, seed=seed, blocks=blocks)
        assert_exact(np.ascontiguousarray(got[:, :128]), exact(x, w[:128], dtype))
        assert not np.isfinite(got[:, 128:].astype(np.float32)).any()


@every_pair("layout, n, arch", LAYOUTS, (8, 13, 40), PATHS)
def test_infinities_of_x_reach_only_the_rows_that_may_meet_them(n: int, layout: tuple[int, int], arch: str) -> None:
    """An infinity in every column of x in turn: rows of W with an element there, and at most those with a zero."""
    w, sparse = encoded("uniform", (100, 300), 0.15, "fp16", 0, None, layout)
    x = integers(np.random.default_rng(2), (n, 300), "fp16")
    for column in (0, 5, 127, 128, 255, 256, 299):
        special = x.copy()
        special[n // 2, column] = np.inf
        got, _ = emulator.spmm(special, sparse, arch=arch, seed=column, blocks=2)
        finite = np.arange(n) != n // 2
        assert_exact(np.ascontiguousarray(got[finite]), exact(x[finite], w, "fp16"))
        met = w[:, column] != 0
        np.testing.assert_array_equal(got[n // 2, met], np.inf * np.sign(w[met, column]))
        others = got[n // 2, ~met]
        want = exact(x[n // 2 : n // 2 + 1], w[~met], "fp16")[0]
        assert ((others == want) | np.isnan(others)).all()


@every_pair("dtype, part_rows, arch", ("fp16", "bf16"), (32, 64), PATHS)
def test_repeats_give_the_same_bits(dtype: str, part_rows: int, arch: str) -> None:
    """Whatever the schedule; also in splits that the planner would not take."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((300, 1500)).astype(NUMPY_DTYPE[dtype])
    w[rng.random(w.shape) >= 0.2] = 0
    sparse = Slot24.from_dense(w, part_rows=part_rows)
    for n in (7, 40):
        x = rng.standard_normal((n, 1500)).astype(NUMPY_DTYPE[dtype])
        how: dict[str, Any] = {"choice": narrow(sparse, n, arch), "arch": arch}
        for blocks in (None, 5, 29):
            results = [emulator.spmm(x, sparse, seed=seed, blocks=blocks, **how)[0].tobytes() for seed in range(5)]
            assert len(set(results)) == 1


@every_layout
@pytest.mark.parametrize("n", [8, 16, 32])
def test_counts(n: int, layout: tuple[int, int]) -> None:
    """Bulk copies load every byte of W once, and all windows of x but the run's first; no barrier on the way.

    Only the chunks at the first places of the ring, which it holds twice, count twice. Warps with 64 rows gather half
    as much.
    """
    part_rows, values = layout
    w, sparse = encoded("uniform", (256, 1000), 0.2, "fp16", 0, None, layout)
    tiles_m, tiles_k = sparse.tiles
    windows = tiles_m * tiles_k // 2
    weights = sum(array.nbytes for name, array in sparse.arrays().items() if name not in ("fronts", "places"))
    for arch in ("90a", "80"):
        mirrored = -(-len(sparse.values) // (ring_rows(sparse, n, arch) // CHUNK_ROWS)) * CHUNK_BYTES
        whole = weights + mirrored + (windows - 1) * 256 * COLUMN_BYTES[n]
        counts = check_packed(sparse, w, n, arch, blocks=1)
        copied = (counts.bulk_copy_bytes, counts.copy_async_bytes)
        assert copied == ((whole, 0) if arch == "90a" else (0, whole))
        assert counts.copy_async_zeros == 0
        assert counts.mma == {"sp.m16n8k32": tiles_m * tiles_k * 4 * 4 * 2 * n // 8}
        assert counts.ldmatrix.requests == tiles_m * tiles_k * 4 * PARTS_OF[part_rows].steps * n // 8
        assert not meets_banks(counts, sparse)
        assert counts.ldmatrix.conflicts == 0 or values == 2
        # The warps of a block meet when its barriers are ready; those that multiply meet when x is; those of a band of
        # 64 rows meet twice for every fragment of every row of tiles.
        assert counts.barriers == 2 + (tiles_m * 2 * 4 * 2 * n // 8 if part_rows == 64 else 0)
    # Runs that start amid the values also load what the slowest stream may still need: the slack, rounded to whole
    # chunks. Each lays out its first window itself.
    whole -= 3 * 256 * COLUMN_BYTES[n]
    shared = check_packed(sparse, w, n, "90a", blocks=4)
    assert whole < shared.bulk_copy_bytes <= whole + 3 * 5 * CHUNK_BYTES


@every_layout
def test_conflicts_whatever_the_window(layout: tuple[int, int]) -> None:
    for n, window in ((8, 128), (16, 176), (32, 248), (24, 256)):
        w, sparse = encoded("uniform", (130, 700), 0.07, "fp16", n, window, layout)
        for arch in ("80", "90a"):
            assert not meets_banks(check_packed(sparse, w, n, arch, n, blocks=3), sparse)


def test_plans_of_the_emulated_device_have_blocks_that_share_rows() -> None:
    """Otherwise the tests over all formats would not see a run that begins inside a row."""
    w = Slot24.from_dense(weight("uniform", (384, 1536), 0.1, "fp16"))
    split: Any = plan(w, 9, device=emulator.emulated_device("90a")).split
    assert max(split.pieces(row) for row in range(3)) > 1
