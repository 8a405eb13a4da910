# SPDX-License-Identifier: Apache-2.0
"""Launches that may overlap the previous one, down to the call of the driver, which is fake."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashllm import Bitmap, spmm
from flashllm.backends import cuda, dependent
from flashllm.errors import MissingDependencyError, UnsupportedDeviceError
from flashllm.jit.spec import KernelSpec

SPEC = KernelSpec(name="fake", source="spmm/fake.cu", function="fake", threads=160, shared_bytes=4096)


class _DriverError(RuntimeError):
    pass


def _pointer(address: int) -> Any:
    return types.SimpleNamespace(data=types.SimpleNamespace(ptr=address))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``cuLaunchKernelEx`` is given, in the real package's structures; status 0 unless a test changes it."""
    real = pytest.importorskip("cuda.bindings.driver")
    found: list[dict[str, Any]] = []

    def launch(config: Any, function: int, parameters: int, extra: int) -> tuple[int]:
        at = [ctypes.c_uint64.from_address(parameters + 8 * i).value for i in range(3)]
        found.append(
            {
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "stream": int(config.hStream),
                "attributes": [(int(a.id), a.value.programmaticStreamSerializationAllowed) for a in config.attrs],
                "count": config.numAttrs,
                "function": function,
                "arguments": (
                    ctypes.c_uint64.from_address(at[0]).value,
                    ctypes.c_int32.from_address(at[1]).value,
                    ctypes.c_uint64.from_address(at[2]).value,
                ),
                "extra": extra,
            }
        )
        return (launch.status,)  # type: ignore[attr-defined]

    launch.status = 0  # type: ignore[attr-defined]
    names = ("CUlaunchAttribute", "CUlaunchAttributeID", "CUlaunchConfig")
    driver = types.SimpleNamespace(**{name: getattr(real, name) for name in names}, cuLaunchKernelEx=launch)
    monkeypatch.setattr(dependent, "_driver", lambda: driver)
    cupy: Any = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: 0, setDevice=lambda index: None),
        get_current_stream=lambda: types.SimpleNamespace(ptr=2),
        driver=types.SimpleNamespace(CUDADriverError=_DriverError),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    kernel = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=0xABC))
    monkeypatch.setattr(cuda, "load", lambda spec: kernel)
    found.append({"launch": launch})
    return found


ARGS = (_pointer(2**40 + 5), np.int32(-7), _pointer(2**41))


def test_the_driver_gets_the_launch_with_the_attribute(calls: list[dict[str, Any]]) -> None:
    cuda.launch(SPEC, (132, 2), ARGS, stream=types.SimpleNamespace(ptr=77), overlap_previous=True)
    assert calls[1] == {
        "grid": (132, 2, 1),
        "block": (160, 1, 1),
        "shared": 4096,
        "stream": 77,
        "attributes": [(6, 1)],  # programmatic stream serialization
        "count": 1,
        "function": 0xABC,
        "arguments": (2**40 + 5, -7, 2**41),
        "extra": 0,
    }


def test_without_a_stream_it_is_the_current_one(calls: list[dict[str, Any]]) -> None:
    cuda.launch(SPEC, (1,), ARGS, overlap_previous=True)
    assert (calls[1]["stream"], calls[1]["grid"]) == (2, (1, 1, 1))


def test_a_refused_launch_is_the_error_that_cupy_raises(calls: list[dict[str, Any]]) -> None:
    launch: Callable[..., Any] = calls[0]["launch"]
    launch.status = 701  # type: ignore[attr-defined]
    with pytest.raises(_DriverError, match="701"):
        cuda.launch(SPEC, (1,), ARGS, overlap_previous=True)


def _facts(cc: tuple[int, int]) -> Any:
    return types.SimpleNamespace(name="NVIDIA Pretend", cc=cc)


def test_older_gpus_are_refused() -> None:
    with pytest.raises(
        UnsupportedDeviceError, match=r"needs compute capability 9\.0 or newer, NVIDIA Pretend has 8\.9"
    ):
        dependent.check(_facts((8, 9)))


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match="needs cuda-bindings, which the extras cuda12 and cuda13 bring"):
        dependent.check(_facts((9, 0)))


def test_on_the_host_there_is_nothing_to_overlap() -> None:
    w, x = Bitmap.from_dense(np.eye(64, dtype=np.float16)), np.ones((2, 64), np.float16)
    np.testing.assert_array_equal(spmm(x, w, overlap_previous=True), x)
