# SPDX-License-Identifier: Apache-2.0
"""What is verified: kernel instances x shapes x N x dtypes x patterns x kinds of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Literal

from flashllm import registry
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES, DType
from flashllm.formats.bits import check_dtype
from flashllm.jit.spec import KernelSpec, normalize_arch
from flashllm.matmul.kernel import KernelChoice

Operands = Literal["integers", "random", "special"]

EMULATED_ARCHS: tuple[str, ...] = ("80", "90a")
"""The two code paths of the kernels."""
SHAPES: dict[bool, tuple[tuple[int, int], ...]] = {
    True: ((128, 64), (7, 16), (200, 456), (300, 1032)),
    False: ((1, 1), (130, 63), (200, 455), (300, 1031)),
}
"""M x K by whether K is a multiple of 8: one tile, part of one, ragged edges, rows of tiles that blocks share."""
LARGE_SHAPES: dict[bool, tuple[int, int]] = {True: (4104, 2056), False: (4103, 2055)}
"""Checked only on a GPU: more tiles than it has blocks."""
LONG_SHAPES: dict[bool, tuple[int, int]] = {True: (72, 24840), False: (57, 24839)}
"""Rows so long that a block that has one to itself ends a chain of accumulations inside it."""
LONG_COLUMN_BLOCKS = 3
"""N in column blocks: as many as one multiprocessor has blocks, which leaves one block per row of tiles."""
TILE = (128, 64)
"""The tile of the checkerboard pattern, which is that of our formats."""
TYPICAL = ("uniform", 0.8)
PATTERNS: tuple[tuple[str, float], ...] = (
    TYPICAL,
    ("uniform", 0.98),
    ("per-row", 0.7),
    ("skewed", 0.7),
    ("columns", 0.8),
    ("block", 0.9),
    ("every-other-tile", 0.5),
    ("full", 0.0),
    ("empty", 1.0),
)
"""Where the zeros are and the fraction of them."""
QUICK_PATTERNS = (TYPICAL, ("skewed", 0.7), ("full", 0.0))
_HOST_COLUMNS = 8  # columns of x where there is no kernel to determine them


@dataclass(frozen=True, kw_only=True)
class Data:
    """The operands of a case, apart from the kernel that multiplies them."""

    m: int
    k: int
    n: int
    dtype: DType
    format: str
    pattern: str
    sparsity: float
    operands: Operands
    """Small integers; random values; small integers with NaN, infinities and sums that overflow."""
    encoding: str = "default"
    """Which of the ``ENCODINGS`` of the format."""
    layout: tuple[tuple[str, int], ...] = ()
    """Further options: those of the ``LAYOUT`` that the kernel multiplies."""
    seed: int = 0

    @property
    def pattern_text(self) -> str:
        """E.g. ``skewed 0.7``, ``full``."""
        partial = 0.0 < self.sparsity < 1.0
        return f"{self.pattern} {self.sparsity:g}" if partial else self.pattern

    @property
    def text(self) -> str:
        """One line that names the case."""
        packed = self.format if self.encoding == "default" else f"{self.format} in {self.encoding}"
        packed += "".join(f" {name}={value}" for name, value in self.layout)
        return f"{self.m}x{self.k} N={self.n} {self.dtype} {self.pattern_text} {self.operands}, {packed}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product to check."""

    choice: KernelChoice | None
    """The kernel instance; ``None`` for NumPy."""
    arch: str | None
    data: Data
    schedule: int = 0
    """Seed of the emulator's schedule."""

    @property
    def sm_count(self) -> int | None:
        """Multiprocessors to plan for; ``None``: all that there are."""
        return 1 if (self.data.m, self.data.k) in LONG_SHAPES.values() else None

    @property
    def kernel(self) -> str:
        """The label of the kernel instance."""
        return "numpy" if self.choice is None else self.choice.spec.label

    @property
    def text(self) -> str:
        """One line that names kernel and case."""
        return f"{self.kernel}{f' sm_{self.arch}' if self.arch else ''}: {self.data.text}"


def short_label(spec: KernelSpec) -> str:
    """The label without the dtype and the flags that are set: ``tiled_csl kN=8 kSlices=2 ...``."""
    shown = [f"{name}={text}" for name, text in spec.template if name != "T" and text != "true"]
    return " ".join((spec.name, *shown))


def build_cases(
    *,
    backend: str,
    archs: tuple[str, ...],
    formats: Sequence[str] | None = None,
    quick: bool = False,
    kernel: str = "",
    seed: int = 0,
) -> list[Case]:
    """All cases of ``backend`` for kernels of ``archs`` whose label contains ``kernel``, grouped by kernel.

    ``formats`` are names, ``None`` for all there are. Raises :class:`ArgumentError` when no kernel is left.
    """
    cases: list[Case] = []
    for name in registry.FORMATS if formats is None else formats:
        if backend == "reference":
            cases += _host_cases(name, kernel, quick, seed)
        else:
            for arch in dict.fromkeys(map(normalize_arch, archs)):
                cases += _kernel_cases(name, arch, kernel, quick, backend == "cuda" and not quick, seed)
    if not cases:
        where = "numpy" if backend == "reference" else f"for sm_{', sm_'.join(archs)}"
        raise ArgumentError("kernel", expected=f"part of the label of a kernel {where}", got=repr(kernel))
    return cases


def _host_cases(name: str, kernel: str, quick: bool, seed: int) -> Iterator[Case]:
    for dtype in DTYPES if kernel in "numpy" else ():
        for aligned in (True, False):
            for data in _data(name, dtype, _HOST_COLUMNS, aligned, quick, False, seed):
                yield Case(choice=None, arch=None, data=data)


def _kernel_cases(name: str, arch: str, kernel: str, quick: bool, large: bool, seed: int) -> Iterator[Case]:
    for choice in _instances(name, arch, quick):
        if kernel in choice.spec.label:
            made = registry.weight_class(name)
            layout = tuple((field, getattr(choice, field)) for field in made.LAYOUT)
            found = _data(name, check_dtype(choice.dtype), choice.n_block, choice.aligned, quick, large, seed)
            densest = made.densest(**dict(layout))
            for i, data in enumerate(found):
                if not made.ENCODINGS[data.encoding].keys().isdisjoint(made.LAYOUT):
                    continue
                if densest < 1:
                    data = replace(data, pattern="uniform", sparsity=max(data.sparsity, 1 - densest))
                yield Case(choice=choice, arch=arch, data=replace(data, layout=layout), schedule=seed + i)


def _instances(name: str, arch: str, quick: bool) -> list[KernelChoice]:
    module = registry.kernel(name)
    found = module.typical(arch) if quick else module.instances()
    # Kernels that multiply the same operands follow one another, as expected results are cached for a while.
    return sorted(
        (choice for choice in found if choice.spec.supports(arch)),
        key=lambda choice: (choice.dtype != "fp16", choice.n_block, not choice.aligned),
    )


def _data(name: str, dtype: DType, n_block: int, aligned: bool, quick: bool, large: bool, seed: int) -> Iterator[Data]:
    sizes = cycle((n_block, n_block - 3, n_block + 1, 1, 2 * n_block + 2))
    shapes = SHAPES[aligned][2:3] if quick else SHAPES[aligned]

    def data(shape: tuple[int, int], pattern: tuple[str, float], operands: Operands, n: int | None = None) -> Data:
        return Data(
            m=shape[0],
            k=shape[1],
            n=next(sizes) if n is None else n,
            dtype=dtype,
            format=name,
            pattern=pattern[0],
            sparsity=pattern[1],
            operands=operands,
            seed=seed,
        )

    for shape in shapes:
        for pattern in QUICK_PATTERNS if quick else PATTERNS:
            yield data(shape, pattern, "integers")
        yield data(shape, TYPICAL, "random", n_block)
    ragged = SHAPES[aligned][2]
    yield data(ragged, TYPICAL, "special", n_block)
    if quick:
        return
    yield data(ragged, ("full", 0.0), "special", n_block + 1)
    yield data(ragged, ("full", 0.0), "random", n_block)
    for encoding in registry.weight_class(name).ENCODINGS:
        if encoding != "default":
            yield replace(data(ragged, TYPICAL, "integers", n_block), encoding=encoding)
    yield data(LONG_SHAPES[aligned], ("uniform", 0.98), "integers", LONG_COLUMN_BLOCKS * n_block)
    if large:
        yield data(LARGE_SHAPES[aligned], TYPICAL, "integers", n_block)
        yield data(LARGE_SHAPES[aligned], TYPICAL, "random", n_block)
