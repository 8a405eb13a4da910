# SPDX-License-Identifier: Apache-2.0
"""Operands and exact results of products, for kernels on a GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import registry
from flashllm.formats import runs
from flashllm.formats.slot24 import Slot24
from flashllm.formats.weight import SparseWeight
from flashllm.jit.spec import KernelSpec
from flashllm.matmul import slot24
from weight_cases import NUMPY_DTYPE, mask


def integers(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> NDArray[Any]:
    """Random integers 1..4 with either sign."""
    values = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)
    return values.astype(NUMPY_DTYPE[dtype])


def weight(pattern: str, shape: tuple[int, int], density: float, dtype: str, seed: int = 0) -> NDArray[Any]:
    """Small integers where ``pattern`` keeps an element."""
    values = integers(np.random.default_rng(seed), shape, dtype)
    values[~mask(pattern, *shape, density, seed)] = 0
    return values


def exact(x: NDArray[Any], w: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The product of integers, as exact in float64 as in int64 and far faster, rounded once, to nearest even."""
    with np.errstate(over="ignore"):
        product = x.astype(np.float64) @ w.astype(np.float64).T + 0.0  # no zero is negative
        return product.astype(NUMPY_DTYPE[dtype])


def assert_exact(got: NDArray[Any], want: NDArray[Any]) -> None:
    """Equal bits, except that a zero may have either sign."""
    wrong = np.argwhere((got.view(np.uint16) != want.view(np.uint16)) & ~(got == want))
    assert wrong.size == 0, (
        f"{len(wrong)} wrong, first y{wrong[0].tolist()}: got {got[tuple(wrong[0])]}, expected {want[tuple(wrong[0])]}"
    )


def special(w: NDArray[Any], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """``w`` (fp16 integers, larger than 200 x 100) with NaN and infinities among its elements, and x with some."""
    w = w.copy()
    w[3, 5], w[200, 100], w[10, 64] = np.nan, np.inf, -np.inf
    x = integers(np.random.default_rng(6), (n, w.shape[1]), "fp16")
    x[0, 100] = 0  # times the infinity of w: NaN
    x[2, 70], x[4, 7] = np.inf, np.nan  # meet stored elements, and zeros of nearly every row of W
    x[5, 20], x[5, 21] = np.inf, -np.inf
    return w, x


def assert_special(name: str, got: NDArray[Any], x: NDArray[Any], w: NDArray[Any]) -> None:
    """fp16 ``got`` is the dense product; if format ``name`` leaves zeros out, some elements lack those terms."""
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        dense = (wide_x @ wide_w.T).astype(np.float16)
        terms = wide_x[:, None] * wide_w
        stored = np.where(wide_w != 0, terms, 0).sum(axis=-1).astype(np.float16)
    as_dense, as_stored = (_same(got, want) for want in (dense, stored))
    if registry.weight_class(name).MULTIPLIES_ZEROS:
        assert as_dense.all()
    else:
        assert (as_dense | as_stored).all()
        assert not as_dense.all(), "MULTIPLIES_ZEROS could be True"
    finite = np.isfinite(x).all(axis=1)
    assert as_dense[finite].all()


def _same(got: NDArray[Any], want: NDArray[Any]) -> NDArray[np.bool_]:
    return (got == want) | (np.isnan(got) & np.isnan(want))


def packed(name: str, w: NDArray[Any], **options: Any) -> SparseWeight:
    """``w`` in format ``name``."""
    return registry.weight_class(name).from_dense(w, **options)


def packed_weight(
    name: str, pattern: str, shape: tuple[int, int], density: float, dtype: str = "fp16", seed: int = 0
) -> tuple[NDArray[Any], SparseWeight]:
    """A ``weight``, dense and in format ``name``, cached for other tests: packing takes as long as a product."""
    return _packed_weight(name, pattern, shape, density, dtype, seed, runs.RUNS)


@lru_cache(maxsize=256)
def _packed_weight(
    name: str, pattern: str, shape: tuple[int, int], density: float, dtype: str, seed: int, runs_of_tiles: int
) -> tuple[NDArray[Any], SparseWeight]:
    """``runs_of_tiles``: packing depends on it, and some tests change it."""
    w = weight(pattern, shape, density, dtype, seed)
    w.flags.writeable = False
    return w, packed(name, w)


def every_pair(names: str, first: Collection[Any], second: Collection[Any], third: Sequence[Any]) -> Any:
    """Gives a test three parameters, so that every value of each meets every value of the others.

    Far fewer cases than all combinations, yet what is wrong for two values together is still found.
    """
    assert len(third) <= min(len(first), len(second)), "some pairs would be left out"
    cases = [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]
    return pytest.mark.parametrize(names.split(", "), cases, ids=str)


def arch_of(spec: KernelSpec) -> str:
    """The architecture to emulate ``spec`` as: the tuned one, or the oldest, or the newest."""
    return next(arch for arch in ("90a", "80", "120a") if spec.supports(arch))


def choice_of(spec: KernelSpec) -> Any:
    """The choice whose kernel is ``spec``, whatever its format."""
    instances = (choice for name in registry.FORMATS for choice in registry.kernel(name).instances())
    return next(choice for choice in instances if choice.spec == spec)


def format_of(spec: KernelSpec) -> str:
    """The format that ``spec`` multiplies."""
    return next(name for name in registry.FORMATS if spec in registry.kernel(name).specs())


def packed_for(spec: KernelSpec, w: NDArray[Any]) -> tuple[NDArray[Any], SparseWeight]:
    """``w`` as ``spec`` multiplies it, dense and packed; thinned out where the layout does not take every mask."""
    return packed_as(format_of(spec), layout_of(spec), w)


def layout_of(spec: KernelSpec) -> dict[str, int]:
    """The layout of the weights that ``spec`` multiplies."""
    choice = choice_of(spec)
    return {field: getattr(choice, field) for field in registry.weight_class(format_of(spec)).LAYOUT}


def packed_as(name: str, layout: dict[str, int], w: NDArray[Any]) -> tuple[NDArray[Any], SparseWeight]:
    """``w`` dense and packed with ``layout``; thinned out where the layout does not take every mask."""
    if (densest := registry.weight_class(name).densest(**layout)) < 1:
        kept = np.random.default_rng(w.size).random(w.shape) < densest
        w = np.where(kept, w, np.zeros((), w.dtype))
    return w, packed(name, w, **layout)


def narrow(sparse: Slot24, n: int, arch: str) -> slot24.Choice:
    """The instance of slot24 with blocks of at most 32 columns; wide ones have test files of their own."""
    return next(c for c in slot24.candidates(sparse, n, arch=arch) if c.n_block in slot24.N_BLOCKS)
