# SPDX-License-Identifier: Apache-2.0
"""Which format suits a matrix, the expected numbers of rows of x and a GPU; docs/auto.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashllm.device import check_facts
from flashllm.errors import ArgumentError
from flashllm.formats.bits import check_dtype
from flashllm.gpus import DEFAULT_GPU, Gpu, find_gpu, gpu_of
from flashllm.matmul import model, tune_cache
from flashllm.matmul.expand import Expected, expected
from flashllm.matmul.sample import Contents, estimated, sampled
from flashllm.registry import FORMATS, entry, kernel, weight_class

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.formats.weight import SparseWeight

AUTO = "auto"
"""The name that stands for the format chosen here."""
DEFAULT_N = (8, 16, 32)
"""Numbers of rows of x for which a format is chosen when none are given: decoding a batch."""

Source = Literal["model", "measured", "model and measured"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One format for one matrix, with the time and the bytes that it would take."""

    format: str
    """A registered format, or ``"dense"``."""
    us: Mapping[int, float]
    """Microseconds of a product, by N."""
    weight_bytes: int
    source: Source
    """Where ``us`` comes from: the time model, or measurements of ``flashllm tune`` on this kind of GPU."""
    reason: str
    """One line on what decides the time."""

    @property
    def mean_us(self) -> float:
        """Geometric mean over the N."""
        return math.exp(math.fsum(map(math.log, self.us.values())) / len(self.us))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The formats that ``gpu`` can multiply, fastest first, for one matrix and some N."""

    candidates: tuple[Candidate, ...]
    dense: Candidate
    """The dense matrix and cuBLAS, for comparison."""
    contents: Contents
    gpu: Gpu

    @property
    def best(self) -> Candidate:
        """The format to take."""
        return self.candidates[0]


def rank_formats(
    shape: tuple[int, int],
    density: float,
    n: int | Sequence[int] = DEFAULT_N,
    *,
    dtype: str = "fp16",
    gpu: Gpu | None = None,
    formats: Sequence[str] | None = None,
) -> Ranking:
    """Rank ``formats`` (default: all) for W [M, K] with a fraction ``density`` stored at random places.

    They are ranked by the geometric mean of the times over ``n``, one or several numbers of rows of x. ``gpu`` is by
    default the current one or, if there is none, an H100 80GB. Formats without a kernel for it are left out. Raises
    :class:`ArgumentError`.
    """
    gpu = gpu or current_gpu()
    names = usable_formats(formats, gpu)
    return rank(estimated(shape, density, names, dtype=check_dtype(dtype)), n, gpu=gpu)


def rank_formats_of(
    a: Any,
    n: int | Sequence[int] = DEFAULT_N,
    *,
    dtype: str | None = None,
    gpu: Gpu | None = None,
    formats: Sequence[str] | None = None,
) -> Ranking:
    """:func:`rank_formats` for a given matrix: NumPy, CuPy or ``scipy.sparse``, as the encoders take it.

    Some of its rows are packed in every format, to detect a mask that suits one badly. Raises as the encoders do.
    """
    gpu = gpu or current_gpu()
    return rank(sampled(a, usable_formats(formats, gpu), dtype=dtype), n, gpu=gpu)


def rank(contents: Contents, n: int | Sequence[int], *, gpu: Gpu) -> Ranking:
    """Rank the formats of ``contents``. Raises :class:`ArgumentError` for a bad ``n``."""
    batches = check_batches(n)
    candidates = [_candidate(name, contents, batches, gpu) for name in contents.weight_bytes]
    m, k = contents.shape
    dense = Candidate(
        format="dense",
        us={count: model.dense_us(m, k, count, gpu=gpu) for count in batches},
        weight_bytes=2 * m * k,
        source="model",
        reason="cuBLAS, reading all elements",
    )
    ordered = sorted(candidates, key=lambda candidate: candidate.mean_us)
    return Ranking(candidates=tuple(ordered), dense=dense, contents=contents, gpu=gpu)


def pack(
    a: Any,
    *,
    format: str = AUTO,
    n: int | Sequence[int] = DEFAULT_N,
    dtype: str | None = None,
    device: DeviceFacts | None = None,
) -> SparseWeight:
    """Pack W [M, K] in the format whose products take the least time for ``n`` rows of x, or in ``format``.

    ``a`` is a dense NumPy or CuPy matrix or a CSR, CSC or COO ``scipy.sparse`` one; the weight is where ``a`` is.
    ``dtype`` is ``"fp16"`` or ``"bf16"``, by default bf16 for bf16 input, else fp16. ``device`` is the GPU to choose
    for, by default the current one or, if there is none, an H100 80GB. For several ``n``, the geometric mean of the
    times decides. Raises :class:`ArgumentError`, naming the argument.
    """
    batches = check_batches(n)
    gpu = gpu_of(check_facts(device)) if device is not None else None
    if format == AUTO:
        format = rank_formats_of(a, batches, dtype=dtype, gpu=gpu).best.format
    elif format not in FORMATS:
        raise ArgumentError("format", expected=f"{AUTO!r} or one of {', '.join(FORMATS)}", got=repr(format))
    made = weight_class(format)
    if type(a).__module__.partition(".")[0] == "scipy":
        return made.from_scipy(a, dtype=dtype or "fp16")
    return made.from_dense(a, dtype=dtype)


def current_gpu() -> Gpu:
    """The GPU in use or, if none can be used, the package's default."""
    from flashllm.device import device_facts, gpu_problem

    return find_gpu(DEFAULT_GPU) if gpu_problem() is not None else gpu_of(device_facts())


def check_batches(n: int | Sequence[int]) -> tuple[int, ...]:
    """``n`` as a tuple of numbers of rows of x. Raises :class:`ArgumentError`."""
    batches = tuple(n) if isinstance(n, Iterable) else (n,)
    if not batches or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in batches):
        raise ArgumentError("n", expected="an integer from 1 on, or several", got=repr(n))
    return tuple(dict.fromkeys(batches))


def usable_formats(formats: Sequence[str] | None, gpu: Gpu) -> list[str]:
    """The formats among ``formats`` (default: all) that have a time model and a kernel for ``gpu``.

    Raises :class:`ArgumentError` for an unknown format, and when none is left.
    """
    names = list(FORMATS) if formats is None else list(formats)
    for name in names:
        entry(name)
    usable = [
        name
        for name in names
        if model.is_modelled(name) and any(choice.spec.supports(gpu.arch) for choice in kernel(name).instances())
    ]
    if not usable:
        expected = f"a format with a kernel for sm_{gpu.arch} and a time model"
        raise ArgumentError("formats", expected=expected, got=", ".join(names))
    return usable


def _candidate(name: str, contents: Contents, batches: Sequence[int], gpu: Gpu) -> Candidate:
    us: dict[int, float] = {}
    bounds: dict[str, list[int]] = {}
    measured = 0
    for count in batches:
        modelled = _predict(name, contents, contents.density, contents.weight_bytes[name], count, gpu)
        found = tune_cache.measured(
            name, contents.shape, count, dtype=contents.dtype, density=contents.density, device=gpu
        )
        if found is None:
            us[count] = modelled.us
            bounds.setdefault("expanding" if modelled.expand else modelled.kernel.bound, []).append(count)
        else:  # measured on a matrix that may have been a little denser or sparser
            then = _predict(name, contents, found.density, found.weight_bytes, count, gpu)
            now, before = (one.expand_us if found.expanded else one.kernel.us for one in (modelled, then))
            us[count] = found.median_us * now / before
            bounds.setdefault("measured", []).append(count)
            measured += 1
    source: Source = "measured" if measured == len(batches) else "model and measured" if measured else "model"
    return Candidate(
        format=name,
        us=us,
        weight_bytes=contents.weight_bytes[name],
        source=source,
        reason="; ".join(_phrase(bound, counts, len(batches)) for bound, counts in bounds.items()),
    )


def _predict(name: str, contents: Contents, density: float, weight_bytes: int, n: int, gpu: Gpu) -> Expected:
    m, k = contents.shape
    return expected(name, m=m, k=k, n=n, weight_bytes=weight_bytes, density=density, gpu=gpu)


def _phrase(bound: str, counts: Sequence[int], of: int) -> str:
    at = f" at N = {', '.join(map(str, counts))}" if len(counts) < of else ""
    return f"{bound}{at}" if bound in ("measured", "expanding") else f"{bound} decides{at}"
