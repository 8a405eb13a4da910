# SPDX-License-Identifier: Apache-2.0
"""Other systems to compare with, called so that a CUDA graph can capture them. docs/baselines.md says what each is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flashllm.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class SystemEntry:
    """Where a system is and which matrix it gets."""

    weight: str | None
    """``"module:Class"`` of a ``Baseline`` or ``LibraryBaseline`` of baselines/baseline.py; ``None``: cuBLAS."""
    matrix: Literal["given", "2:4", "dense"] = "given"
    """The matrix of the case; or one without zeros, with half of its values pruned to the 2:4 pattern, or dense."""
    needs: tuple[str, ...] = ()
    """Packages, beside CuPy."""
    bytes_per_element: Callable[[float], float]
    """About how many bytes a weight takes per element of W, by density."""


SYSTEMS: dict[str, SystemEntry] = {
    "cublas-notc": SystemEntry(weight=None, matrix="dense", bytes_per_element=lambda density: 0.0),
    "cusparse": SystemEntry(
        weight="flashllm.baselines.cusparse:CusparseCsr", bytes_per_element=lambda density: 6 * density + 0.1
    ),
    "sputnik": SystemEntry(
        weight="flashllm.baselines.sputnik:Sputnik", bytes_per_element=lambda density: 4 * density + 0.1
    ),
    "sparta": SystemEntry(
        weight="flashllm.baselines.sparta:SparTA",
        bytes_per_element=lambda density: 1.25 + 4 * density**3 * (1 - density) + 2 * density**4,
    ),
    "sparta-cusparselt": SystemEntry(
        weight="flashllm.baselines.sparta_cusparselt:SparTACusparseLt",
        needs=("torch",),
        bytes_per_element=lambda density: 1.25 + 4 * density**3 * (1 - density) + 2 * density**4,
    ),
    "tca-bme": SystemEntry(
        weight="flashllm.baselines.tca_bme:TcaBme", bytes_per_element=lambda density: 2 * density + 0.15
    ),
    "mma-2:4": SystemEntry(
        weight="flashllm.baselines.two_four:TwoFour", matrix="2:4", bytes_per_element=lambda density: 1.125
    ),
    "cusparselt-2:4": SystemEntry(
        weight="flashllm.baselines.cusparselt:CusparseLt24",
        matrix="2:4",
        needs=("torch",),
        bytes_per_element=lambda density: 1.125,
    ),
    "torch-int4": SystemEntry(
        weight="flashllm.baselines.quantised:TorchInt4",
        matrix="dense",
        needs=("torch",),
        bytes_per_element=lambda density: 1.6,
    ),
    "torch-fp8": SystemEntry(
        weight="flashllm.baselines.quantised:TorchFp8",
        matrix="dense",
        needs=("torch",),
        bytes_per_element=lambda density: 1.0,
    ),
}
"""By their names in result rows."""


def parse_systems(text: str) -> tuple[str, ...]:
    """``"sputnik,cusparse"`` -> their names, in the order of :data:`SYSTEMS`; ``"all"``: those that can run here.

    Raises :class:`ArgumentError` for an unknown name.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in SYSTEMS and name != "all":
            raise ArgumentError("systems", expected=f"all, or some of {', '.join(SYSTEMS)}", got=repr(name))
    if not names:
        raise ArgumentError("systems", expected="all, or at least one system", got=repr(text))
    if "all" in names:
        names += [name for name, entry in SYSTEMS.items() if all(map(_is_installed, entry.needs))]
    return tuple(name for name in SYSTEMS if name in names)


def weight_class(name: str) -> Any:
    """The weight class of system ``name``, which has to have one."""
    module, _, attribute = (SYSTEMS[name].weight or "").partition(":")
    return getattr(importlib.import_module(module), attribute)


def kernel_modules() -> tuple[str, ...]:
    """Modules of the systems whose kernels are our own; ``specs()`` of each lists them."""
    return tuple(f"{__name__}.{name}" for name in ("sputnik", "two_four", "sparta", "tca_bme"))


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
