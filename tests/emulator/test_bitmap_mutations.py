# SPDX-License-Identifier: Apache-2.0
"""Takes waits, barriers, bounds and steps out of the bitmap kernel, one at a time: the tests must notice.

Not here, because nothing depends on them:

- the two rows after the front, whose values are loaded but never used;
- in ``needed``, the rows that are there already: whole chunks give the same;
- ``__syncwarp`` before the feeder's copies: the barrier also counts bytes that arrive before they are announced;
- the fence of the feeder that stores x itself: every warp that multiplies with wgmma has one;
- where the feeder's lanes copy everything, their arrivals for x: those for the rest come after all copies;
- ``low > end``: a pointer at the end still has the 16 rows of a mask word, the mirror, before it;
- how many steps of wgmma may be in flight, which only matters for the registers that the compiler chooses.

x as images, for more columns, is mutated in test_x_images_mutations.py.

Not here, because the emulator orders more than a GPU does: ``__syncwarp`` before a release, after an instruction for
which all lanes of the warp have met; the fence after the initialisation of the barriers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from mutations import (
    EPILOGUE,
    MMA,
    WGMMA,
    X_STAGE,
    Mutation,
    Outcomes,
    Product,
    build_of,
    chosen,
    first_failure,
    outcomes,
)

from flashllm.backends import emulator
from flashllm.formats import runs
from flashllm.matmul import bitmap

KERNEL, DECODE = "spmm/bitmap.cu", "flashllm/bitmap.cuh"
RING, CHAINS = "flashllm/value_ring.cuh", "flashllm/chains.cuh"
ARRIVAL = "flashllm/warp_arrival.cuh"


def both(name: str, file: str, old: str, new: str = "") -> tuple[Mutation, Mutation]:
    """Where copies are made by all lanes, and where they are bulk copies."""
    return Mutation(name, file, old, new), Mutation(f"{name}, bulk copies", file, old, new, WGMMA)


MUTATIONS = (
    # A tile, from the side of the warps that multiply.
    *both("a tile is not waited for", KERNEL, "ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);"),
    *both("a tile is not released", KERNEL, "barriers.release(cycle.stage);"),
    Mutation(
        "a tile is released before all of it is multiplied",
        KERNEL,
        "                multiply_word<T, S, 1>(sum, streams, mask.y, x_stage);\n            }\n"
        "            barriers.release(cycle.stage);",
        "                barriers.release(cycle.stage);\n"
        "                multiply_word<T, S, 1>(sum, streams, mask.y, x_stage);\n            }",
    ),
    Mutation(
        "the stage behind a tile is released",
        KERNEL,
        "barriers.release(cycle.stage);\n            cycle.advance();",
        "cycle.advance();\n            barriers.release(cycle.stage);",
    ),
    Mutation("a stage is not left", KERNEL, "            cycle.advance();\n"),
    Mutation("no wrap before a tile", KERNEL, "streams.wrap();\n            if constexpr", "if constexpr"),
    Mutation("no wrap amid a tile", KERNEL, "streams.wrap();\n                multiply_word", "multiply_word"),
    Mutation("no wrap amid a tile, wgmma", KERNEL, "streams.wrap();\n                start_step", "start_step", WGMMA),
    Mutation("first halves of steps do not wrap", RING, " low -= Ring::kWrapBytes;", ";"),
    Mutation("second halves of steps do not wrap", RING, " high -= Ring::kWrapBytes;", ";"),
    Mutation("no proxy fence", KERNEL, "ptx::fence_async_proxy();  // x came", "// x came", WGMMA),
    Mutation("wgmma is not started in order", KERNEL, "    ptx::warpgroup_begin();\n", "", WGMMA),
    Mutation("steps are not committed", KERNEL, "    ptx::warpgroup_commit();\n", "", WGMMA),
    Mutation("a stage is released under wgmma", KERNEL, "ptx::warpgroup_wait();\n#endif", "#endif", WGMMA),
    Mutation("all lanes release", ARRIVAL, "if (kWarpArrivals == 32 || ptx::elect()) ", ""),
    *both("three warps release for four", RING, "empty(i), warps *", "empty(i), (warps - 1) *"),
    *both("parity does not turn", RING, "stage = 0, parity ^= 1;", "stage = 0;"),
    Mutation("barriers are used before they are there", KERNEL, "kArrivals);\n    __syncthreads();", "kArrivals);"),
    # Where a run begins.
    Mutation("rows of first halves are ignored", RING, "ring.origin - from.at.lag(0)", "ring.origin"),
    Mutation("rows of second halves are ignored", RING, "ring.origin - from.at.lag(1)", "ring.origin"),
    Mutation("columns of first halves are ignored", RING, "low_row * bitmap::kRowBytes + from.at.column_byte(0)",
             "low_row * bitmap::kRowBytes + bitmap::Places::own().column_byte(0)"),
    Mutation("columns of second halves are ignored", RING, "high_row * bitmap::kRowBytes + from.at.column_byte(1)",
             "high_row * bitmap::kRowBytes + bitmap::Places::own().column_byte(1)"),
    Mutation("places of the first tile", RING, "stored / bitmap::kPlaceTiles * bitmap::kTileThreads + thr", "thr"),
    Mutation("streams do not trade columns", KERNEL, "if (next % bitmap::kPlaceTiles == 0) str", "if (false) str"),
    Mutation("streams trade columns a tile late", KERNEL, "- (first + tile) % bitmap::kPlaceTiles);",
             "- (first + tile) % bitmap::kPlaceTiles + 1);"),
    Mutation("streams trade as the first did", DECODE, "stored * kTileThreads + thread)", "thread)"),
    Mutation("streams trade as they did before", RING, "coming = bitmap::Places::behind(places, next,",
             "bitmap::Places::behind(places, next,"),
    Mutation("streams trade as they will later", DECODE, "min(tile / kPlaceTiles + 1,", "min(tile / kPlaceTiles + 2,"),
    Mutation("places behind the last are read", DECODE, "(end - 1) / kPlaceTiles);", "1 << 30);"),
    Mutation("first streams keep their column", RING, "low = __shfl_sync(0xffffffffu, low, coming.giver(0));", ";"),
    Mutation("second streams trade as first ones", RING, "high, coming.giver(1)", "high, coming.giver(0)"),
    Mutation("second streams are first ones", DECODE, "lane(stream) * 4 + stream * 2", "lane(stream) * 4"),
    Mutation("masks before the run are not counted", RING, "i < from.tiles ? ~0u : 0u", "0u"),
    Mutation("more masks than there are before the run", RING, "i < from.tiles ? ~0u : 0u", "~0u"),
    Mutation("masks before the run are the first", RING, "static_cast<long long>(known) * b", "0 * b"),
    Mutation("lags count from the run", RING, "__ldg(fronts + known)", "__ldg(fronts + first)"),
    Mutation("rows before the first", RING, "max(first_front - lag, 0)", "(first_front - lag)"),
    Mutation("slow streams of a run are left out", RING, "max(first_front - lag, 0)", "first_front"),
    Mutation("a run begins amid a chunk", RING, ", 0) / bitmap::kChunkRows * bitmap::kChunkRows)", ", 0))"),
    Mutation("values of the first run", RING, "(ring.origin / bitmap::kChunkRows) *", "(0) *"),
    Mutation("masks of the first run", KERNEL, "masks + static_cast<long long>(first) *", "masks + 0 *"),
    Mutation("fronts of the first run", KERNEL, "values, fronts + first, count", "values, fronts, count"),
    # The feeder: which rows, and whether there is room.
    *both("the last chunk is left out", RING, "kChunkRows - 1)) + 1", "kChunkRows - 1)) - 15"),
    *both("a tile is brought without room", KERNEL, "while (!feed.has_room(need)) feed.wait_release();"),
    *both("one release makes room", KERNEL, "while (!feed.has_room(need))", "if (!feed.has_room(need))"),
    *both("a stage is filled too early", RING, "step - done < kStages", "step - done <= kStages"),
    *both("rows of slow streams are refilled", RING, "<= done_front - bitmap::kSlack;", "<= done_front;"),
    *both("refilled a row too early", RING, "<= done_front - bitmap::kSlack;", "<= done_front - bitmap::kSlack + 1;"),
    *both("releases are not waited for", RING, "ptx::mbarrier_wait(barriers.empty(emptied.stage), emptied.parity);"),
    Mutation("releases are those of one stage", RING, "        emptied.advance();\n"),
    Mutation("released tiles are not counted", RING, "        ++done;\n"),
    Mutation("the slowest front stands still", RING, "done_front = __shfl_sync", "__shfl_sync"),
    *both("released tiles are looked up in a later set", RING, "front_set : before_set", "front_set : next_set"),
    Mutation("fronts are those before the tiles", RING, "(fronts, count, 0)", "(fronts, count, -1)"),
    Mutation("fronts of the second set are late", RING, "(fronts, count, 32)", "(fronts, count, 31)"),
    Mutation("fronts of later sets are late", RING, "(next | 31) + 1", "(next | 31)"),
    Mutation("fronts are not renewed", RING, "if (next >> 5 != last >> 5)", "if (false)"),
    Mutation("fronts are not bounded", RING, "min(tile + static_cast<int>(threadIdx.x & 31) + 1, count)", "tile + 32"),
    Mutation("a stage is filled twice", RING, "        filled.advance();\n"),
    # What it loads for every tile.
    *both("x is not announced", KERNEL, "ptx::mbarrier_arrive_after_copies(full);", ";"),
    Mutation("x is announced too early", KERNEL, "arrive_after_copies(full", "arrive(full", WGMMA),
    Mutation("arrivals for x are not counted", KERNEL, "L::Feed::kArrivals + X::kArrivals);", "L::Feed::kArrivals);"),
    Mutation("x goes to the first stage", KERNEL, "from.load(stage * L::kStageBytes);", "from.load(0);"),
    Mutation("turns of x keep their swizzle", X_STAGE, "(target ^ (turn * kOtherSwizzle % 8 << 4))", "target"),
    *both("the launch before is not waited for", KERNEL, "ptx::grid_dependency_wait();  // the feeder",
          "// the feeder"),
    Mutation("one warp brings x of the first tiles", KERNEL, "if (warp < min(L::kStages, count))", "if (warp == 0)"),
    Mutation("the feeder brings x of the first tiles", KERNEL, "feed.step >= L::kStages;", "true;"),
    Mutation("the feeder begins with x of the first tile", KERNEL, "loader(layout, L::kStages)", "loader(layout, 0)"),
    Mutation("the feeder begins with x beyond the row", KERNEL, "(tile_k + tile) % tiles_k", "tile_k + tile"),
    *both("masks stand still", KERNEL, "feed.advance(), masks += bitmap::kMaskBytes", "feed.advance()"),
    # By copies of all lanes.
    Mutation("half of the masks", RING, "at < pieces[i].bytes;", "at < pieces[i].bytes / 2;"),
    Mutation("the mirror is not copied", RING, "ptx::copy_async16(place == 0, to + ring.kWrapBytes, from, 16);"),
    Mutation("the mirror is of every chunk", RING, "ptx::copy_async16(place == 0, to", "ptx::copy_async16(true, to"),
    *both("the ring does not wrap", RING, "if (place == ring.kWrapBytes) place = 0;"),
    Mutation("arrivals do not wait for copies", RING, "arrive_after_copies(barrier())", "arrive(barrier())"),
    Mutation("one lane arrives", RING, "kArrivals = bitmap::kLanes;", "kArrivals = 1;"),
    # By bulk copies.
    Mutation("too few bytes are announced", RING, "mirrors) * bitmap::kC", "mirrors) * bitmap::kPartC", WGMMA),
    Mutation("bytes of the mirror are not announced", RING, "(chunks + mirrors) *", "chunks *", WGMMA),
    Mutation("bytes of masks are not announced", RING, "bytes += pieces[i].bytes;", ";", WGMMA),
    Mutation("a mirror is announced for no chunk", RING, "? chunks != 0 :", "? true :", WGMMA),
    Mutation("a mirror is announced too early", RING, "Bytes > ring.kWrapBytes;", "Bytes >= ring.kWrapBytes;", WGMMA),
    Mutation("masks are not copied", RING, "i) ptx::bulk_copy(pieces", "i) if (i) ptx::bulk_copy(pieces", WGMMA),
    Mutation("all lanes bring masks", RING, "if (ptx::elect()) {\n            ptx", "{\n            ptx", WGMMA),
    Mutation("all lanes bring rows", RING, "            if (ptx::elect()) {\n#pragma", "            {\n#pragma", WGMMA),
    Mutation("the mirror is not copied, bulk copies", RING, "if (mirror != 0) continue;", "", WGMMA),
    Mutation("the mirror is of every chunk, bulk copies", RING, "place == 0 && mirror == 0 ?", "mirror == 0 ?", WGMMA),
    Mutation("the mirror lies on the chunk", RING, "place + mirror,", "place,", WGMMA),
    Mutation("every part gets the same", RING, "chunk + part * bitmap::kPartChunkBytes,", "chunk,", WGMMA),
    *both("chunks are the same", RING, "        chunk += bitmap::kChunkBytes;\n"),
    *both("chunks go to the same place", RING, "        place += bitmap::kPartChunkBytes;\n"),
    # Runs of the format.
    Mutation("streams go on where they were", KERNEL, "streams.restart(ring, restart_front);"),
    Mutation("streams go on at the first restart's front", KERNEL, "                restart_front = __ldg(", "__ldg("),
    Mutation("there is one restart", KERNEL, "                restart = next_restart();\n"),
    Mutation("the loop does not stop at restarts", KERNEL,
             " stop = min(min(chains.chain_end, restart), next_trade(tile));\n        }",
             " stop = min(chains.chain_end, next_trade(tile));\n        }"),
    Mutation("restarts do not wrap", RING, "(front - ring.origin) % Ring::kRows *", "(front - ring.origin) *"),
    Mutation("lags count at restarts", RING, "known == restart ? bitmap::Places::own().packed : stood", "stood"),
    Mutation("a restart is not looked for", RING, "known = max(stored, restart)", "known = stored"),
    Mutation("no start needs the slack", KERNEL, "first == restart ? 0 : bitmap::kSlack", "0"),
    # Chains, and the end of a run.
    Mutation(
        "earlier chains are forgotten", CHAINS, "split.take_back(sum, split.chains(blockIdx.x, blockIdx.y));", ";"
    ),
    Mutation("chains add what was not stored", CHAINS, "tile - row_begin > S::kMaxChain", "true"),
    Mutation("shared rows are written as if whole", CHAINS, "row_end - row_begin == split.tiles_k", "true"),
    Mutation("whole rows are not written", CHAINS, "row_end - row_begin == split.tiles_k", "false"),
    Mutation("every chain is a piece", CHAINS, "if (tile != row_end)", "if (false)"),
    Mutation("no row after the first", CHAINS, "++row;"),
    Mutation("later rows begin where the run does", CHAINS, "row_begin = row_end;"),
    Mutation("a run has one row", CHAINS, "row_end = min(count, row_end + split.tiles_k);", ";"),
    Mutation("a later row goes beyond the run", CHAINS, "min(count, row_end + split", "(row_end + split"),
    Mutation("the first row goes beyond the run", CHAINS, "min(count, left)", "left"),
    Mutation("the first row is a whole one", CHAINS, "min(count, left)", "min(count, split.tiles_k)"),
    Mutation("a chain goes beyond its row", CHAINS, "min(row_end, chain_end +", "(chain_end +"),
    Mutation("nobody adds pieces up", CHAINS, "if (!part.adds()) return;", "return;"),
    Mutation("the row added up is the next", CHAINS, "write(sum, first_row);", "write(sum, first_row + 1);"),
    Mutation("columns of y are not bounded", EPILOGUE, "if (n < N && m < M)", "if (m < M)"),
    Mutation("rows of y are not bounded", EPILOGUE, "if (n < N && m < M)", "if (n < N)"),
    Mutation("a written row stays in the accumulators", EPILOGUE, "sum[i][j][r] = 0.0f;"),
    # Decoding.
    Mutation("a stream stands still", DECODE, "place = ptx::dot4(flags, kHalf << 16, between);", ";"),
    Mutation("values of the first row are not passed", DECODE, "kHalf << 16, between", "kHalf << 16, place"),
    Mutation("values of the second row are not passed", DECODE, "ptx::dot4(flags, kHalf << 16, between)", "between"),
    Mutation("the second row begins with the first", DECODE, "ptx::dot4(flags, kHalf, place)", "place"),
    Mutation("one element of a row moves the stream", DECODE, "kHalf = kWeight | kWeight << 8", "kHalf = kWeight"),
    Mutation("the second value is the first", DECODE, "b = ptx::load_shared_half(place + kRowBytes)", "b = a"),
    Mutation("the fourth value is the third", DECODE, "d = ptx::load_shared_half(between + kRowBytes)", "d = c"),
    Mutation("the second row has the first's values", DECODE, "permute(c, d, 0x", "permute(a, b, 0x"),
    Mutation("flags of the group before", DECODE, "mask >> (kNumber & ~1)", "mask >> kNumber"),
    Mutation("weights of the group before", DECODE, "kRowBytes >> kBit", "kRowBytes"),
    Mutation("flags select what is not there", DECODE, "0x22u >> kBit", "0x22u"),
    Mutation("the second flag does not know the first", DECODE, "kBytes * 0x0200u - kBytes;", "0u - kBytes;"),
    Mutation("both rows select alike", DECODE, "(flags >> 16) * kFactor", "flags * kFactor"),
    Mutation("both halves read one stream", DECODE, "(a[0][2], a[0][3], high", "(a[0][2], a[0][3], low"),
    Mutation("both halves read one stream, lower rows", DECODE, "(a[1][2], a[1][3], high", "(a[1][2], a[1][3], low"),
    Mutation("steps are of one half of the mask", DECODE, "group<kStep * 4 + 3, k", "group<3, k"),
    *both("one warp does not wait for the launch before", KERNEL, "ptx::grid_dependency_wait();  // the feeder",
          "if (warp != 0) ptx::grid_dependency_wait();  // the feeder"),
)  # fmt: skip

UNALIGNED = (
    Mutation("x is not announced, any K", KERNEL, "ptx::mbarrier_arrive(full);", ";"),
    Mutation("stores pass for copies", KERNEL, "mbarrier_arrive(full", "mbarrier_arrive_after_copies(full", WGMMA),
    Mutation("no proxy fence, any K", KERNEL, "ptx::fence_async_proxy();  // x came", "// x came", WGMMA),
    Mutation("even columns of x are not bounded", X_STAGE, "inside && column + 2 * j < K", "inside"),
    Mutation("odd columns of x are not bounded", X_STAGE, "inside && column + 2 * j + 1 < K", "inside"),
)  # fmt: skip


def choice_for(arch: str, *, aligned: bool) -> bitmap.Choice:
    """16 columns, so that there are four stages."""
    wanted = (16, "fp16", aligned, arch == WGMMA)
    return next(
        c
        for c in bitmap.instances()
        if (c.n_block, c.dtype, c.aligned, c.warpgroup) == wanted and c.spec.supports(arch)
    )


def run(build: emulator.BuildOptions, *, aligned: bool = True) -> str | None:
    """The first failure on products that reach everything that is mutated."""
    products: tuple[Product, ...] = (
        ((201, 456), 13, "uniform", 0.05, 3, 2),
        ((201, 456), 16, "skewed", 0.4, 5, 0),
        ((130, 520), 9, "empty-tiles", 0.5, 2, 0),
        ((385, 200), 11, "uniform", 0.3, 7, 2),
        ((128, 64 * 30), 16, "uniform", 0.6, 3, 0),
        ((128, 64 * 20), 8, "full", 1.0, 2, 0),
        ((128, 64 * 100), 9, "uniform", 0.02, 1, 0),  # more tiles than one chain has
        ((256, 64 * 101), 9, "uniform", 0.02, 1, 0),
        ((128, 64 * 220), 8, "uniform", 0.02, 2, 0),
        ((128, 256), 12, "uniform", 0.3, 4, 0),
        ((128, 64 * 20), 8, "uniform", 0.03, 5, 0),  # blocks that begin with the first few rows
        ((128, 64 * 90), 8, "lagging", 0.7, 1, 0),
        ((128, 64 * 90), 8, "lagging", 0.3, 2, 0),
    )
    unaligned: tuple[Product, ...] = (
        ((130, 201), 13, "uniform", 0.3, 3, 0),
        ((128, 64 * 20 - 3), 16, "uniform", 0.5, 2, 0),
        ((70, 457), 9, "skewed", 0.4, 5, 0),
    )
    return first_failure("bitmap", choice_for(build.arch, aligned=aligned), products if aligned else unaligned, build)


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


@pytest.fixture(scope="module")
def unaligned_failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(chosen(UNALIGNED), partial(run, aligned=False), tmp_path_factory.mktemp("unaligned")) as found:
        yield found


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("arch", [MMA, WGMMA, "120a"])
def test_the_kernel_itself_passes(arch: str, aligned: bool, tmp_path: Path) -> None:
    assert run(build_of(None, arch, tmp_path), aligned=aligned) is None


@pytest.mark.parametrize("mutation", chosen(MUTATIONS), ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"


@pytest.mark.parametrize("mutation", chosen(UNALIGNED), ids=lambda m: m.name)
def test_mutation_is_caught_for_any_k(mutation: Mutation, unaligned_failures: Outcomes) -> None:
    assert unaligned_failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
