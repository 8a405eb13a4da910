# SPDX-License-Identifier: Apache-2.0
"""Launches that may overlap the one before them on their stream: CUDA's programmatic dependent launch.

CuPy has no call for them, but the driver does; docs/kernels/pdl.md says what makes them safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.errors import MissingDependencyError, UnsupportedDeviceError

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts

LEAST_CC = (9, 0)


def check(facts: DeviceFacts) -> None:
    """Raise :class:`UnsupportedDeviceError` or :class:`MissingDependencyError` where no such launch is possible."""
    if facts.cc < LEAST_CC:
        raise UnsupportedDeviceError(
            f"a launch that overlaps the one before needs compute capability 9.0 or newer, "
            f"{facts.name} has {facts.cc[0]}.{facts.cc[1]}"
        )
    _driver()


def available() -> bool:
    """Whether the package that such launches go through is installed."""
    try:
        _driver()
    except MissingDependencyError:
        return False
    return True


def launch(
    kernel: Any, grid: Sequence[int], threads: int, args: Sequence[Any], *, shared_bytes: int, stream: Any = None
) -> None:
    """Launch CuPy's ``kernel`` on ``stream`` (CuPy's current one for ``None``) as soon as the preceding launch allows.

    ``args`` are CuPy arrays and NumPy scalars. In a capture the launch gets a programmatic edge in the graph.
    """
    import cupy

    driver = _driver()
    cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())  # makes its context current, as the driver requires
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = (cupy.cuda.get_current_stream() if stream is None else stream).ptr
    config.attrs, config.numAttrs = [attribute], 1
    values = [np.array([arg if isinstance(arg, np.generic) else np.uint64(arg.data.ptr)]) for arg in args]
    pointers = np.array([value.ctypes.data for value in values], np.uint64)
    (status,) = driver.cuLaunchKernelEx(config, kernel.kernel.ptr, int(pointers.ctypes.data), 0)
    if int(status) != 0:
        raise cupy.cuda.driver.CUDADriverError(int(status))


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"a launch that overlaps the one before needs cuda-bindings, which the extras cuda12 and cuda13 bring "
            f"({error}); `flashllm doctor` says what to install"
        ) from error
    return driver
