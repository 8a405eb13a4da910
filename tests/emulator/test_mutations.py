# SPDX-License-Identifier: Apache-2.0
"""Takes barriers, waits, bounds and clean-ups out of the kernel, one at a time: the emulator tests must notice.

A mutation is a change of the source text, built from a copy of ``cuda/``, so that the kernel itself carries no trace
of these tests. Memory fences between blocks are not here: blocks of the emulator see each other's writes at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from flashllm import TiledCSL
from flashllm.backends import emulator
from flashllm.jit.sources import cuda_root
from flashllm.matmul import tiled_csl
from products import choice_of, exact, integers, weight

KERNEL, EPILOGUE, STREAM_K = "spmm/tiled_csl.cu", "flashllm/epilogue.cuh", "flashllm/stream_k.cuh"
MMA, WGMMA = "80", "90a"
SEEDS = 6


@dataclass(frozen=True)
class Mutation:
    """``old``, which ``file`` holds exactly once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str = ""
    arch: str = MMA


MUTATIONS = (
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
    Mutation("rows of x are not bounded", KERNEL, "turn * kRows < n_left && column < K;", "column < K;"),
    Mutation("columns of x are not bounded", KERNEL, "turn * kRows < n_left && column < K;", "turn * kRows < n_left;"),
    Mutation("x does not wrap", KERNEL, "if (over >= 0) source += over - column, column = over;"),
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
    Mutation("columns of y are not bounded", KERNEL, "if (n0 + n >= N) return;"),
    Mutation("rows of y are not bounded", EPILOGUE, "if (m + i < M) target", "target"),
    Mutation("scratch is not cleared", KERNEL, "zero_image(base + u * kTileBytes);"),
    Mutation("earlier chains are forgotten", KERNEL, "if (continued) value = piece.continued(n, m, value);"),
    Mutation(
        "no barrier between slices",
        EPILOGUE,
        "            }\n            __syncthreads();\n        }\n",
        "            }\n        }\n",
    ),
    Mutation("no barrier after the drain", EPILOGUE, "        __syncthreads();\n    }\n}\n", "    }\n}\n"),
    Mutation("slices are not added", EPILOGUE, "turn == 0 ? mine : cell + mine", "mine"),
    Mutation("accumulators keep the last row", EPILOGUE, "mine = 0.0f;"),
    Mutation("the last to arrive is the one before", STREAM_K, "== pieces - 1;", "== pieces - 2;"),
    Mutation("arrival counters are not reset", STREAM_K, "if (last) *counter = 0;"),
    Mutation("a piece is left out of the sum", STREAM_K, "for (int i = 1; i < pieces;", "for (int i = 2; i < pieces;"),
    Mutation("two rows share a slot", STREAM_K, "(begins_in_row ? 0 : 1)", "0"),
)


def build_of(mutation: Mutation | None, arch: str, folder: Path) -> emulator.BuildOptions:
    """Options that build the kernel with ``mutation`` from a copy of the device code in ``folder``."""
    if mutation is not None:
        shutil.copytree(cuda_root(), folder)
        file = folder / mutation.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.name}: the source no longer holds its text once"
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return emulator.BuildOptions(arch=arch, source_root=folder if mutation else None)


def choice_for(arch: str) -> tiled_csl.Choice:
    """16 columns; two vectors, so that tiles over 1024 words exceed the registers."""
    path = (tiled_csl.WARPGROUP, 3) if arch == WGMMA else tiled_csl.paths_for(16, MMA)[0]
    base = next(
        c
        for spec in tiled_csl.specs()
        if (c := choice_of(spec))
        and (c.slices, c.resident_blocks) == path
        and (c.n_block, c.vectors, c.dtype) == (16, 2, "fp16")
        and c.aligned
        and c.overlap
        and c.undo
    )
    return replace(base, blocks_per_sm=base.resident_blocks)


def first_failure(build: emulator.BuildOptions) -> str | None:
    """What goes wrong on the cases below, or ``None`` when nothing does."""
    choice = choice_for(build.arch)
    chain = 200 if build.arch == MMA else 100  # tiles: one more chain than fits one go
    cases = (
        # shape, N, pattern, density, blocks
        ((201, 456), 13, "uniform", 0.05, 3),
        ((201, 456), 16, "skewed", 0.4, 5),
        ((130, 520), 9, "empty-tiles", 0.5, 2),
        ((385, 200), 11, "uniform", 0.3, 7),
        ((128, 64 * chain), 9, "uniform", 0.01, 1),
    )
    for seed in range(SEEDS):
        for shape, n, pattern, density, blocks in cases:
            w = weight(pattern, shape, density, "fp16", seed=seed)
            x = integers(np.random.default_rng(seed), (n, shape[1]), "fp16")
            try:
                y, _ = emulator.spmm(x, TiledCSL.from_dense(w), choice=choice, seed=seed, blocks=blocks, build=build)
            except emulator.EmulationError as error:
                return f"{shape} seed {seed}: {error}"
            wrong = np.argwhere(y != exact(x, w, "fp16"))
            if wrong.size:
                return f"{shape} seed {seed}: {len(wrong)} wrong outputs, first {wrong[0].tolist()}"
    return None


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str | None]]]:
    """The outcome of every mutation, two at a time."""
    folder = tmp_path_factory.mktemp("mutations")
    with ThreadPoolExecutor(2) as pool:
        yield {
            m.name: pool.submit(lambda m=m, i=i: first_failure(build_of(m, m.arch, folder / f"m{i}")))
            for i, m in enumerate(MUTATIONS)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", [MMA, WGMMA])
def test_the_kernel_itself_passes(arch: str, tmp_path: Path) -> None:
    assert first_failure(build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: dict[str, Future[str | None]]) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
