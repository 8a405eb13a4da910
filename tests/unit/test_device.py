# SPDX-License-Identifier: Apache-2.0
"""Errors about the GPU, on a machine that need not have one."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from flashllm import TiledCSL, device
from flashllm.errors import ArgumentError, DeviceMemoryError, MissingDependencyError
from flashllm.matmul import product


class _OutOfMemory(MemoryError):
    pass


def _fake_cupy(monkeypatch: pytest.MonkeyPatch, **runtime: Any) -> Any:
    cupy: Any = types.ModuleType("cupy")
    memory = types.SimpleNamespace(OutOfMemoryError=_OutOfMemory)
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(**runtime), memory=memory)
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 100)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(device, "_usable", set())
    return cupy


def test_memory_errors_say_what_is_needed_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_cupy(monkeypatch, memGetInfo=lambda: (900, 5000))
    with (
        pytest.raises(DeviceMemoryError, match=r"^weight: needs 12,345 bytes of device memory, 1,000 are free$"),
        device.memory_errors("weight", 12_345),
    ):
        raise _OutOfMemory
    with pytest.raises(ValueError, match="other"), device.memory_errors("weight", 1):
        raise ValueError("other")


def test_to_device_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_problem", lambda: "the driver reports no GPU")
    weight = TiledCSL.from_dense(np.ones((2, 2), np.float16))
    with pytest.raises(MissingDependencyError, match="to_device: the driver reports no GPU; see `flashllm doctor`"):
        weight.to_device()


def test_problems_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    _fake_cupy(monkeypatch, getDeviceCount=no_driver)
    assert device.device_count() == (0, "no usable NVIDIA driver or GPU (cudaErrorInsufficientDriver)")
    assert device.gpu_problem() == device.device_count()[1]
    _fake_cupy(monkeypatch, getDeviceCount=lambda: 0)
    assert device.gpu_problem() == "the driver reports no GPU"
    _fake_cupy(
        monkeypatch,
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda index: {"major": 7, "minor": 5},
    )
    assert "compute capability 7.5; the kernels need 8.0" in str(device.gpu_problem())
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "CuPy is not installed" in str(device.gpu_problem())


def test_dlpack_input_from_the_host_is_refused() -> None:
    class Foreign:
        shape, dtype = (4, 4), "float16"

        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("not to be asked for")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(ArgumentError, match=r"x: expected an array on the GPU, got Foreign .* on DLPack device type 1"):
        product._from_dlpack(Foreign(), None)
