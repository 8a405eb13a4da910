# SPDX-License-Identifier: Apache-2.0
"""Takes waits, arrivals, bounds and steps out of the slot24 kernel, one at a time: the tests must notice.

Not here, because nothing depends on them: the barrier of the warp in ``leave()``, which follows that of the tile's
release; the address of a copy of no bytes. The emulator does not model the fence behind the making of barriers, nor
which kind of arrival releases ordinary stores, nor that barriers lie in memory, where sums might be stored over them.
How long a chain may be shows in random values alone. Value rings, chains and decoding are mutated with the bitmap
kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import EPILOGUE, MMA, SEEDS, WGMMA, Mutation, Outcomes, build_of, outcomes
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.formats.slot24 import Slot24
from flashllm.matmul import slot24
from products import exact, integers, weight

KERNEL, WINDOWS, SLOTS = "spmm/slot24.cu", "flashllm/x_window.cuh", "flashllm/slot24.cuh"
ARRIVAL = "flashllm/warp_arrival.cuh"
BULK = WGMMA
"""The architecture with bulk copies; of slot24 it has no other multiplication."""

WRAP, RELEASE = "            streams.wrap();\n", "            barriers.release(cycle.stage);\n"
WORD_0, WORD_1 = (
    f"            multiply_word<T, S, Windows, {number}>(sum, streams.even, streams.odd, mask.{word}, pick.{word}, "
    "column, here);\n"
    for number, word in enumerate("xy")
)
WORDS = WRAP + WORD_0 + WRAP + WORD_1
HAND_OVER = """                cell[v % 2 * 32] = make_float4(part[0], part[1], part[2], part[3]);
                part[0] = part[1] = part[2] = part[3] = 0.0f;
            }
            ptx::meet<64>(1 + pair);
            if (S::slice() == 0) accumulate(part, cell[v % 2 * 32]);
"""
ZEROS = "                part[0] = part[1] = part[2] = part[3] = 0.0f;\n"

MUTATIONS = (
    Mutation("the tile is not waited for", KERNEL, "ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);"),
    Mutation("the tile is not waited for, bulk copies", KERNEL,
             "ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);", "", BULK),
    Mutation("the stage does not advance", KERNEL, "            cycle.advance();\n"),
    Mutation("the tile is not released", KERNEL, RELEASE),
    Mutation("the tile is released before it is decoded", KERNEL, WORDS + RELEASE, RELEASE + WORDS),
    Mutation("no wrap before a tile", KERNEL, WRAP + WORD_0, WORD_0),
    Mutation("no wrap within a tile", KERNEL, WRAP + WORD_1, WORD_1),
    Mutation("the feeder does not wait for room", KERNEL, "while (!feed.has_room(need)) feed.wait_release();"),
    Mutation("the feeder waits once", KERNEL, "while (!feed.has_room(need))", "if (!feed.has_room(need))"),
    Mutation("masks stand still", KERNEL, "masks += bitmap::kMaskBytes, picks", "picks"),
    Mutation("picks stand still", KERNEL, "picks += slot24::kPickBytes, columns", "columns"),
    Mutation("columns stand still", KERNEL, ", columns += L::kColumnBytes;", ";"),
    Mutation("masks of the first run", KERNEL, "masks + static_cast<long long>(first) * bitmap::kMaskBytes", "masks"),
    Mutation("picks of the first run", KERNEL, "picks + static_cast<long long>(first) * slot24::kPickBytes", "picks"),
    Mutation("columns of the first run", KERNEL, "columns + static_cast<long long>(first) * L::kColumnBytes",
             "columns"),
    Mutation("picks are not copied", KERNEL, "{layout.picks(stage), picks, slot24::kPickBytes},"),
    Mutation("columns are not copied", KERNEL, ",\n                                {layout.columns(stage), columns, "
             "L::kColumnBytes}};", "};"),
    Mutation("picks lie on the masks", KERNEL, "return masks(stage) + bitmap::kMaskBytes;", "return masks(stage);"),
    Mutation("columns lie on the picks", KERNEL, "return picks(stage) + slot24::kPickBytes;", "return picks(stage);"),
    Mutation("stages overlap", KERNEL, "kStagesAt + stage * kStageBytes;", "kStagesAt + stage * bitmap::kMaskBytes;"),
    Mutation("stages lie on x", KERNEL, "kStagesAt = kWindowsAt + Windows::kBytes;", "kStagesAt = kWindowsAt;"),
    Mutation("windows lie on the rings", KERNEL, "kWindowsAt = Ring::kBytes;", "kWindowsAt = 0;"),
    Mutation("barriers of x are those of tiles", KERNEL, "kBarriersAt + kStages * 16;", "kBarriersAt + kStages * 8;"),
    Mutation("barriers of x are not made", KERNEL, "Windows::init(layout.window_barriers());"),
    Mutation("barriers are not there yet", KERNEL, "    __syncthreads();\n\n    if (feeds)", "\n    if (feeds)"),
    Mutation("the launch before is not waited for", KERNEL, "ptx::grid_dependency_wait();"),
    Mutation("the first window is not asked for", KERNEL, "window.ask();"),
    Mutation("a window too many is asked for", KERNEL, "/ slot24::kWindowTiles + 1;", "/ slot24::kWindowTiles + 2;"),
    Mutation("a window too few is asked for", KERNEL, "/ slot24::kWindowTiles + 1;", "/ slot24::kWindowTiles;"),
    Mutation("the row's first window", KERNEL, "tile_k / slot24::kWindowTiles,", "0,"),
    Mutation("windows begin with the run", KERNEL, "(first + tile) % slot24", "tile % slot24"),
    Mutation("the first window is not written", KERNEL, "if (tile == 0 || early || late)", "if (early || late)"),
    Mutation("a window behind the run is written", KERNEL, " && second && tile + 1 < count;", " && second;"),
    Mutation("the second of two windows is not written", KERNEL, "(kWindows == 1 || tile == 1)", "kWindows == 1"),
    Mutation("no window is written early", KERNEL, "kWindows > 1 && second", "false && second"),
    Mutation("no window is written late", KERNEL, "!second && (kWindows == 1", "!second && (false"),
    Mutation("the run's first window is not entered", KERNEL, "if (tile == 0 || !second) here", "if (!second) here"),
    Mutation("one window is used for all", KERNEL, "if (tile == 0 || !second) here", "if (tile == 0) here"),
    Mutation("windows are not left", KERNEL, "if (second) window.leave();"),
    Mutation("a window is left at its first tile", KERNEL, "if (second) window.leave", "if (!second) window.leave"),
    Mutation("columns of the first step", KERNEL, "<< (8 * kStep), window)", "<< 0, window)"),
    Mutation("columns of the first window", KERNEL, "<< (8 * kStep), window)", "<< (8 * kStep), 0)"),
    Mutation("x of the first eight", KERNEL, "column + j * 16);", "column);"),
    Mutation("masks of the first step", KERNEL, "decode_step<kHalf>", "decode_step<0>"),
    Mutation("picks of the first step", KERNEL, "mma_sp_m16n8k32<T, kHalf>", "mma_sp_m16n8k32<T, 0>"),
    Mutation("picks of the first two steps", KERNEL, "1>(sum, streams.even, streams.odd, mask.y, pick.y",
             "1>(sum, streams.even, streams.odd, mask.y, pick.x"),
    Mutation("masks of the first two steps", KERNEL, "1>(sum, streams.even, streams.odd, mask.y, pick.y",
             "1>(sum, streams.even, streams.odd, mask.x, pick.y"),
    Mutation("a word is left out", KERNEL, WORD_1),
    Mutation("half of a word is left out", KERNEL, "    multiply_rows<T, S, 1, kTwoSteps ? 0 : 2>(sum, even, odd, "
             "mask, picks, b);\n"),
    Mutation("x of the first of two steps", KERNEL, "if constexpr (kTwoSteps) gather<S, Windows, 2 * kWord + 1>(b, "
             "columns, window);"),
    Mutation("two steps are one", KERNEL, "kTwoSteps ? 2 * kWord : kWord>", "kWord>"),
    Mutation("one step is two", KERNEL, "kTwoSteps ? 2 * kWord : kWord>", "2 * kWord>"),
    Mutation("all of 64 rows are the first 32", KERNEL, "kTwoSteps ? 0 : 2>", "0>"),
    Mutation("all rows of fragments are the first", KERNEL, "sum[kFirst + i][j]", "sum[kFirst][j]"),
    Mutation("columns of four steps each", KERNEL, "threadIdx.x * S::Bands::kPartSteps", "threadIdx.x * 4"),
    Mutation("all bands of 64 are the first", KERNEL, "static_cast<int>(threadIdx.x >> 6) * 64 + i * 16", "i * 16"),
    Mutation("slices are not added", KERNEL, "add_slices<S>(sum, reinterpret_cast<float4*>(shared + L::kSumsAt));"),
    Mutation("all warps are of the first slice", KERNEL, "kSlices == 1 ? 0 : threadIdx.x >> 5 & 1", "0"),
    Mutation("sums lie on the stages", KERNEL, "kSumsAt = kStagesAt + kStages * kStageBytes;", "kSumsAt = kStagesAt;"),
    Mutation("slices do not meet", EPILOGUE, "            ptx::meet<64>(1 + pair);\n"),
    Mutation("pairs of slices meet at one barrier", EPILOGUE, "ptx::meet<64>(1 + pair)", "ptx::meet<64>(1)"),
    Mutation("slices hand over in one place", EPILOGUE, HAND_OVER, HAND_OVER.replace("v % 2 * 32", "0")),
    Mutation("pairs of slices share a place", EPILOGUE, "scratch + pair * 64 +", "scratch +"),
    Mutation("the second slice keeps its sums", EPILOGUE, HAND_OVER, HAND_OVER.replace(ZEROS, "")),
    Mutation("the first slice does not add", EPILOGUE, "if (S::slice() == 0) accumulate(part, cell[v % 2 * 32]);"),
    Mutation("both slices store y", EPILOGUE, "    if (S::slice() != 0) return;\n"),
    Mutation("picks of the first 16 rows", SLOTS, "picks >> rows", "picks"),
    Mutation("picks of the other 16 rows too", SLOTS, "& 0x55555555u"),
    Mutation("a pick of a half is lost", SLOTS, "0x55555555u", "0x55455555u"),
    Mutation("a pick of the second slots is lost", SLOTS, "0x55555555u", "0x51555555u"),
    Mutation("second slots stand before first ones", SLOTS, "| 0x88888888u"),
    Mutation("x is not waited for", WINDOWS, "ptx::mbarrier_wait(landed(), landed_parity);"),
    Mutation("x of a window before is waited for", WINDOWS, "landed_parity ^= 1;"),
    Mutation("arrivals do not wait for copies", WINDOWS, "arrive_after_copies(landed())", "arrive(landed())"),
    Mutation("stores of x do not arrive", WINDOWS, "ptx::mbarrier_arrive(landed());"),
    Mutation("one lane's copies are waited for", WINDOWS, "(2 * kWindows + i) * 8, 32)", "(2 * kWindows + i) * 8, 1)"),
    Mutation("one warp's part is waited for", WINDOWS, "barriers + i * 8, kWarps *", "barriers + i * 8, 1 *"),
    Mutation("warps share a barrier of copies", WINDOWS, "kWindows * 16 + warp * 8;", "kWindows * 16;"),
    Mutation("a window is written while it is read", WINDOWS,
             "if (written >= kWindows) ptx::mbarrier_wait(empty(next_place), next_parity ^ 1);"),
    Mutation("a window is free a round early", WINDOWS, "empty(next_place), next_parity ^ 1)",
             "empty(next_place), next_parity)"),
    Mutation("all windows have one place", WINDOWS, "base + next_place * kWindowBytes", "base"),
    Mutation("the first place is read", WINDOWS, "return base + place * kWindowBytes;", "return base;"),
    Mutation("parity of places written stands", WINDOWS, "next_place = 0, next_parity ^= 1;", "next_place = 0;"),
    Mutation("places written do not turn", WINDOWS, "if (++next_place == kWindows) next_place = 0, next_parity ^= 1;"),
    Mutation("parity of places read stands", WINDOWS, "place = 0, parity ^= 1;\n    }\n};", "place = 0;\n    }\n};"),
    Mutation("places read do not turn", WINDOWS, "if (++place == kWindows) place = 0, parity ^= 1;"),
    Mutation("a window is announced before all lanes have written", ARRIVAL, "__syncwarp();"),
    Mutation("a window is not announced", WINDOWS, "warp_arrive(full(next_place));"),
    Mutation("a window is not waited for", WINDOWS, "ptx::mbarrier_wait(full(place), parity);"),
    Mutation("a window is not given back", WINDOWS, "warp_arrive(empty(place));"),
    Mutation("all lanes give a window back", ARRIVAL, "if (kWarpArrivals == 32 || ptx::elect()) ", ""),
    Mutation("the next window is not asked for", WINDOWS, "if (++written < windows) ask();", "++written;"),
    Mutation("a window behind the last is asked for", WINDOWS, "if (++written < windows) ask();", "++written, ask();"),
    Mutation("columns behind the window are x", WINDOWS, "within() < window_columns && column < K", "column < K"),
    Mutation("columns behind K are x", WINDOWS, "within() < window_columns && column < K", "within() < window_columns"),
    Mutation("rows of x are not bounded", WINDOWS, "inside && turn * kRows < n_left;", "inside;"),
    Mutation("rows of a turn are not bounded", WINDOWS, "n_left = N - n0 - n;", "n_left = N - n0;"),
    Mutation("even columns are not bounded", WINDOWS, "real && column + 2 * j < K ?", "real ?"),
    Mutation("odd columns are not bounded", WINDOWS, "real && column + 2 * j + 1 < K ?", "real ?"),
    Mutation("odd columns are even ones", WINDOWS, "low | high << 16", "low | low << 16"),
    Mutation("all rows of a turn are the first", WINDOWS, "static_cast<long long>(n0 + n) * K", "n0 * K"),
    Mutation("rows of every turn are the first", WINDOWS, ", from += static_cast<long long>(kRows) * K)", ")"),
    Mutation("x stands still", WINDOWS, "source += window_columns, column", "column"),
    Mutation("the bound of x stands still", WINDOWS, ", column += window_columns;", ";"),
    Mutation("x does not begin anew", WINDOWS,
             "if (column - within() >= K) source -= column - within(), column = within();"),
    Mutation("x begins anew a window late", WINDOWS, "if (column - within() >= K)", "if (column - within() > K)"),
    Mutation("x begins anew at the warp's first column", WINDOWS, "source -= column - within(),", "source -= column,"),
    Mutation("a turn's second half is not swizzled", WINDOWS, "(lane >> 3 | (turn & 1) * kRows)", "(lane >> 3)"),
    Mutation("chunks are read where they are not", WINDOWS, "((half * 4 + matrix) ^ row) <<", "(half * 4 + matrix) <<"),
    Mutation("warps share a place", WINDOWS, "+ warp * (kN * kRowBytes);", ";"),
    Mutation("places lie on the windows", WINDOWS, "return base + kWindows * kWindowBytes +", "return base +"),
    Mutation("warps write the same columns", WINDOWS, "(warp * kWarpColumns + lane) * kColumnBytes",
             "lane * kColumnBytes"),
    Mutation("warps ask for the same columns", WINDOWS, "warp * kWarpColumns + (threadIdx.x & 7) * 8",
             "(threadIdx.x & 7) * 8"),
    Mutation("both halves of a warp's columns are the first", WINDOWS, "to + half * 32 * kColumnBytes +", "to +"),
    Mutation("all rows are the first eight", WINDOWS, "from + n * 8 * kRowBytes", "from"),
    Mutation("columns meet in a bank", WINDOWS, "(kN / 8 | 1) * 16", "kN / 8 * 16"),
)  # fmt: skip

# Shape, pattern, density, window, blocks, row_cost. The first has blocks that begin in either tile of a window, the
# next blocks of one tile; rows of tiles begin anew where K ends a window and where it does not.
PRODUCTS: tuple[tuple[tuple[int, int], str, float, int | None, int, int], ...] = (
    ((201, 560), "uniform", 0.1, 248, 3, 1),
    ((130, 768), "skewed", 0.1, None, 12, 0),
    ((385, 512), "uniform", 0.08, 256, 1, 0),
    ((260, 328), "uniform", 0.3, None, 5, 2),
    ((128, 1664), "uniform", 0.96, 128, 2, 0),
    ((128, 2104), "uniform", 0.15, None, 1, 0),
)


def choices_for(arch: str) -> tuple[slot24.Choice, ...]:
    """Two windows of x, one, and a K that is no multiple of 8; parts of either shape."""
    wanted = ((32, 64, True), (16, 32, True), (8, 64, False))
    instances = [c for c in slot24.instances() if c.dtype == "fp16" and c.spec.supports(arch)]
    return tuple(next(c for c in instances if (c.n_block, c.part_rows, c.aligned) == one) for one in wanted)


@cache
def encoded(
    shape: tuple[int, int], pattern: str, density: float, window: int | None, part_rows: int, seed: int
) -> tuple[NDArray[Any], Slot24]:
    w = weight(pattern, shape, density, "fp16", seed)
    return w, Slot24.from_dense(w, window=window, part_rows=part_rows)


def run(build: emulator.BuildOptions) -> str | None:
    """The first failure on products that reach all that is mutated."""
    for choice in choices_for(build.arch):
        for seed in range(SEEDS):
            for (rows, columns), *options in PRODUCTS:
                shape = (rows, columns - (0 if choice.aligned else 6))  # 6: behind K come lefts, which zeros multiply
                if (failure := failure_of(choice, shape, *options, seed, build)) is not None:
                    return f"{shape} N <= {choice.n_block} seed {seed}: {failure}"
    return None


def failure_of(
    choice: slot24.Choice, shape: tuple[int, int], pattern: str, density: float, window: int | None, blocks: int,
    row_cost: int, seed: int, build: emulator.BuildOptions,
) -> str | None:  # fmt: skip
    """What goes wrong in one product of integers, an infinity among them in the first row of x."""
    w, sparse = encoded(shape, pattern, density, window, choice.part_rows, seed)
    x = integers(np.random.default_rng(seed), (choice.n_block - seed % 3, shape[1]), "fp16")
    want = exact(x, w, "fp16")
    column = min(sparse.window, shape[1] - 1)  # the first that is a dummy's number in the window before
    x[0, column] = np.inf
    met = w[:, column] != 0
    want[0, met] = np.copysign(np.inf, w[met, column])
    try:
        split = {"blocks": min(blocks, sparse.tiles[0] * sparse.tiles[1]), "row_cost": row_cost}
        y, counts = emulator.spmm(x, sparse, choice=choice, seed=seed, build=build, **split)
    except emulator.EmulationError as error:
        return str(error)
    wrong = y != want
    wrong[0, ~met] &= ~np.isnan(y[0, ~met])  # a zero that is multiplied by the infinity
    if wrong.any():
        return f"{wrong.sum()} wrong outputs, first {np.argwhere(wrong)[0].tolist()}"
    conflicts = counts.ldmatrix.conflicts + counts.stmatrix.conflicts
    return f"{conflicts} bank conflicts" if conflicts else None


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(MUTATIONS, run, tmp_path_factory.mktemp("mutations")) as found:
        yield found


@pytest.mark.parametrize("arch", [MMA, BULK])
def test_the_kernel_itself_passes(arch: str, tmp_path: Path) -> None:
    assert run(build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
