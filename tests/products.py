# SPDX-License-Identifier: Apache-2.0
"""Operands and exact results of products, for kernels on a GPU and on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm import registry
from flashllm.formats.weight import SparseWeight
from flashllm.jit.spec import KernelSpec
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


def packed(name: str, w: NDArray[Any], **options: Any) -> SparseWeight:
    """``w`` in format ``name``."""
    return registry.weight_class(name).from_dense(w, **options)


def arch_of(spec: KernelSpec) -> str:
    """The architecture to emulate ``spec`` as: the tuned one, or the oldest, or the newest."""
    return next(arch for arch in ("90a", "80", "120a") if spec.supports(arch))


def choice_of(spec: KernelSpec) -> Any:
    """The choice that asks for ``spec``, whatever its format."""
    instances = (choice for name in registry.FORMATS for choice in registry.kernel(name).instances())
    return next(choice for choice in instances if choice.spec == spec)


def format_of(spec: KernelSpec) -> str:
    """The format that ``spec`` multiplies."""
    return next(name for name in registry.FORMATS if spec in registry.kernel(name).specs())
