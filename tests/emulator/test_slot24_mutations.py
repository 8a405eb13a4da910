# SPDX-License-Identifier: Apache-2.0
"""Takes waits, bounds and steps out of the slot24 kernel and its windows of x, one at a time: the tests must notice.

Not here, because nothing depends on them: copying windows as soon as they are requested, since they are copied later in
any case; that the last step of a run has one tile, since fronts after the run are those at its end. The emulator does
not model the fence after the initialisation of barriers, nor that barriers lie in memory, where sums might overwrite
them. The feeder's last wait for the previous launch shows nowhere: an earlier release has ordered it after warps that
had waited. Rows of x are bounded only for memory safety, which AddressSanitizer watches (test_sanitizers.py). How long
a chain may be shows only in random values. Value rings, chains and decoding are mutated with the bitmap kernel, and how
x is laid out for a launch in test_x_images_mutations.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import EPILOGUE, MMA, SEEDS, WGMMA, Mutation, Outcomes, build_of, chosen, outcomes
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.formats import runs
from flashllm.formats.slot24 import Slot24
from flashllm.matmul import slot24
from products import exact, integers, weight

KERNEL, WINDOWS, SLOTS = "spmm/slot24.cu", "flashllm/x_window.cuh", "flashllm/slot24.cuh"
RING = "flashllm/value_ring.cuh"
BULK = WGMMA
"""The architecture with bulk copies; of slot24 it has no other multiplication."""

WRAP = "            streams.wrap();\n"
WORD_0, WORD_1 = (
    f"            multiply_word<T, S, {number}>(sum, streams, mask.{word}, pick.{word}, column, window);\n"
    for number, word in enumerate("xy")
)
WORDS = WRAP + WORD_0 + WRAP + WORD_1
FIRST_TEAM = """            if (kTeams == 2 && team == 0) {
                restart_at(2 * tile + 1);
                skip(1);
            }
"""
RELEASE = """            if (kTeams == 2 || in_step == L::kStepTiles - 1) {
                barriers.release(cycle.stage);
                cycle.advance();
            }
"""
WAIT = "if (kTeams == 2 || in_step == 0 || tile == 0) ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);"
STAND = "part[0] = part[1] = part[2] = part[3] = 0.0f;\n            }\n            ptx::meet<64>"
MEETS = """            ptx::meet<64>(1 + pair);
            if (S::slice() == 0) accumulate(part, *cell);
            ptx::meet<64>(1 + pair);
"""


def both(name: str, file: str, old: str, new: str = "") -> tuple[Mutation, Mutation]:
    """Where copies are made by all lanes, and where they are bulk copies."""
    return Mutation(name, file, old, new), Mutation(f"{name}, bulk copies", file, old, new, BULK)


MUTATIONS = (
    # A tile, from the side of the warps that multiply.
    *both("the step is not waited for", KERNEL, WAIT, ";"),
    *both("a run that begins amid a window does not wait", KERNEL, "|| in_step == 0 || tile == 0)",
          "|| in_step == 0)"),
    Mutation("the stage does not advance", KERNEL, "                cycle.advance();\n"),
    Mutation("the step is not released", KERNEL, "                barriers.release(cycle.stage);\n"),
    Mutation("the step is released at its first tile", KERNEL, "|| in_step == L::kStepTiles - 1)", "|| in_step == 0)"),
    Mutation("the step is released before it is decoded", KERNEL, WORDS + FIRST_TEAM + RELEASE,
             RELEASE + WORDS + FIRST_TEAM),
    Mutation("no wrap before a tile", KERNEL, WRAP + WORD_0, WORD_0),
    Mutation("no wrap within a tile", KERNEL, WRAP + WORD_1, WORD_1),
    Mutation("streams do not trade columns", KERNEL, "                trade_at(tile);\n"),
    Mutation("both tiles of a step are the first", KERNEL, "L::kStepTiles == 1 ? 0 : in_window;", "0;"),
    Mutation("masks of a step's first tile", KERNEL, "stage + in_step * bitmap::kMaskBytes +", "stage +"),
    Mutation("columns of a step's first tile", KERNEL, "L::kColumnsAt + in_step * L::kColumnBytes +",
             "L::kColumnsAt +"),
    Mutation("runs begin with a window", KERNEL, "int tile = 0, in_window = phase;", "int tile = 0, in_window = 0;"),
    Mutation("all tiles read the first window", KERNEL, "window += L::Window::kBytes;", ";"),
    Mutation("the window turns amid it", KERNEL, "|| in_window == 0) {", "|| in_window == 1) {"),
    Mutation("places of windows do not turn", KERNEL,
             "if (window == windows_begin + kWindows * L::Window::kBytes) window = windows_begin;", ";"),
    Mutation("all lanes have the first unit of lefts", KERNEL, "first_unit((threadIdx.x & 1) * 4)", "first_unit(0)"),
    # The feeder: room, and what it loads for every step.
    Mutation("the feeder does not wait for room", KERNEL, "while (!feed.has_room(need) || feed.done < released) {",
             "while (false) {"),
    Mutation("the feeder waits once", KERNEL, "while (!feed.has_room(need) ||", "if (!feed.has_room(need) ||"),
    *both("a window is copied over one that is read", KERNEL, " || feed.done < released)", ")"),
    *both("a window has room a window early", KERNEL, "asked + 1 - L::kWindows", "asked - L::kWindows"),
    Mutation("masks stand still", KERNEL, "masks += L::kStepTiles * bitmap::kMaskBytes, picks", "picks"),
    Mutation("masks move by one tile", KERNEL, "masks += L::kStepTiles * bitmap", "masks += bitmap"),
    Mutation("picks stand still", KERNEL, ", picks += L::kStepTiles * slot24::kPickBytes;", ";"),
    Mutation("columns stand still", KERNEL, "columns += L::kStepTiles * L::kColumnBytes;"),
    Mutation("masks of the first run", KERNEL, "masks + brought * bitmap::kMaskBytes", "masks"),
    Mutation("picks of the first run", KERNEL, "picks + brought * slot24::kPickBytes", "picks"),
    Mutation("columns of the first run", KERNEL, "columns + brought * L::kColumnBytes", "columns"),
    Mutation("the first step begins with the run", KERNEL, "brought = first - before;", "brought = first;"),
    Mutation("steps begin with the run", KERNEL, "fronts + first, count, before, first",
             "fronts + first, count, 0, first"),
    Mutation("a step of two tiles is the first's", KERNEL, "{{stage, masks, L::kStepTiles * bitmap",
             "{{stage, masks, bitmap"),
    Mutation("picks are not copied", KERNEL, "{stage + L::kPicksAt, picks, L::kStepTiles * slot24::kPickBytes},"),
    Mutation("columns are not copied", KERNEL, ",\n                                {stage + L::kColumnsAt, columns, "
             "L::kStepTiles * L::kColumnBytes}};", "};"),
    Mutation("picks lie on the masks", KERNEL, "kPicksAt = kStepTiles * bitmap::kMaskBytes;", "kPicksAt = 0;"),
    Mutation("columns lie on the picks", KERNEL, "kColumnsAt = kPicksAt + kStepTiles * slot24::kPickBytes;",
             "kColumnsAt = kPicksAt;"),
    Mutation("stages overlap", KERNEL, "kStagesAt + stage * kStageBytes;", "kStagesAt + stage * bitmap::kMaskBytes;"),
    Mutation("stages lie on x", KERNEL, "kStagesAt = kWindowsAt + kWindows * Window::kBytes;",
             "kStagesAt = kWindowsAt;"),
    Mutation("windows lie on the rings", KERNEL, "kWindowsAt = Ring::kBytes;", "kWindowsAt = 0;"),
    Mutation("barriers are not there yet", KERNEL, "    __syncthreads();\n\n    const int lag", "\n    const int lag"),
    Mutation("the last step of a run is left out", RING, "step * kStepTiles - phase) < count",
             "step * kStepTiles) < count"),
    Mutation("steps have one tile", RING, "min((step + 1) * kStepTiles - phase, count) - 1",
             "min(step + 1, count) - 1"),
    Mutation("the first step has all its tiles", RING, "(step + 1) * kStepTiles - phase,", "(step + 1) * kStepTiles,"),
    # Windows of x.
    *both("the launch before is not waited for", KERNEL, "ptx::grid_dependency_wait();  // the feeder",
          "// the feeder"),
    Mutation("the feeder looks before the launch before is through", KERNEL,
             "if (copied == L::Images::kFirst) ptx::grid_dependency_wait();", "", BULK),
    Mutation("the first window is that of the row", KERNEL, "images.begin(first_window, warp)",
             "images.begin(0, warp)"),
    Mutation("the first window is not laid out",
             KERNEL, "images.finish(begun, reinterpret_cast<unsigned char*>(shared) + "
             "L::kWindowsAt, L::Window::kBytes, first_window, warp);"),
    *both("the feeder begins with the first window", KERNEL, "(first_window + L::Images::kFirst) % windows",
          "first_window % windows"),
    *both("the feeder begins beyond the row", KERNEL, "(first_window + L::Images::kFirst) % windows",
          "first_window + L::Images::kFirst"),
    *both("the row of windows ends late", KERNEL, "if (++next == images.images)", "if (++next == images.images + 1)"),
    *both("the row of windows begins with the second", KERNEL, "images.images) next = 0;", "images.images) next = 1;"),
    *both("windows do not wait for the tile they begin with", KERNEL, "% windows, phase}", "% windows, 0}"),
    *both("the second window lies on the first", KERNEL, "int place = copied % L::kWindows;", "int place = 0;"),
    *both("all windows go to one place", KERNEL, "if (++place == L::kWindows) place = 0;"),
    *both("windows go beyond the last place", KERNEL, "if (++place == L::kWindows) place = 0;", "++place;"),
    Mutation("a window's bytes go to the next step's barrier", KERNEL, "step_of(copied++) % L::kStages",
             "(step_of(copied++) + 1) % L::kStages", BULK),
    Mutation("the bytes of a window are not announced", KERNEL, "begins ? L::Window::kBytes : 0", "0", BULK),
    Mutation("the bytes of a window are announced for every step", KERNEL, "begins ? L::Window::kBytes : 0",
             "L::Window::kBytes", BULK),
    *both("no step waits for a window", KERNEL, "x.asked += begins;"),
    Mutation("a window is copied after the arrival for it", KERNEL, "x.copy();  // before", "// before"),
    Mutation("the last windows are not copied", KERNEL, "    x.copy();\n    while (feed.done", "    while (feed.done",
             BULK),
    *both("half a window is copied", KERNEL, "copy_window(layout.window(place), images.image(next),",
          "copy_window(layout.window(place) + Window::kBytes / 2, images.image(next),"),
    *both("windows are not waited for", KERNEL, "if (!all && !images.is_there(next, kLooks)) images.lay_out(next);"),
    *both("a window that does not come is copied", KERNEL, "images.is_there(next, kLooks)) images.lay_out(next);",
          "images.is_there(next, kLooks)) {}"),
    Mutation("a window that does not come is waited for", KERNEL, "kLooks = 64;", "kLooks = 1 << 30;"),
    Mutation("the feeder leaves before its block has laid out its share", KERNEL,
             "while (feed.done == 0) feed.wait_release();"),
    Mutation("counters stay", KERNEL, "x.images.leave();"),
    Mutation("columns behind the window are x", WINDOWS, "column < part.width ? part.rows : 0", "part.rows"),
    Mutation("odd rows are even ones", WINDOWS, "low | high << 16", "low | low << 16"),
    Mutation("rows do not move on", WINDOWS, "            from += part.K;\n            const", "            const"),
    Mutation("pairs of rows do not move on", WINDOWS, "            from += part.K;\n            out",
             "            out"),
    Mutation("pieces are the first columns", WINDOWS, "int column = piece * kPieceColumns +", "int column ="),
    Mutation("pieces go to the first columns", WINDOWS, "int number = piece * kPieceColumns +", "int number ="),
    Mutation("all rows are the first eight", WINDOWS, "make_uint4(values[j * 4], values[j * 4 + 1]",
             "make_uint4(values[0], values[1]"),
    Mutation("units are stored unswapped", WINDOWS, "window + unit(first_unit(number), j)", "window + unit(0, j)"),
    Mutation("units are read unswapped", WINDOWS, "(first ^ (j & 1) * 16u)", "(first + (j & 1) * 16u)"),
    Mutation("no units are swapped", WINDOWS, "kSwaps ? column << 2 & 16 : 0", "0"),
    Mutation("units are swapped for every second column", WINDOWS, "column << 2 & 16", "column << 4 & 16"),
    Mutation("columns meet in a bank", WINDOWS, "(kUnits | 1) * 16", "kUnits * 16"),
    # The product.
    Mutation("columns of the first step", KERNEL, "<< (8 * kStep), window)", "<< 0, window)"),
    Mutation("columns of the first window", KERNEL, "<< (8 * kStep), window)", "<< (8 * kStep), 0)"),
    Mutation("x of the first eight", KERNEL, "Window::unit(column, j));", "column);"),
    Mutation("masks of the first step", KERNEL, "decode_step<kHalf, S", "decode_step<0, S"),
    Mutation("picks of the first step", KERNEL, "mma_sp_m16n8k32<T, kHalf>", "mma_sp_m16n8k32<T, 0>"),
    Mutation("picks of the first two steps", KERNEL, "1>(sum, streams, mask.y, pick.y",
             "1>(sum, streams, mask.y, pick.x"),
    Mutation("masks of the first two steps", KERNEL, "1>(sum, streams, mask.y, pick.y",
             "1>(sum, streams, mask.x, pick.y"),
    Mutation("a word is left out", KERNEL, WORD_1),
    Mutation("half of a word is left out", KERNEL,
             "    multiply_rows<T, S, 1, kTwoSteps ? 0 : 2>(sum, streams, mask, picks, b);\n"),
    Mutation("x of the first of two steps", KERNEL,
             "if constexpr (kTwoSteps) gather<S, 2 * kWord + 1>(b, columns, window);"),
    Mutation("two steps are one", KERNEL, "kTwoSteps ? 2 * kWord : kWord>", "kWord>"),
    Mutation("one step is two", KERNEL, "kTwoSteps ? 2 * kWord : kWord>", "2 * kWord>"),
    Mutation("all of 64 rows are the first 32", KERNEL, "kTwoSteps ? 0 : 2>", "0>"),
    Mutation("all rows of fragments are the first", KERNEL, "sum[kFirst + i][j]", "sum[kFirst][j]"),
    Mutation("columns of four steps each", KERNEL, "thread * S::Bands::kPartSteps", "thread * 4"),
    Mutation("all bands of 64 are the first", KERNEL, "part() / Bands::kHalves * 64 + i * 16", "i * 16"),
    Mutation("slices are not added", KERNEL, "all.add(sum, reinterpret_cast<float4*>(shared + L::kSumsAt));"),
    Mutation("all warps are of the first slice", KERNEL, "static_cast<int>(threadIdx.x >> 5) % kSlices", "0"),
    Mutation("sums lie on the stages", KERNEL, "kSumsAt = kStagesAt + kStages * kStageBytes;", "kSumsAt = kStagesAt;"),
    Mutation("slices do not meet before they are added", EPILOGUE, MEETS, MEETS.split("\n", 1)[1]),
    Mutation("a place is written while it is read", EPILOGUE, MEETS, MEETS[: MEETS.rindex("            ptx")]),
    Mutation("pairs of slices meet at one barrier", EPILOGUE, MEETS, MEETS.replace("1 + pair", "1")),
    Mutation("pairs of slices share a place", EPILOGUE, "scratch + pair * 32 +", "scratch +"),
    Mutation("the second slice keeps its sums", EPILOGUE, STAND, STAND[STAND.index("\n") + 1 :]),
    Mutation("the first slice does not add", EPILOGUE, "if (S::slice() == 0) accumulate(part, *cell);"),
    Mutation("both slices store y", EPILOGUE, "    if (S::slice() != 0) return;\n"),
    Mutation("picks of the first 16 rows", SLOTS, "picks >> rows", "picks"),
    Mutation("picks of the other 16 rows too", SLOTS, "& 0x55555555u"),
    Mutation("a pick of a half is lost", SLOTS, "0x55555555u", "0x55455555u"),
    Mutation("a pick of the second slots is lost", SLOTS, "0x55555555u", "0x51555555u"),
    Mutation("second slots stand before first ones", SLOTS, "| 0x88888888u"),
    *both("one warp does not wait for the launch before", KERNEL, "ptx::grid_dependency_wait();  // the feeder",
          "if (warp != 0) ptx::grid_dependency_wait();  // the feeder"),
)  # fmt: skip

FULL_GROUPS = "full-groups"
"""In some rows, groups of four have two values, so that the ring turns as fast as it can and other streams lag."""
# Shape, pattern, density, window, blocks, row_cost. The first has blocks that begin in either tile of a window; the
# next has blocks of one tile, more than run at one time. Rows of tiles start over where K ends a window and where it
# does not. Then come runs of many windows, and one for which the feeder need not wait for anyone.
PRODUCTS: tuple[tuple[tuple[int, int], str, float, int | None, int, int], ...] = (
    ((201, 560), "uniform", 0.1, 248, 3, 1),
    ((130, 768), "skewed", 0.1, None, 12, 0),
    ((385, 512), "uniform", 0.08, 256, 1, 0),
    ((260, 328), "uniform", 0.3, None, 5, 2),
    ((128, 1664), "uniform", 0.96, 128, 2, 0),
    ((128, 2104), "uniform", 0.15, None, 1, 0),
    ((300, 1800), "uniform", 0.08, None, 7, 0),
    ((256, 1800), FULL_GROUPS, 0.25, None, 5, 0),
    ((128, 200), "uniform", 0.1, None, 1, 0),
)
DENSEST = {(32, 2): 0.1, (64, 2): 0.07}
"""By rows that pair alike and values of a group: that a weight can surely have."""


def choices_for(arch: str) -> tuple[slot24.Choice, ...]:
    """Two windows of x and three; parts and groups of either shape; units that are swapped."""
    wanted = ((32, 64, 2), (16, 32, 4), (8, 64, 4), (16, 32, 2))
    instances = [c for c in slot24.instances() if c.dtype == "fp16" and c.spec.supports(arch)]
    return tuple(next(c for c in instances if (c.n_block, c.part_rows, c.group_values) == one) for one in wanted)


@cache
def encoded(
    shape: tuple[int, int],
    pattern: str,
    density: float,
    window: int | None,
    layout: tuple[int, int],
    seed: int,
    runs_of_tiles: int,
) -> tuple[NDArray[Any], Slot24]:
    """``runs_of_tiles``: packing depends on it, and the fixture changes it."""
    if pattern == FULL_GROUPS:
        w = weight("full", shape, 1.0, "fp16", seed)
        w[:, 1::2] = 0
        w[np.arange(shape[0]) & 8 != 0] = 0
        thin = np.random.default_rng(seed).random(shape) < 0.4
        w[thin & (np.arange(shape[0]) % 8 != 0)[:, None]] = 0
    else:
        w = weight(pattern, shape, min(density, DENSEST.get(layout, 1.0)), "fp16", seed)
    return w, Slot24.from_dense(w, window=window, part_rows=layout[0], group_values=layout[1])


def run(build: emulator.BuildOptions) -> str | None:
    """The first failure on products that reach everything that is mutated."""
    for choice in choices_for(build.arch):
        for seed in range(SEEDS):
            for (rows, columns), *options in PRODUCTS:
                shape = (rows, columns - 5 * (choice.n_block == 8))  # after K come lefts, which zeros multiply
                if (failure := failure_of(choice, shape, *options, seed, build)) is not None:
                    return f"{shape} N <= {choice.n_block} seed {seed}: {failure}"
    return None


def failure_of(
    choice: slot24.Choice, shape: tuple[int, int], pattern: str, density: float, window: int | None, blocks: int,
    row_cost: int, seed: int, build: emulator.BuildOptions,
) -> str | None:  # fmt: skip
    """What goes wrong in one product of integers, an infinity among them in the first row of x."""
    # Two weights for all seeds: packing takes longer than multiplying, and what mutations need is various schedules.
    layout = choice.part_rows, choice.group_values
    w, sparse = encoded(shape, pattern, density, window, layout, seed % 2, runs.RUNS)
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
    # Pairs of groups of two values are not made for banks: columns of some sets meet.
    allowed = 0 if choice.group_values == 4 else counts.ldmatrix.ideal // 2
    return f"{counts.ldmatrix.conflicts} bank conflicts" if counts.ldmatrix.conflicts > allowed else None


@pytest.fixture(scope="module", autouse=True)
def few_runs() -> Iterator[None]:
    """Long runs, in which streams come to lag, and blocks that begin inside them and continue into the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", 3)
        yield


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(chosen(MUTATIONS), run, tmp_path_factory.mktemp("mutations")) as found:
        yield found


@pytest.mark.parametrize("arch", [MMA, BULK])
def test_the_kernel_itself_passes(arch: str, tmp_path: Path) -> None:
    assert run(build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize("mutation", chosen(MUTATIONS), ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
