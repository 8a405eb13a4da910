# SPDX-License-Identifier: Apache-2.0
"""Operands and exact results of products, for kernels on a GPU and on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.jit.spec import KernelSpec
from flashllm.matmul import tiled_csl
from weight_cases import NUMPY_DTYPE, mask


def integers(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> NDArray[Any]:
    """1..4 with either sign."""
    values = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)
    return values.astype(NUMPY_DTYPE[dtype])


def weight(pattern: str, shape: tuple[int, int], density: float, dtype: str, seed: int = 0) -> NDArray[Any]:
    """Small integers where ``pattern`` keeps an element."""
    values = integers(np.random.default_rng(seed), shape, dtype)
    values[~mask(pattern, *shape, density, seed)] = 0
    return values


def exact(x: NDArray[Any], w: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The int64 product rounded once, to nearest even."""
    with np.errstate(over="ignore"):
        product = x.astype(np.float64).astype(np.int64) @ w.astype(np.float64).astype(np.int64).T
        return product.astype(np.float64).astype(NUMPY_DTYPE[dtype])


def assert_exact(got: NDArray[Any], want: NDArray[Any]) -> None:
    """Equal bits, but that a zero may have either sign."""
    wrong = np.argwhere((got.view(np.uint16) != want.view(np.uint16)) & ~(got == want))
    assert wrong.size == 0, (
        f"{len(wrong)} wrong, first y{wrong[0].tolist()}: got {got[tuple(wrong[0])]}, expected {want[tuple(wrong[0])]}"
    )


def arch_of(spec: KernelSpec) -> str:
    """The architecture to emulate ``spec`` as: the tuned one, or the oldest."""
    return "90a" if spec.supports("90a") else "80"


def choice_of(spec: KernelSpec) -> tiled_csl.Choice:
    """The choice that asks for ``spec``."""
    fields = dict(spec.template)
    choice = tiled_csl.Choice(
        dtype="fp16" if fields["T"] == "__half" else "bf16",
        n_block=int(fields["kN"]),
        vectors=int(fields["kVectors"]),
        slices=int(fields["kSlices"]),
        aligned=fields["kAligned"] == "true",
        overlap=fields["kOverlap"] == "true",
        undo=fields["kUndo"] == "true",
        resident_blocks=int(fields["kMinBlocks"]),
    )
    assert choice.spec == spec
    return choice
