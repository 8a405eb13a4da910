# SPDX-License-Identifier: Apache-2.0
"""Takes out of the slot24 kernel, one at a time, what only its two teams of warps need: the tests must notice.

Not here: that streams need not trade columns after the last tile, which only costs time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import EPILOGUE, WGMMA, Mutation, Outcomes, build_of, chosen, outcomes
from test_slot24_mutations import KERNEL, RING, WINDOWS, failure_of

from flashllm.backends import emulator
from flashllm.formats import runs
from flashllm.matmul import slot24

IMAGES = "flashllm/x_images.cuh"
DEAL = "        ptx::meet<kThreads>(1 + group);\n"
HAND = """make_float4(part[0], part[1], part[2], part[3]);
            }
        }
"""
TAKE = """            part[0] = part[1] = part[2] = part[3] = 0.0f;
        }
"""
SKIP_0 = "                skip(0);\n                restart_at(2 * tile + 1);\n"
SKIP_1 = "                restart_at(2 * tile + 1);\n                skip(1);\n"


def at(name: str, file: str, old: str, new: str = "") -> Mutation:
    return Mutation(name, file, old, new, WGMMA)


MUTATIONS = (
    at("the second team does not pass the first tile", KERNEL, SKIP_0, SKIP_0.replace("skip(0)", "")),
    at("the second team passes its own tile", KERNEL, SKIP_0, SKIP_0.replace("skip(0)", "skip(1)")),
    at("the second team does not start anew within a window", KERNEL, SKIP_0, SKIP_0.split("\n")[0] + "\n"),
    at("the first team does not pass the second tile", KERNEL, SKIP_1, SKIP_1.replace("skip(1)", "")),
    at("the first team passes its own tile", KERNEL, SKIP_1, SKIP_1.replace("skip(1)", "skip(0)")),
    at("the first team does not start anew within a window", KERNEL, SKIP_1, SKIP_1.split("\n")[1] + "\n"),
    at("the first team starts anew behind the window", KERNEL, SKIP_1, "\n".join(reversed(SKIP_1.split("\n")))),
    at("teams do not start anew behind a window", KERNEL, "                restart_at(2 * tile);\n"),
    at("streams do not trade columns", KERNEL, "if (tile != split_count) trade_at(2 * tile);"),
    at("runs within a window are not left", KERNEL, "restart <= 2 * tile", "restart == 2 * tile"),
    at("both teams decode the first tile", KERNEL, "kTeams == 2 ? team : L", "kTeams == 2 ? 0 : L"),
    at("four warps release for eight", KERNEL, "L::Feed::kArrivals, S::kBlockWarps)", "L::Feed::kArrivals)"),
    at("windows do not move on", KERNEL, "if (kTeams == 2 || in_window == 0) {", "if (in_window == 0) {"),
    at("a window is released with its second tile alone", KERNEL, "if (kTeams == 2 || in_step == L",
       "if (in_step == L"),
    at("the first tile alone is waited for", KERNEL, "if (kTeams == 2 || in_step == 0 || tile == 0)",
       "if (in_step == 0 || tile == 0)"),
    at("tiles are dealt", KERNEL, "split(tiles_m, tiles_k / kTeams, row_cost", "split(tiles_m, tiles_k, row_cost"),
    at("lanes of a tile are those of the block", KERNEL, "kTeams == 1 ? threadIdx.x : part() * bitmap::kLanes + "
       "static_cast<int>(threadIdx.x & 31)", "threadIdx.x"),
    at("the rings of four warps", KERNEL, "part = warp / kTeams,", "part = warp % bitmap::kParts,"),
    at("four warps lay out x", KERNEL, "XImages<Window, 1, 1, S::kBlockWarps>", "XImages<Window, 1, 1>"),
    at("a tile is passed by its first word", RING, "(__popc(mask.x & bitmap::kLowBits) + __popc(mask.y & "
       "bitmap::kLowBits))", "__popc(mask.x & bitmap::kLowBits)"),
    at("both streams pass what one has", RING, "(__popc(mask.x & bitmap::kHighBits) + __popc(mask.y & "
       "bitmap::kHighBits))", "(__popc(mask.x & bitmap::kLowBits) + __popc(mask.y & bitmap::kLowBits))"),
    at("rows from 16 on are the first", WINDOWS, " + (j >> 1) * kPlaneBytes"),
    at("planes overlap", WINDOWS, "(j >> 1) * kPlaneBytes", "(j >> 1) * kPlaneBytes / 2"),
    # Slices, which end with a fragment each.
    at("sums are taken before they are there", EPILOGUE, HAND + DEAL, HAND),
    at("sums are handed over those that are read", EPILOGUE, TAKE + DEAL, TAKE),
    at("bands meet at one barrier", EPILOGUE, HAND + DEAL, HAND + DEAL.replace("1 + group", "1")),
    at("bands share a place", EPILOGUE, "scratch + group * kOthers * S::kColumnFragments * 32 +", "scratch +"),
    at("slices share a place", EPILOGUE, "cells[(place * S", "cells[(0 * S"),
    at("one of the others is added", EPILOGUE, "other < kOthers; ++other", "other < 1; ++other"),
    at("accumulators keep what was dealt", EPILOGUE, TAKE, TAKE.replace("part[0] = ", "if (false) part[0] = ", 1)),
    at("all warps write the first fragment", EPILOGUE, "return S::row(S::slice());", "return S::row(0);"),
    at("the owner is handed its own", EPILOGUE, "if (S::slice() != owner) {", "{"),
)  # fmt: skip
# Shape, pattern, density, window, blocks, row_cost.
# The last but one has a run that begins with the second tile of a window, and runs after it.
PRODUCTS: tuple[tuple[tuple[int, int], str, float, int | None, int, int], ...] = (
    ((201, 560), "uniform", 0.1, 248, 2, 1),
    ((130, 768), "skewed", 0.1, None, 6, 0),
    ((385, 512), "uniform", 0.08, 256, 1, 0),
    ((128, 1664), "uniform", 0.96, 128, 2, 0),
    ((256, 1800), "uniform", 0.15, None, 3, 0),
    ((128, 3200), "uniform", 0.1, None, 1, 0),
    ((300, 1792), "uniform", 0.1, 256, 1, 0),
    ((128, 200), "uniform", 0.1, None, 1, 0),
)
SEEDS = 3


def run(build: emulator.BuildOptions) -> str | None:
    """The first failure on products that reach everything that is mutated."""
    choices = [c for c in slot24.instances() if c.n_block == slot24.WIDE and c.dtype == "fp16" and c.aligned]
    for choice in choices:
        if (choice.part_rows, choice.group_values) not in ((32, 4), (64, 2)):
            continue
        for seed in range(SEEDS):
            for shape, *options in PRODUCTS:
                if (failure := failure_of(choice, shape, *options, seed, build)) is not None:
                    return f"{shape} rows {choice.part_rows} seed {seed}: {failure}"
    return None


@pytest.fixture(scope="module", autouse=True)
def few_runs() -> Iterator[None]:
    """Long runs, in which streams come to lag, and some that begin with the second tile of a window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", 5)
        yield


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    with outcomes(chosen(MUTATIONS), run, tmp_path_factory.mktemp("mutations")) as found:
        yield found


def test_the_kernel_itself_passes(tmp_path: Path) -> None:
    assert run(build_of(None, WGMMA, tmp_path)) is None


@pytest.mark.parametrize("mutation", chosen(MUTATIONS), ids=lambda m: m.name)
def test_mutation_is_caught(mutation: Mutation, failures: Outcomes) -> None:
    assert failures[mutation.name].result() is not None, f"nothing noticed: {mutation.name}"
