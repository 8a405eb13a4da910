# SPDX-License-Identifier: Apache-2.0
"""From the options of a command line to the groups of cases and the source of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashllm.bench import cases
from flashllm.bench.auto_cases import choose_formats
from flashllm.bench.cases import Group
from flashllm.bench.models import PAPER_MODELS
from flashllm.bench.sources import FileSource, RandomSource, Source
from flashllm.errors import ArgumentError
from flashllm.formats.bits import check_dtype
from flashllm.gpus import Gpu
from flashllm.matmul.auto import AUTO
from flashllm.registry import FORMATS


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run is to measure. ``notes`` are lines the user should read first."""

    groups: list[Group]
    source: Source
    notes: tuple[str, ...] = ()

    @property
    def cases(self) -> int:
        """Number of (shape, sparsity, N, format) cases."""
        return sum(len(group.cases) for group in self.groups)


def plan_work(
    *,
    backend: str,
    models: Sequence[str] = (),
    shapes: Sequence[str] = (),
    weights: Path | None = None,
    tensor: str | None = None,
    sparsity: str | None = None,
    n: str | None = None,
    dtype: str | None = None,
    pattern: str | None = None,
    seed: int = 0,
    formats: str | None = None,
    gpu: Gpu | None = None,
) -> Work:
    """Check the options together and build the groups; ``None`` and empty mean: not given.

    ``formats`` are names, comma-separated, or ``"auto"``: for each case the format that takes the least time on
    ``gpu``, or every format if ``gpu`` is ``None``. By default a packed weight keeps its own format, and everything
    else is ``"auto"``. Without models, shapes and weights: the 12 shapes of the paper, or three small ones where
    ``backend`` is not ``"cuda"``. Without a GPU, a model's layers are scaled down. Raises ``ArgumentError``,
    ``FormatError``, ``OSError``.
    """
    batches = cases.parse_batches(n) if n is not None else cases.DEFAULT_BATCHES
    kind = None if dtype is None else check_dtype(dtype)
    packed = None if formats is None or formats.strip() == AUTO else cases.parse_formats(formats)
    if weights is not None:
        for name, given in (
            ("model", models),
            ("shape", shapes),
            ("sparsity", sparsity),
            ("pattern", pattern),
        ):
            if given:
                raise ArgumentError(name, expected="nothing beside --weights, which has its own", got=str(given))
        file = FileSource(weights, tensor, kind)
        m, k = file.shape
        zeros = 1.0 - file.density(None)
        if formats is None and file.format is not None:
            packed = (file.format,)
        group = Group(
            m=m,
            k=k,
            sparsities=(None,),
            batches=batches,
            dtype=file.dtype,
            pattern="file",
            seed=seed,
            model=file.name,
            layer=file.tensor,
            zeros=zeros,
            formats=packed or tuple(FORMATS),
        )
        report = file.rounding.report()
        notes = [f"{file.name}: {m}x{k}, {100 * zeros:.2f} % zeros"]
        if report.changed:
            notes.append(
                f"{report.changed:,} of {report.total:,} values rounded to {file.dtype}, "
                f"{report.became_zero:,} became zero"
            )
        if packed is None and gpu is not None:
            group = choose_formats(group, file, gpu=gpu)
        return Work(groups=[group], source=file, notes=tuple(notes))
    if tensor is not None:
        raise ArgumentError("tensor", expected="nothing without --weights", got=repr(tensor))
    if pattern is not None and pattern not in cases.PATTERNS:
        raise ArgumentError("pattern", expected=f"one of {', '.join(cases.PATTERNS)}", got=repr(pattern))
    sizes = cases.parse_shapes(shapes)
    names = cases.parse_models(models)
    small = backend != "cuda"
    if not names and not sizes:
        if small:
            sizes = cases.SMALL_SHAPES
        else:
            names = PAPER_MODELS
    groups = cases.build_groups(
        models=names,
        shapes=sizes,
        sparsities=cases.parse_sparsities(sparsity) if sparsity is not None else cases.DEFAULT_SPARSITIES,
        batches=batches,
        dtype=kind or "fp16",
        pattern=pattern or "uniform",
        seed=seed,
        formats=packed or tuple(FORMATS),
        max_elements=cases.SMALL_ELEMENTS if small else None,
    )
    source = RandomSource()
    if packed is None and gpu is not None:
        groups = [choose_formats(group, source, gpu=gpu) for group in groups]
    scaled = small and bool(names)
    note = ("layers of models are scaled down here, see their names; --shape takes any size",) if scaled else ()
    return Work(groups=groups, source=source, notes=note)
