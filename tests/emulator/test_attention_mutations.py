# SPDX-License-Identifier: Apache-2.0
"""Takes the waits for the previous launch out of attention, one at a time: the tests must notice.

The wait of blocks without work is not here: it is for the sake of the launch after them, and there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import WGMMA, Mutation, Outcomes, build_of, chosen, outcomes

import attention_cases as cases
from attention_cases import GROUPED, PAIRED, Case
from flashllm.backends import emulator
from flashllm.jit.spec import KernelSpec

WAIT = "ptx::grid_dependency_wait();\n  ptx::grid_launch_dependents();"
OWN_POSITION = "> position) ptx::grid_dependency_wait();"


def waits(file: str) -> tuple[Mutation, ...]:
    """The waits of a kernel, for launches that overlap."""
    all_of_it = (
        ("the launch before is not waited for", WAIT, ";"),
        ("one warp does not wait for the launch before", WAIT, f"if (warp != 0) {WAIT}"),
        ("the row's own position is not waited for", OWN_POSITION, "> position) {}"),
    )
    return tuple(Mutation(name, f"decoder/{file}.cu", old, new, WGMMA) for name, old, new in all_of_it)


MUTATIONS = {"attention": waits("attention"), "grouped_attention": waits("grouped_attention")}
CASES = {
    kernel: replace(case, heads=case.heads // case.kv_heads, kv_heads=1, ends=(130, 1))
    for kernel, case in (("attention", PAIRED), ("grouped_attention", GROUPED))
}


def run(build: emulator.BuildOptions, *, case: Case) -> str | None:
    """The first failure in decoding a row of two blocks and a row of one; any order of threads shows it."""
    given = cases.operands(case)
    for seed in range(2):

        def launch(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any], seed: int = seed) -> None:
            emulator.launch(spec, grid, args, seed=seed, build=build, dependent=cases.dependent(spec, args))

        try:
            cases.decode(launch, np, case, given, splits=2)
        except emulator.EmulationError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcomes]]:
    def of(kernel: str) -> Any:
        return outcomes(chosen(MUTATIONS[kernel]), partial(run, case=CASES[kernel]), tmp_path_factory.mktemp(kernel))

    with of("attention") as attention, of("grouped_attention") as grouped:
        yield {"attention": attention, "grouped_attention": grouped}


@pytest.mark.parametrize("kernel", CASES)
def test_the_kernels_themselves_pass(kernel: str, tmp_path: Path) -> None:
    assert run(build_of(None, WGMMA, tmp_path), case=CASES[kernel]) is None


@pytest.mark.parametrize(
    ("kernel", "mutation"),
    [(kernel, mutation) for kernel, mutations in MUTATIONS.items() for mutation in chosen(mutations)],
    ids=lambda value: value.name if isinstance(value, Mutation) else value,
)
def test_mutation_is_caught(kernel: str, mutation: Mutation, failures: dict[str, Outcomes]) -> None:
    failure = failures[kernel][mutation.name].result()
    assert failure is not None, f"nothing noticed: {mutation.name}"
    assert "which the launch before may be using" in failure
