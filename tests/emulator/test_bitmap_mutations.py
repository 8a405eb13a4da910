# SPDX-License-Identifier: Apache-2.0
"""Takes waits, barriers, bounds and steps out of the bitmap kernel, one at a time: the tests must notice.

Not here, because nothing depends on them: the row that is waited for beyond the front, whose value is loaded but never
used; how much a block asks for before its first tile. The steps of wgmma that may be in flight at one time concern only
which registers the compiler takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import EPILOGUE, MMA, WGMMA, Mutation, Outcomes, Product, build_of, first_failure, outcomes

from flashllm.backends import emulator
from flashllm.matmul import bitmap

KERNEL, DECODE = "spmm/bitmap.cu", "flashllm/bitmap.cuh"

MUTATIONS = (
    Mutation("x and masks are not waited for", KERNEL, "ptx::copy_async_wait<kStages - 2>();"),
    Mutation("x and masks are waited for late", KERNEL, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    Mutation("no barrier between tiles", KERNEL, "__syncthreads();  // the stage is", "// the stage is"),
    Mutation("a stage is filled too early", KERNEL, "stage == 0 ? kStages - 1 : stage - 1", "stage"),
    Mutation("stages are not bounded", KERNEL, "if (tile + kStages - 1 < count) load_stage", "load_stage"),
    Mutation("groups are not counted", KERNEL, "ptx::copy_async_commit();  // committed", "// committed"),
    Mutation("a mask is not copied", KERNEL, "threadIdx.x >= kThreads - kChunks;", "threadIdx.x > kThreads - kChunks;"),
    Mutation("masks of the first tile", KERNEL, "long long>(first + tile) *", "long long>(first) *"),
    Mutation("values are not waited for", KERNEL, "ring.wait(front + 1);"),
    Mutation("values are waited for late", KERNEL, "ring.wait(front + 1);", "ring.wait(front - 15);"),
    Mutation("rows of slow streams are refilled", KERNEL, "front - bitmap::kSlack + kRing)", "front + kRing)", WGMMA),
    Mutation("refilled a chunk too far", KERNEL, "- bitmap::kSlack + kRing)", "- bitmap::kSlack / 2 + kRing)"),
    Mutation("all warps refill", KERNEL, "if (threadIdx.x < 32) ring.refill(values, fr", "ring.refill(values, fr"),
    Mutation("copies go on behind the values", KERNEL, " && copied < stop) {", ") {"),
    Mutation("the row behind the front is not copied", KERNEL, "last_front + 1);", "last_front);"),
    Mutation("the mirror is not copied", KERNEL, "if (land_slot == 0) {", "if (false) {"),
    Mutation(
        "the mirror is read before all lanes have written",
        KERNEL,
        "                __syncwarp();\n            }\n            landed",
        "            }\n            landed",
        WGMMA,  # else ldmatrix, which all lanes have to come to, hides it
    ),
    Mutation(
        "no wrap before a tile",
        KERNEL,
        "even = ring.wrapped(even), odd = ring.wrapped(odd);\n        if constexpr",
        "if constexpr",
    ),
    Mutation(
        "no wrap within a tile",
        KERNEL,
        "even = ring.wrapped(even), odd = ring.wrapped(odd);\n            multiply_word",
        "multiply_word",
    ),
    Mutation(
        "no wrap within a tile, wgmma",
        KERNEL,
        "even = ring.wrapped(even), odd = ring.wrapped(odd);\n            start_step",
        "start_step",
        WGMMA,
    ),
    Mutation("parity does not turn", KERNEL, ", parity ^= 1;", ";"),
    Mutation("parity does not turn, bulk copies", KERNEL, ", parity ^= 1;", ";", WGMMA),
    Mutation("lags of even columns are ignored", KERNEL, "static_cast<int>(lag & 0xff)", "0"),
    Mutation("lags of odd columns are ignored", KERNEL, "static_cast<int>(lag >> 8)", "0"),
    Mutation("masks before the run are not counted", KERNEL, "if (i >= stored_back) break;", "break;"),
    Mutation("more masks than there are before the run", KERNEL, "if (i >= stored_back) break;"),
    Mutation("lags count from the run", KERNEL, "__ldg(run_fronts - stored_back)", "first_front"),
    Mutation("rows before the first", KERNEL, "max(first_front - bitmap::kSlack, 0)", "first_front - bitmap::kSlack"),
    Mutation("slow streams of a run are left out", KERNEL, "max(first_front - bitmap::kSlack, 0)", "first_front"),
    Mutation("a run begins amid a chunk", KERNEL, "first_row - first_row % bitmap::kChunkRows", "first_row"),
    Mutation("fronts are not bounded", KERNEL, "min(lane + 1, count)", "lane + 1"),
    Mutation("fronts ahead are not bounded", KERNEL, "min(tile + 34 + lane, count)", "tile + 34 + lane"),
    Mutation("fronts are not renewed", KERNEL, "if ((tile & 31) == 31) {", "if (false) {"),
    Mutation("barriers are used before they are there", KERNEL, "    __syncwarp();\n    // Not the", "    // Not the"),
    Mutation("arrivals do not wait for copies", KERNEL, "arrive_after_copies(barrier)", "arrive(barrier)"),
    Mutation("one lane arrives", KERNEL, "kArrivals = bitmap::kLanes;", "kArrivals = 1;"),
    Mutation("too few bytes are announced", KERNEL, "barrier, bitmap::kChunk", "barrier, bitmap::kPartChunk", WGMMA),
    Mutation("a part is not copied", KERNEL, "if (lane < bitmap::kParts) {", "if (lane < bitmap::kParts - 1) {", WGMMA),
    Mutation("the stage is overwritten under wgmma", KERNEL, "ptx::warpgroup_wait();  // the", "// the", WGMMA),
    Mutation("no proxy fence", KERNEL, "if constexpr (kWarpgroup) ptx::fence_async_proxy();", "", WGMMA),
    Mutation("wgmma is not started in order", KERNEL, "    ptx::warpgroup_begin();\n", "", WGMMA),
    Mutation("steps are not committed", KERNEL, "    ptx::warpgroup_commit();\n", "", WGMMA),
    Mutation(
        "sums are read before wgmma is done",
        KERNEL,
        "ptx::warpgroup_wait();\n#endif\n        // A chain ends",
        ";\n#endif\n        // A chain ends",
        WGMMA,
    ),
    Mutation("earlier chains are forgotten", KERNEL, "piece.add_stored(sum);  // by earlier chains", ";"),
    Mutation("a block arrives before it has stored", KERNEL, "__syncthreads();  // all threads", "// all threads"),
    Mutation("arrivals are not waited for", KERNEL, "__syncthreads();\n#pragma unroll 1", "#pragma unroll 1"),
    Mutation("a lone row arrives twice", KERNEL, "last_row != first_row && split", "split"),
    Mutation("the last row does not arrive", KERNEL, "last_row != first_row && split", "false && split"),
    Mutation("columns of y are not bounded", EPILOGUE, "if (n < N && m < M)", "if (m < M)"),
    Mutation("rows of y are not bounded", EPILOGUE, "if (n < N && m < M)", "if (n < N)"),
    Mutation("a written row stays in the accumulators", EPILOGUE, "sum[i][j][r] = 0.0f;"),
    Mutation("even columns stand still", DECODE, "even = ptx::dot4(flags, kWeight | kWeight << 16, even);"),
    Mutation("odd columns stand still", DECODE, "odd = ptx::dot4(flags, (kWeight | kWeight << 16) << 8, odd);"),
    Mutation("the second value is the first", DECODE, "even2 = ptx::dot4(flags, kWeight, even)", "even2 = even"),
    Mutation("a flag of the group before", DECODE, "mask >> (kGroup & ~1)", "mask >> kGroup"),
    Mutation("flags select what is not there", DECODE, "0x22u >> kBit", "0x22u"),
    Mutation("both rows select alike", DECODE, "select >> 16", "select"),
)  # fmt: skip


def choice_for(arch: str) -> bitmap.Choice:
    """16 columns, so that there are four stages."""
    wanted = (16, "fp16", True, arch == WGMMA)
    return next(
        c
        for c in bitmap.instances()
        if (c.n_block, c.dtype, c.aligned, c.warpgroup) == wanted and c.spec.supports(arch)
    )


def run(build: emulator.BuildOptions) -> str | None:
    """The first failure on products that reach all that is mutated."""
    products: tuple[Product, ...] = (
        ((201, 456), 13, "uniform", 0.05, 3, 2),
        ((201, 456), 16, "skewed", 0.4, 5, 0),
        ((130, 520), 9, "empty-tiles", 0.5, 2, 0),
        ((385, 200), 11, "uniform", 0.3, 7, 2),
        ((128, 64 * 30), 16, "uniform", 0.6, 3, 0),
        ((128, 64 * 20), 8, "full", 1.0, 2, 0),
        ((128, 64 * 100), 9, "uniform", 0.02, 1, 0),  # more tiles than one chain has
        ((128, 256), 12, "uniform", 0.3, 4, 0),
    )
    return first_failure("bitmap", choice_for(build.arch), products, build)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(MUTATIONS, run, tmp_path_factory.mktemp("mutations")) as found:
        yield found


@pytest.mark.parametrize("arch", [MMA, WGMMA])
def test_the_kernel_itself_passes(arch: str, tmp_path: Path) -> None:
    assert run(build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
