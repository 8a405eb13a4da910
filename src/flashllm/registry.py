# SPDX-License-Identifier: Apache-2.0
"""The weight formats of the package, by name, and every kernel instance.

A new format is one entry of :data:`FORMATS`. Its modules load on first use, so listing the names costs nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from flashllm.errors import ArgumentError

if TYPE_CHECKING:
    from flashllm.formats.weight import SparseWeight
    from flashllm.jit.spec import KernelSpec
    from flashllm.matmul.kernel import Kernel


@dataclass(frozen=True, kw_only=True)
class FormatEntry:
    """Where the parts of a format are."""

    weight: str
    """``"module:Class"`` of the :class:`~flashllm.formats.weight.SparseWeight`."""
    kernel: str
    """Module that implements :class:`~flashllm.matmul.kernel.Kernel`."""
    encoder: str | None = None
    """Module of the device encoder, ``None`` where there is none: ``specs()`` lists its kernels, ``decode(w, out=...)``
    writes the dense matrix and allocates nothing."""


FORMATS: dict[str, FormatEntry] = {
    "tiled-csl": FormatEntry(
        weight="flashllm.formats.tiled_csl:TiledCSL",
        kernel="flashllm.matmul.tiled_csl",
        encoder="flashllm.encode.tiled_csl",
    ),
    "bitmap": FormatEntry(
        weight="flashllm.formats.bitmap:Bitmap",
        kernel="flashllm.matmul.bitmap",
        encoder="flashllm.encode.bitmap",
    ),
    "slot24": FormatEntry(
        weight="flashllm.formats.slot24:Slot24",
        kernel="flashllm.matmul.slot24",
        encoder="flashllm.encode.slot24",
    ),
}
"""Formats by name, as in ``SparseWeight.format``, files and result rows."""

DEFAULT_FORMAT = "tiled-csl"


def entry(name: str) -> FormatEntry:
    """The entry of format ``name``. Raises :class:`ArgumentError` with the known names for any other name."""
    found = FORMATS.get(name)
    if found is None:
        raise ArgumentError("format", expected=f"one of {', '.join(FORMATS)}", got=repr(name))
    return found


def weight_class(name: str) -> type[SparseWeight]:
    """The class of weights in format ``name``. Raises :class:`ArgumentError`."""
    module, _, attribute = entry(name).weight.partition(":")
    return cast("type[SparseWeight]", getattr(_module(module), attribute))


def kernel(name: str) -> Kernel:
    """The host module of the kernel for weights in format ``name``. Raises :class:`ArgumentError`."""
    return cast("Kernel", _module(entry(name).kernel))


def encoder(name: str) -> Any | None:
    """The module of the device encoder and decoder of format ``name``, if it has one. Raises :class:`ArgumentError`."""
    path = entry(name).encoder
    return None if path is None else _module(path)


@cache
def _module(path: str) -> Any:
    return importlib.import_module(path)


def all_specs() -> list[KernelSpec]:
    """Each spec once, in a fixed order: products, encoders, other systems, decoders, measurement helpers."""
    from flashllm import baselines, decoder
    from flashllm.bench import bandwidth, data

    kernels = [entry.kernel for entry in FORMATS.values()]
    encoders = [entry.encoder for entry in FORMATS.values() if entry.encoder is not None]
    decoders = [f"flashllm.decoder.{name}" for name in decoder.MODULES]
    sources = [*map(_module, (*kernels, *encoders, *baselines.kernel_modules(), *decoders)), bandwidth, data]
    return list(dict.fromkeys(spec for source in sources for spec in source.specs()))
