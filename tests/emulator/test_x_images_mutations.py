# SPDX-License-Identifier: Apache-2.0
"""Takes steps, waits and bounds out of how x is laid out for a launch, one at a time: the tests must notice.

With the bitmap kernel and 32 columns, whose images are tiles, and, where stated, with the slot24 kernel, whose images
are windows; several column blocks, more pieces than warps, rows of more images than a warp looks at at one time, and
blocks that others wait for although they have not begun.

Not here: whatever makes a feeding warp lay out an image although others have, which only costs time (that a share is
counted, to which group, and how many pieces a group has). Rows of x are bounded for memory safety, which
AddressSanitizer watches (test_sanitizers.py). The pieces of the first images fill whole rounds of the warps, so that
the bound of the last round is for other shapes. All lanes of a warp have met where it counts its share. Counts that
overlap pieces of sums change their last bits, which rounding hides. The images of all column blocks are made at the
same time, so that it hardly shows whose are looked at. Fences between blocks, before bulk copies, and after plain
stores to shared memory are not modelled. The feeder's waits for the previous launch show nowhere: before each, a
release has ordered it after warps that had waited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import MMA, WGMMA, Mutation, Outcomes, build_of, chosen, outcomes

from flashllm.backends import emulator
from flashllm.formats.weight import SparseWeight
from flashllm.matmul import bitmap, slot24
from flashllm.matmul.kernel import KernelChoice
from products import exact, integers, packed, weight

KERNEL, IMAGES, TILES = "spmm/bitmap.cu", "flashllm/x_images.cuh", "flashllm/x_tile.cuh"
SEEDS = 8


def tiles(name: str, file: str, old: str, new: str = "") -> Mutation:
    """A mutation with the bitmap kernel, where only wgmma has images."""
    return Mutation(name, file, old, new, WGMMA)


def both(name: str, file: str, old: str, new: str = "") -> tuple[Mutation, Mutation]:
    """Where copies are made by all lanes, and where they are bulk copies."""
    return Mutation(name, file, old, new), Mutation(f"{name}, bulk copies", file, old, new, WGMMA)


MUTATIONS = (
    # The first images, by a block's own warps.
    tiles("the first images are not stored",
             IMAGES, "store_own(to, distance, warp + i * kWarps, begun.own[i]);",
          ";"),
    tiles("a warp's pieces are all its first", IMAGES, "load_own(first_image, warp + i * kWarps)",
          "load_own(first_image, warp)"),
    tiles("first images go beyond the row", IMAGES, "min(piece / kPieces, kFirst - 1)) % images",
          "min(piece / kPieces, kFirst - 1))"),
    tiles("first images are all the first", IMAGES, "(first_image + min(piece / kPieces, kFirst - 1))",
          "(first_image + 0)"),
    tiles("first images lie on each other", IMAGES, "to + piece / kPieces * distance", "to"),
    tiles("first images are those of the row", KERNEL, "images.begin(tile_k, warp)", "images.begin(0, warp)"),
    tiles("first images lie closely", KERNEL, "L::kStageBytes, tile_k, warp", "L::Tile::kBytes, tile_k, warp"),
    tiles("nothing is laid out",
             KERNEL, "images.finish(begun, shared + L::Ring::kBytes, L::kStageBytes, tile_k, warp);"),
    tiles("warps read before all have laid out", IMAGES, "ptx::meet<kWarps * 32>(kImagesBarrier);"),
    # Each block's share, and what is known about it.
    tiles("the first piece of a share is not stored", IMAGES,
          "if (has_share) store_share(first_share(warp), begun.share);"),
    tiles("a share has one piece", IMAGES, "store_share(share, load_share(share));", ";"),
    tiles("a share's later pieces are its first", IMAGES, "store_share(share, load_share(share));",
          "store_share(share, begun.share);"),
    tiles("shares are of the first image", IMAGES, "part(column_block, number - column_block * images)",
          "part(column_block, 0)"),
    tiles("shares are of the first column block", IMAGES, "part(column_block, number - column_block * images)",
          "part(0, number - column_block * images)"),
    tiles("shares are of the first piece", IMAGES, ", share % kPieces);\n    }\n    FLASHLLM_DEVICE void store",
          ", 0);\n    }\n    FLASHLLM_DEVICE void store"),
    tiles("shares go to the first piece", IMAGES, "Image::kBytes, share % kPieces, values)",
          "Image::kBytes, 0, values)"),
    tiles("shares go to the first image", IMAGES, "static_cast<long long>(share / kPieces) *", "0 *"),
    tiles("x begins with the first column block", IMAGES, "column_block * Image::kN, N", "0, N"),
    tiles("images begin with the row", IMAGES, "number * width, width}", "0, width}"),
    tiles("columns behind K are x", IMAGES, "min(width_, K_ - column_)", "width_"),
    tiles("column blocks share images", IMAGES, "(static_cast<long long>(blockIdx.y) * images + number)",
          "(number)"),
    tiles("all images are there when none is", IMAGES, "all &= ptx::has_reached(counter(blockIdx.y, i), pieces_of(i));",
          ";"),
    tiles("all images are there when the first 32 groups are", IMAGES, "i < groups(images); i += 32",
          "i < 1; i += 32"),
    tiles("an image is there when another group is", IMAGES, "const int group = number / kGroup;",
          "const int group = 0;"),
    tiles("an image that is not there is", IMAGES, "if (--looks <= 0) return false;", "if (--looks <= 0) return true;"),
    # By a feeding warp, where blocks do not begin.
    tiles("one piece is laid out", IMAGES, "for (int i = 0; i < kPieces; ++i) Image::store",
          "for (int i = 0; i < 1; ++i) Image::store"),
    tiles("another image is laid out", IMAGES, "Image::load(part(blockIdx.y, number), i)",
          "Image::load(part(blockIdx.y, 0), i)"),
    tiles("an image of the first column block is laid out", IMAGES, "Image::load(part(blockIdx.y, number), i)",
          "Image::load(part(0, number), i)"),
    # The last one leaves zeros.
    tiles("counters stay", IMAGES, "counters[i * kCounterWords] = 0;", ";"),
    tiles("the last counter stays", IMAGES, "i <= last; i += 32", "i < last; i += 32"),
    tiles("counters behind the first 32 stay", IMAGES, "i <= last; i += 32", "i <= last; i += 1024"),
    tiles("counters of later column blocks stay", IMAGES,
          "last = groups(images) * static_cast<int>(gridDim.y);", "last = groups(images);"),
    tiles("the last but one leaves zeros", IMAGES, "gridDim.x * gridDim.y - 1)", "gridDim.x * gridDim.y - 2)"),
    tiles("nobody is the last", IMAGES, "atomicAdd(counters, 1u)", "atomicAdd(counters, 0u)"),
    tiles("who leaves is counted with a group", IMAGES, "+ group + 1) * kCounterWords", "+ group) * kCounterWords"),
    # The bitmap kernel's feeder.
    tiles("images are not waited for", KERNEL, "if (!all && !images.is_there(tile_k, kLooks)) images.lay_out(tile_k);"),
    tiles("an image that does not come is copied", KERNEL, "images.is_there(tile_k, kLooks)) images.lay_out(tile_k);",
          "images.is_there(tile_k, kLooks)) {}"),
    tiles("an image that does not come is waited for", KERNEL, "kLooks = 64;", "kLooks = 1 << 30;"),
    tiles("the feeder begins with the run's first image", KERNEL, "(x.tile_k + L::kStages) % x.images.images",
          "x.tile_k % x.images.images"),
    tiles("the feeder begins beyond the row", KERNEL, "(x.tile_k + L::kStages) % x.images.images",
          "(x.tile_k + L::kStages)"),
    tiles("the row of images ends late", KERNEL, "if (++tile_k == images.images)",
          "if (++tile_k == images.images + 1)"),
    tiles("the row of images begins with the second", KERNEL, "images.images) tile_k = 0;",
          "images.images) tile_k = 1;"),
    tiles("the bytes of x are not announced", KERNEL, "kCopied = L::Tile::kBytes;", "kCopied = 0;"),
    tiles("x goes to the first stage", KERNEL, "ptx::bulk_copy(layout.x(stage), from",
          "ptx::bulk_copy(layout.x(0), from"),
    tiles("the feeder leaves before its block has laid out its share", KERNEL,
          "while (feed.done == 0) feed.wait_release();"),
    tiles("the feeder does not leave", KERNEL, "            images.leave();\n"),
    # Tiles.
    tiles("rows of a tile are its first four", TILES, "row = piece * kPieceRows + (lane >> 3), column",
          "row = lane >> 3, column"),
    tiles("rows go to the first four", TILES, "row = piece * kPieceRows + (lane >> 3);", "row = lane >> 3;"),
    tiles("columns of a tile are its rows", TILES, "column = (lane & 7) * 8;", "column = (lane >> 2) * 8;"),
    tiles("tiles are not swizzled", TILES, "((lane & 7) ^ (row & 7)) * 16", "(lane & 7) * 16"),
    tiles("chunks behind K are x", TILES, "left > 0 ?", "true ?"),
    tiles("one warp does not wait for the launch before", KERNEL, "ptx::grid_dependency_wait();  // the feeder",
          "if (warp != 0) ptx::grid_dependency_wait();  // the feeder"),
)  # fmt: skip

UNALIGNED = (
    tiles("odd columns are even ones", TILES, "low | high << 16", "low | low << 16"),
    tiles("even columns are not bounded", TILES, "2 * j < left ?", "true ?"),
    tiles("odd columns are not bounded", TILES, "2 * j + 1 < left ?", "true ?"),
    tiles("pairs are the first", TILES, "(from + 2 * j) :", "(from) :"),
    tiles("later pieces of the first images are not stored", IMAGES,
          "store_own(to, distance, piece, load_own(first_image, piece));", ";"),
    tiles("later pieces of the first images are the first", IMAGES,
          "store_own(to, distance, piece, load_own(first_image, piece));",
          "store_own(to, distance, piece, begun.own[0]);"),
)  # fmt: skip

# With the slot24 kernel.
WINDOWS = (
    *both("all windows are there when none is",
          IMAGES, "all &= ptx::has_reached(counter(blockIdx.y, i), pieces_of(i));",
          ";"),
    Mutation("all windows are there when the first 32 are", IMAGES, "i < groups(images); i += 32", "i < 1; i += 32"),
    Mutation("counters of windows behind the first 32 stay", IMAGES, "i <= last; i += 32", "i <= last; i += 1024"),
    Mutation("column blocks share windows", IMAGES, "(static_cast<long long>(blockIdx.y) * images + number)",
             "(number)"),
    Mutation("shares of windows have one piece", IMAGES, "store_share(share, load_share(share));", ";"),
    Mutation("windows are not published together", IMAGES, "ptx::meet<kWarps * 32>(kImagesBarrier);"),
    Mutation("later pieces of the first window are not stored", IMAGES,
             "store_own(to, distance, piece, load_own(first_image, piece));", ";"),
    Mutation("an image of the first column block's windows is laid out", IMAGES,
             "Image::load(part(blockIdx.y, number), i)", "Image::load(part(0, number), i)"),
)  # fmt: skip

# Shape, N, density, blocks: runs of a few tiles and of many, more blocks than run at one time, more than 32 images or
# groups of them, pieces for every warp and for a few; last, a run for which the feeder need not wait for anyone.
PRODUCTS: tuple[tuple[tuple[int, int], int, float, int], ...] = (
    ((201, 456), 32, 0.2, 3),
    ((128, 64 * 30), 70, 0.3, 1),
    ((385, 584), 30, 0.3, 7),
    ((256, 64 * 12 + 8), 70, 0.3, 12),
    ((128, 64 * 24), 25, 0.2, 24),
    ((128, 64 * 270), 32, 0.02, 24),
    ((512, 64 * 12), 70, 0.3, 11),
    ((130, 64 * 40), 40, 0.1, 9),
    ((128, 64 * 3), 32, 0.3, 1),
)
Run = Any


@cache
def encoded(name: str, shape: tuple[int, int], density: float, seed: int) -> tuple[Any, SparseWeight]:
    w = weight("uniform", shape, density, "fp16", seed)
    return w, packed(name, w, **({"part_rows": 32, "group_values": 4} if name == "slot24" else {}))


def choice_for(name: str, arch: str, *, aligned: bool) -> KernelChoice:
    """32 columns."""
    wanted = ("fp16", 32, aligned)
    if name == "slot24":
        choices: Any = (c for c in slot24.instances() if (c.part_rows, c.group_values) == (32, 4))
    else:
        choices = (c for c in bitmap.instances() if c.warpgroup)
    return next(c for c in choices if (c.dtype, c.n_block, c.aligned) == wanted and c.spec.supports(arch))


def run(build: emulator.BuildOptions, *, name: str = "bitmap", aligned: bool = True) -> str | None:
    """The first failure on products that reach everything that is mutated."""
    choice = choice_for(name, build.arch, aligned=aligned)
    for seed in range(SEEDS):
        for (rows, columns), n, density, blocks in PRODUCTS:
            shape = rows, columns - (0 if aligned else 5)
            w, sparse = encoded(name, shape, density if name == "bitmap" else density / 2, seed % 2)
            x = integers(np.random.default_rng(seed), (n, shape[1]), "fp16")
            given = min(blocks, sparse.tiles[0] * sparse.tiles[1])  # type: ignore[attr-defined]
            try:
                y, _ = emulator.spmm(x, sparse, choice=choice, seed=seed, build=build, blocks=given)
            except emulator.EmulationError as error:
                return f"{shape} seed {seed}: {error}"
            wrong = np.argwhere(y != exact(x, w, "fp16"))
            if wrong.size:
                return f"{shape} seed {seed}: {len(wrong)} wrong outputs, first {wrong[0].tolist()}"
    return None


CASES: dict[str, tuple[Sequence[Mutation], Run]] = {
    "tiles": (chosen(MUTATIONS), run),
    "any K": (chosen(UNALIGNED), partial(run, aligned=False)),
    "windows": (chosen(WINDOWS), partial(run, name="slot24", aligned=False)),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcomes]]:
    with (
        outcomes(*CASES["tiles"], tmp_path_factory.mktemp("tiles")) as tiles,
        outcomes(*CASES["any K"], tmp_path_factory.mktemp("any")) as any_k,
        outcomes(*CASES["windows"], tmp_path_factory.mktemp("windows")) as windows,
    ):
        yield {"tiles": tiles, "any K": any_k, "windows": windows}


@pytest.mark.parametrize(("case", "arch"), [("tiles", WGMMA), ("any K", WGMMA), ("windows", MMA), ("windows", WGMMA)])
def test_the_kernels_themselves_pass(arch: str, case: str, tmp_path: Path) -> None:
    assert CASES[case][1](build_of(None, arch, tmp_path)) is None


@pytest.mark.parametrize(
    ("case", "mutation"),
    [(case, mutation) for case, (mutations, _) in CASES.items() for mutation in mutations],
    ids=lambda value: value.name if isinstance(value, Mutation) else value,
)
def test_mutation_is_caught(case: str, mutation: Mutation, failures: dict[str, Outcomes]) -> None:
    assert failures[case][mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
