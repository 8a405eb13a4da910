# SPDX-License-Identifier: Apache-2.0
"""Kernels with one thing taken out: what a test of mutations needs besides its list of them.

A mutation is a change to the source text, built from a copy of ``cuda/``, so that the kernel itself carries no trace
of these tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashllm.backends import emulator
from flashllm.jit.sources import cuda_root
from flashllm.matmul.kernel import KernelChoice
from products import exact, integers, packed_weight

X_STAGE, EPILOGUE, STREAM_K = "flashllm/x_stage.cuh", "flashllm/epilogue.cuh", "flashllm/stream_k.cuh"
MMA, WGMMA = "80", "90a"
SEEDS = 6

Product = tuple[tuple[int, int], int, str, float, int, int]
"""Shape, N, pattern, density, blocks, row_cost."""
Outcomes = dict[str, "Future[str | None]"]


@dataclass(frozen=True)
class Mutation:
    """``old``, which ``file`` holds exactly once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str = ""
    arch: str = MMA


def chosen(mutations: Sequence[Mutation]) -> Sequence[Mutation]:
    """Every twelfth one, since each needs its own build; all with ``FLASHLLM_MUTATIONS=all``, as for a new kernel."""
    return mutations if os.environ.get("FLASHLLM_MUTATIONS") == "all" else mutations[::12]


def build_of(mutation: Mutation | None, arch: str, folder: Path) -> emulator.BuildOptions:
    """Options that build the kernel with ``mutation`` from a copy of the device code in ``folder``."""
    if mutation is not None:
        shutil.copytree(cuda_root(), folder)
        file = folder / mutation.file
        text = file.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.name}: the source no longer holds its text once"
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return emulator.BuildOptions(arch=arch, source_root=folder if mutation else None)


def first_failure(
    name: str, choice: KernelChoice, products: Sequence[Product], build: emulator.BuildOptions
) -> str | None:
    """What goes wrong on ``products`` with weights in format ``name``, or ``None`` when nothing does."""
    for seed in range(SEEDS):
        for shape, n, pattern, density, blocks, row_cost in products:
            w, sparse = packed_weight(name, pattern, shape, density, seed=seed)
            x = integers(np.random.default_rng(seed), (n, shape[1]), "fp16")
            try:
                split = {"blocks": blocks, "row_cost": row_cost}
                y, _ = emulator.spmm(x, sparse, choice=choice, seed=seed, build=build, **split)
            except emulator.EmulationError as error:
                return f"{shape} seed {seed}: {error}"
            wrong = np.argwhere(y != exact(x, w, "fp16"))
            if wrong.size:
                return f"{shape} seed {seed}: {len(wrong)} wrong outputs, first {wrong[0].tolist()}"
    return None


@contextmanager
def outcomes(
    mutations: Sequence[Mutation], run: Callable[[emulator.BuildOptions], str | None], folder: Path
) -> Iterator[Outcomes]:
    """The outcome of every mutation, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            m.name: pool.submit(lambda m=m, i=i: run(build_of(m, m.arch, folder / f"m{i}")))
            for i, m in enumerate(mutations)
        }
        pool.shutdown(cancel_futures=True)
