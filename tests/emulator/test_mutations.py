# SPDX-License-Identifier: Apache-2.0
"""Takes barriers, waits, bounds and clean-ups out of the Tiled-CSL kernel, one at a time: the tests must notice.

Memory fences between blocks are not here: blocks of the emulator see each other's writes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mutations import (
    EPILOGUE,
    MMA,
    STREAM_K,
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
from flashllm.matmul import tiled_csl

KERNEL, CHAINS = "spmm/tiled_csl.cu", "flashllm/chains.cuh"
CLEARED = " " * 12 + "part[0] = part[1] = part[2] = part[3] = 0.0f;"

MUTATIONS = (
    Mutation("the launch before is not waited for", KERNEL, "ptx::grid_dependency_wait();"),
    Mutation(
        "x is asked for before the launch before is through",
        KERNEL,
        "edge[0] = __ldg(offset), edge[1] = __ldg(offset + 1);",
        "edge[0] = __ldg(offset), edge[1] = __ldg(offset + 1);\n        x.template load<0>();",
    ),
    Mutation("x is not waited for", KERNEL, "ptx::copy_async_wait<kOverlap ? 1 : 0>();"),
    Mutation("x is waited for one stage late", KERNEL, "copy_async_wait<kOverlap ? 1 : 0>", "copy_async_wait<2>"),
    Mutation("no barrier between phases", KERNEL, "#endif\n        __syncthreads();\n    }\n", "#endif\n    }\n"),
    Mutation(
        "wgmma is not waited for",
        KERNEL,
        "if constexpr (S::kWarpgroup) ptx::warpgroup_wait();\n        if",
        "if",
        WGMMA,
    ),
    Mutation("no proxy fence", KERNEL, "if constexpr (S::kWarpgroup) ptx::fence_async_proxy();", "", WGMMA),
    Mutation("wgmma is not started in order", KERNEL, "    ptx::warpgroup_begin();\n", "", WGMMA),
    Mutation(
        "no barrier after the first clearing", KERNEL, "kTileBytes);\n        __syncthreads();\n", "kTileBytes);\n"
    ),
    Mutation(
        "images are not zeroed at first",
        KERNEL,
        "for (int i = 0; i < kImages; ++i) zero_image(images + i * kTileBytes);",
    ),
    Mutation(
        "no undo",
        KERNEL,
        "if constexpr (kUndo) store_words<true, kLast>(sets[kLast], images);",
        "if constexpr (kUndo) {}",
    ),
    Mutation("excess words are not undone", KERNEL, "if (kUndo && (excess & kLastBit))", "if (false)"),
    Mutation("excess words are not stored", KERNEL, "if (excess & kNextBit)", "if (false)"),
    Mutation(
        "excess of the first tile is not stored", KERNEL, "store_excess<false, 0, kVectors>(images, words, offset);"
    ),
    Mutation("rows of x are not bounded", X_STAGE, "turn * kRows < n_left && column < K;", "column < K;"),
    Mutation("columns of x are not bounded", X_STAGE, "turn * kRows < n_left && column < K;", "turn * kRows < n_left;"),
    Mutation("x does not wrap", X_STAGE, "if (over >= 0) source += over - column, column = over;"),
    Mutation(
        "words are not bounded",
        KERNEL,
        "min(static_cast<int>(threadIdx.x) + i * kThreads, last)",
        "threadIdx.x + i * kThreads",
    ),
    Mutation(
        "empty tiles read their neighbour", KERNEL, "count > 0 ? all_words + begin : &kNoWords", "all_words + begin"
    ),
    Mutation("offsets are not bounded", KERNEL, "min(tile + ahead + 2, count)", "tile + ahead + 2"),
    Mutation("columns of y are not bounded", KERNEL, "if (n0 + n < N) store_y", "store_y"),
    Mutation("rows of y are not bounded", EPILOGUE, "if (m + i < M) target", "target"),
    Mutation("scratch is not cleared", KERNEL, "zero_image(base + ended * kTileBytes);"),
    Mutation(
        "earlier chains are forgotten", CHAINS, "split.take_back(sum, split.chains(blockIdx.x, blockIdx.y));", ";"
    ),
    Mutation("phases are run twice", KERNEL, "skip = (ended + 1) % kImages;", ""),
    Mutation(
        "no barrier before the slices are added",
        EPILOGUE,
        "        __syncthreads();\n        if (S::slice() == 0) {\n            for_each",
        "        if (S::slice() == 0) {\n            for_each",
    ),
    Mutation("no barrier after the slices are added", EPILOGUE, "__syncthreads();  // the other", "// the other"),
    Mutation("slices are not added", EPILOGUE, "accumulate(part, cell[v * kPairs]);"),
    Mutation("added slices stay in the scratch", EPILOGUE, "cell[v * kPairs] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);"),
    Mutation(
        "the second slice keeps its sums",
        EPILOGUE,
        "cell[v * kPairs] = make_float4(part[0], part[1], part[2], part[3]);\n"
        "                part[0] = part[1] = part[2] = part[3] = 0.0f;",
        "cell[v * kPairs] = make_float4(part[0], part[1], part[2], part[3]);",
    ),
    Mutation(
        "no barrier before the drain is read",
        EPILOGUE,
        "        }\n        __syncthreads();\n#pragma unroll 2",
        "        }\n#pragma unroll 2",
    ),
    Mutation("no barrier after the drain", EPILOGUE, "        __syncthreads();\n    }\n}\n", "    }\n}\n"),
    Mutation("a written row stays in the accumulators", EPILOGUE, "sum[i][first / 8 + j][r] = 0.0f;"),
    Mutation("a stored row stays in the accumulators", STREAM_K, f"vector);\n{CLEARED}", "vector);\n"),
    Mutation("what is put aside stays in the accumulators", STREAM_K, f"part[3]));\n{CLEARED}", "part[3]));\n"),
    Mutation(
        "what was put aside stays there", STREAM_K, "__stcg(chains + place(v), make_float4(0.0f, 0.0f, 0.0f, 0.0f));"
    ),
    Mutation("a piece may hold +0", STREAM_K, "ptx::not_plus_zero(part[0])", "part[0]"),
    Mutation("pieces are not waited for", STREAM_K, "while (!look(turn)) {", "look(turn); while (false) {"),
    Mutation("slots are not cleared", STREAM_K, "__stcg(at(turn, i), make_float4(0.0f, 0.0f, 0.0f, 0.0f));"),
    Mutation("vectors are taken for those to come", STREAM_K, "vectors[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);"),
    Mutation("half the pieces are left out", STREAM_K, "b.add(sum, now, a, now.next());"),
    Mutation("more pieces are loaded than there are", STREAM_K, "if (there_is(turn, i) && ", "if ("),
    Mutation("more pieces are added than there are", STREAM_K, "piece_of(i) < count; }", "piece_of(i) <= count; }"),
    Mutation("the row's first slot is not its first block's", STREAM_K, "(special ? from : piece)", "piece"),
    Mutation("scratch is written while it is cleared", KERNEL, "__syncthreads();  // the scratch", "// the scratch"),
    Mutation("nobody adds pieces up", CHAINS, "if (!part.adds()) return;", "return;"),
    Mutation("rows that others begin are added up early", CHAINS, "split.tiles_k && row_end == left", "split.tiles_k"),
    Mutation("whole rows are added up", CHAINS, "left < split.tiles_k && row_end", "row_end"),
    Mutation("a piece that is kept is waited for", CHAINS, "(keeps_piece() ? 0 : 1)", "1"),
    Mutation("a piece that is stored is not added", CHAINS, "(keeps_piece() ? 0 : 1)", "0"),
    Mutation("pieces are kept beyond their row", CHAINS, "row_begin == 0 && row_end == count; }", "row_begin == 0; }"),
    Mutation("all first rows are kept", CHAINS, "return part.adds() && row_begin", "return row_begin"),
    Mutation("the first slot is the first row's", CHAINS, " || part.begins()"),
    Mutation(
        "tiles after the end of a row are dealt twice", "flashllm/runs.cuh", "tile + tile / tiles_k * row_cost", "tile"
    ),
    Mutation("two rows share a slot", CHAINS, "row_begin > 0 || ", ""),
    Mutation("the middle of a row adds nothing", CHAINS, "ptx::opaque(packed) & 3;", "ptx::opaque(packed) & 2;"),
    Mutation("the middle of a row writes it", CHAINS, "if (part.ends()) {", "if (true) {"),
    Mutation("pieces are added by the middle and the last", CHAINS, "halfway ? first_block : middle;", "first_block;"),
)


def choice_for(arch: str) -> tiled_csl.Choice:
    """16 columns; two vectors, so that tiles over 1024 words exceed the registers."""
    path = (tiled_csl.WARPGROUP, 3) if arch == WGMMA else tiled_csl.paths_for(16, MMA)[0]
    base = next(
        c
        for c in tiled_csl.instances()
        if (c.slices, c.resident_blocks) == path
        and (c.n_block, c.vectors, c.dtype) == (16, 2, "fp16")
        and c.aligned
        and c.overlap
        and c.undo
    )
    return replace(base, blocks_per_sm=base.resident_blocks)


def run(build: emulator.BuildOptions) -> str | None:
    """The first failure on products that reach everything that is mutated."""
    chain = 200 if build.arch == MMA else 100  # tiles: one more chain than fits one go
    products: tuple[Product, ...] = (
        ((201, 456), 13, "uniform", 0.05, 3, 2),
        ((201, 456), 16, "skewed", 0.4, 5, 0),
        ((130, 520), 9, "empty-tiles", 0.5, 2, 0),
        ((385, 200), 11, "uniform", 0.3, 7, 2),
        ((385, 200), 10, "uniform", 0.3, 2, 0),
        ((385, 300), 12, "uniform", 0.3, 3, 0),  # the last block adds up one row after writing another
        ((128, 64 * chain), 9, "uniform", 0.01, 1, 0),
        ((128, 256), 12, "uniform", 0.3, 4, 0),
        ((128, 192), 12, "uniform", 0.3, 3, 0),
    )
    return first_failure("tiled-csl", choice_for(build.arch), products, build)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(chosen(MUTATIONS), run, tmp_path_factory.mktemp("mutations")) as found:
        yield found


@pytest.mark.parametrize("arch", [MMA, WGMMA])
def test_the_kernel_itself_passes(arch: str, tmp_path: Path) -> None:
    assert run(build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize("mutation", chosen(MUTATIONS), ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
