# SPDX-License-Identifier: Apache-2.0
"""What to measure: shapes, sparsities, batch sizes and the patterns of the zeros."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashllm.bench.models import find_model
from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.registry import DEFAULT_FORMAT, entry

PATTERNS: tuple[str, ...] = ("uniform", "row-equal", "per-row", "skewed", "columns", "block")
DEFAULT_SPARSITIES: tuple[float, ...] = (0.7, 0.8, 0.9)
DEFAULT_BATCHES: tuple[int, ...] = (8, 16, 32)
MAX_DIMENSION = 2**31 - 1
SMALL_SHAPES: tuple[tuple[int, int], ...] = ((512, 256), (1024, 512), (2048, 1024))
"""Shapes of a run without a GPU when no shape is requested."""
SMALL_ELEMENTS = 2**19
"""Without a GPU, a model's layers are scaled down to at most this many elements."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All cases that share the shape ``W[m, k]``: one batch of weights on the device, measured together.

    ``sparsities`` are the requested fractions of zeros; the single value ``None`` stands for a matrix read from a
    file, whose own fraction is ``zeros``.
    """

    m: int
    k: int
    sparsities: tuple[float | None, ...]
    batches: tuple[int, ...]
    dtype: DType = "fp16"
    pattern: str = "uniform"
    seed: int = 0
    model: str | None = None
    layer: str | None = None
    zeros: float | None = None
    formats: tuple[str, ...] = (DEFAULT_FORMAT,)
    """Formats to pack the weights in; each is a system of its own."""
    chosen: tuple[tuple[float | None, int, str], ...] | None = None
    """Where ``auto`` chose: the format for each sparsity and N, all of them in ``formats``. ``None``: every case runs
    in every format."""

    @property
    def title(self) -> str:
        """Short text for progress bars and messages, e.g. ``opt-30b fc1 28672x7168``."""
        return " ".join(part for part in (self.model, self.layer, f"{self.m}x{self.k}") if part)

    @property
    def cases(self) -> tuple[tuple[float | None, int, str], ...]:
        """(sparsity, N, format) of every case."""
        if self.chosen is not None:
            return self.chosen
        return tuple((s, n, name) for s in self.sparsities for n in self.batches for name in self.formats)

    def formats_for(self, sparsity: float | None) -> tuple[str, ...]:
        """The formats that the matrix of ``sparsity`` is packed in for at least one N."""
        used = {name for s, _, name in self.cases if s == sparsity}
        return tuple(name for name in self.formats if name in used)

    def choice(self, source: str) -> str:
        """The ``choice`` field of a row: ``source`` of the plan, marked where ``auto`` chose the format too."""
        return source if self.chosen is None else f"{source}-format"

    @property
    def dense_bytes(self) -> int:
        """Bytes of one dense copy of the weights."""
        return 2 * self.m * self.k


def split_list(text: str) -> list[str]:
    """Non-empty comma-separated parts of ``text``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_sparsities(text: str) -> tuple[float, ...]:
    """``"0.7,0.8"`` -> ``(0.7, 0.8)``: fractions of zeros, 0 <= s < 1, ascending and without repeats."""
    values: set[float] = set()
    for part in split_list(text):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < 1.0:
            hint = f" (for {part} % write {value / 100:g})" if 1.0 < value < 100.0 else ""
            raise ArgumentError("sparsity", expected="a fraction of zeros from 0 to below 1", got=part + hint)
        values.add(value)
    if not values:
        raise ArgumentError("sparsity", expected="at least one fraction such as 0.8", got=repr(text))
    return tuple(sorted(values))


def parse_formats(text: str) -> tuple[str, ...]:
    """``"tiled-csl"`` -> ``("tiled-csl",)``: registered formats, comma-separated, in order and without repeats."""
    names = tuple(dict.fromkeys(split_list(text)))
    for name in names:
        entry(name)
    if not names:
        raise ArgumentError("format", expected=f"at least one format such as {DEFAULT_FORMAT}", got=repr(text))
    return names


def parse_batches(text: str) -> tuple[int, ...]:
    """``"8,16"`` -> ``(8, 16)``: positive batch sizes N, ascending and without repeats."""
    values: set[int] = set()
    for part in split_list(text):
        if not part.isascii() or not part.isdigit() or not 1 <= int(part) <= 65536:
            raise ArgumentError("n", expected="batch sizes from 1 to 65536", got=part)
        values.add(int(part))
    if not values:
        raise ArgumentError("n", expected="at least one batch size such as 16", got=repr(text))
    return tuple(sorted(values))


def parse_shapes(texts: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """``["28672x8192,4096x4096"]`` -> ``((28672, 8192), (4096, 4096))``: M outputs x K inputs, in order."""
    shapes: dict[tuple[int, int], None] = {}
    for text in texts:
        parts = split_list(text)
        if not parts:
            raise ArgumentError("shape", expected="at least one shape such as 28672x8192", got=repr(text))
        for part in parts:
            match = re.fullmatch(r"([0-9]+)[xX*]([0-9]+)", part)
            m, k = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
            if not (1 <= m <= MAX_DIMENSION and 1 <= k <= MAX_DIMENSION):
                raise ArgumentError("shape", expected="MxK with M, K from 1 to 2^31 - 1, e.g. 28672x8192", got=part)
            shapes[m, k] = None
    return tuple(shapes)


def parse_models(texts: Iterable[str]) -> tuple[str, ...]:
    """``["opt-30b,opt-66b"]`` -> ``("opt-30b", "opt-66b")``: names, in order; they may be unknown."""
    names: list[str] = []
    for text in texts:
        parts = split_list(text)
        if not parts:
            raise ArgumentError("model", expected="at least one model such as opt-30b", got=repr(text))
        names += parts
    return tuple(names)


def build_groups(
    *,
    models: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    sparsities: tuple[float | None, ...],
    batches: tuple[int, ...],
    dtype: DType = "fp16",
    pattern: str = "uniform",
    seed: int = 0,
    formats: tuple[str, ...] = (DEFAULT_FORMAT,),
    max_elements: int | None = None,
) -> list[Group]:
    """One group per layer of ``models`` and per entry of ``shapes``.

    With ``max_elements``, layers of models are scaled down by a power of two until they hold no more
    elements; the scale is part of the model's name (``opt-30b/16``). Raises :class:`ArgumentError` on an
    unknown model.
    """

    def group(m: int, k: int, model: str | None = None, layer: str | None = None) -> Group:
        return Group(
            m=m,
            k=k,
            sparsities=sparsities,
            batches=batches,
            dtype=dtype,
            pattern=pattern,
            seed=seed,
            model=model,
            layer=layer,
            formats=formats,
        )

    groups: dict[Group, None] = {}
    for name in models:
        model = find_model(name)
        scale = 1
        while max_elements and max(la.m * la.k for la in model.layers) > max_elements * scale * scale:
            scale *= 2
        label = model.name if scale == 1 else f"{model.name}/{scale}"
        for layer in model.layers:
            groups[group(layer.m // scale, layer.k // scale, label, layer.name)] = None
    for m, k in shapes:
        groups[group(m, k)] = None
    return list(groups)
