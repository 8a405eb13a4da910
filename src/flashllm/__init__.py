# SPDX-License-Identifier: Apache-2.0
"""Unstructured-sparse LLM weights on GPU tensor cores, from Python.

Public names load on first use, so ``import flashllm`` needs neither CuPy nor a GPU and takes no time::

    import flashllm

    w = flashllm.pack(weight)                  # [M, K] with zeros -> the format that suits it
    y = flashllm.spmm(x, w)                    # [N, K] -> [N, M]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashllm.errors import (
        ArgumentError,
        CompileError,
        DeviceMemoryError,
        FlashLLMError,
        FormatError,
        MissingDependencyError,
        UnsupportedDeviceError,
        VerificationError,
    )
    from flashllm.formats.bitmap import Bitmap
    from flashllm.formats.slot24 import Slot24
    from flashllm.formats.tiled_csl import TiledCSL
    from flashllm.formats.weight import SparseWeight
    from flashllm.matmul import Plan, pack, plan, spmm

__version__ = "0.1.0"

_HOME = {
    "ArgumentError": "flashllm.errors",
    "CompileError": "flashllm.errors",
    "DeviceMemoryError": "flashllm.errors",
    "FlashLLMError": "flashllm.errors",
    "FormatError": "flashllm.errors",
    "MissingDependencyError": "flashllm.errors",
    "UnsupportedDeviceError": "flashllm.errors",
    "VerificationError": "flashllm.errors",
    "Bitmap": "flashllm.formats.bitmap",
    "Slot24": "flashllm.formats.slot24",
    "SparseWeight": "flashllm.formats.weight",
    "TiledCSL": "flashllm.formats.tiled_csl",
    "Plan": "flashllm.matmul",
    "pack": "flashllm.matmul",
    "plan": "flashllm.matmul",
    "spmm": "flashllm.matmul",
}

__all__ = [
    "ArgumentError",
    "Bitmap",
    "CompileError",
    "DeviceMemoryError",
    "FlashLLMError",
    "FormatError",
    "MissingDependencyError",
    "Plan",
    "Slot24",
    "SparseWeight",
    "TiledCSL",
    "UnsupportedDeviceError",
    "VerificationError",
    "__version__",
    "pack",
    "plan",
    "spmm",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'flashllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
