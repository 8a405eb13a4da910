# SPDX-License-Identifier: Apache-2.0
"""As much of CuPy as the host side of an encoder needs, in NumPy; launches go to the emulator.

For tests of what no other test without a GPU runs: which kernels are launched, with which arguments, and how their
results are used.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from flashllm.backends import emulator
from flashllm.encode import source
from flashllm.jit.spec import KernelSpec


class Array(np.ndarray[Any, Any]):
    """A NumPy array that presents itself as a CuPy array. ``empty`` ones are filled with a pattern."""

    __module__ = "cupy"

    @property
    def device(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(id=0)

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> Any:
        return np.array(self)


def asarray(a: Any) -> Any:
    """``a`` on the fake GPU."""
    return np.ascontiguousarray(a).view(Array)


def _empty(shape: Any, dtype: Any) -> Any:
    out = asarray(np.empty(shape, dtype))
    out.view(np.uint8)[...] = 0xA5
    return out


@contextmanager
def _memory_errors(what: str, needed: int) -> Iterator[None]:
    assert what
    assert needed >= 0
    yield


def install(monkeypatch: pytest.MonkeyPatch, *encoders: Any) -> list[str]:
    """Install it in place of CuPy for the modules ``encoders``; returns a list that will name the kernels launched."""
    module = types.ModuleType("cupy")
    module.__dict__.update(
        ndarray=Array,
        empty=_empty,
        zeros=lambda shape, dtype: asarray(np.zeros(shape, dtype)),
        stack=lambda arrays: asarray(np.stack(arrays)),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(source, "current_device", lambda: 0)
    launched: list[str] = []

    def launch(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
        launched.append(spec.name)
        emulator.launch(spec, grid, args, seed=len(launched))

    for encoder in encoders:
        monkeypatch.setattr(encoder, "launch", launch)
        monkeypatch.setattr(encoder, "memory_errors", _memory_errors)
    return launched
