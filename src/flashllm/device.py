# SPDX-License-Identifier: Apache-2.0
"""Facts about the GPU, through CuPy, and why there may be none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from flashllm.errors import ArgumentError, DeviceMemoryError, MissingDependencyError, UnsupportedDeviceError
from flashllm.jit.spec import arch_for_device

__all__ = [
    "DeviceFacts",
    "arch_for_device",
    "current_device",
    "device_count",
    "device_facts",
    "free_memory",
    "gpu_problem",
    "memory_errors",
]


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """Constant facts about one GPU; sizes in bytes."""

    index: int
    name: str
    """The driver's full name, e.g. ``"NVIDIA H100 80GB HBM3"``."""
    cc: tuple[int, int]
    arch: str
    """Architecture kernels are compiled for, e.g. ``"90a"``."""
    sm_count: int
    l2_bytes: int
    shared_per_block: int
    """Maximum static + dynamic shared memory that one block may request."""
    shared_per_sm: int
    memory_bytes: int
    clock_mhz: float
    """Highest SM clock."""
    driver: int
    """CUDA version of the driver, e.g. 13000."""


def check_facts(device: object) -> DeviceFacts:
    """``device``; raises ``ArgumentError`` if it is anything else, such as the name of a GPU."""
    if not isinstance(device, DeviceFacts):
        expected = "DeviceFacts, such as facts_of(find_gpu(NAME)) of flashllm.gpus"
        raise ArgumentError("device", expected=expected, got=repr(device))
    return device


_usable: set[int] = set()


def gpu_problem() -> str | None:
    """Why the current GPU cannot be used, in one line; ``None`` when it can. Quick after the first success."""
    if _usable and current_device() in _usable:
        return None
    _, problem = device_count()
    if problem is not None:
        return problem
    index = current_device()
    try:
        arch_for_device(_compute_capability(index))
    except UnsupportedDeviceError as error:
        return str(error)
    _usable.add(index)
    return None


def device_count() -> tuple[int, str | None]:
    """How many GPUs CuPy sees and, if none, why in one line. Does not check what they can do."""
    try:
        import cupy
    except ImportError as error:
        return 0, f"CuPy is not installed ({error})"
    except OSError as error:
        return 0, f"CuPy cannot be imported ({error}); set CUPY_CACHE_DIR to a writable folder"
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CUDARuntimeError: no driver, driver too old, no device
        return 0, f"no usable NVIDIA driver or GPU ({error})"
    return count, None if count else "the driver reports no GPU"


def current_device() -> int:
    """Index of the GPU that CuPy uses in this thread."""
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def device_facts(index: int | None = None) -> DeviceFacts:
    """Facts of GPU ``index`` (the current one for ``None``).

    Raises :class:`MissingDependencyError` without a usable GPU and :class:`UnsupportedDeviceError`
    for one older than compute capability 8.0.
    """
    if index is None:
        try:
            index = current_device()
        except Exception as error:
            raise MissingDependencyError(f"no GPU: {gpu_problem() or error}; see `flashllm doctor`") from error
    return _facts(index)


def free_memory() -> int:
    """Bytes that a new allocation on the current GPU can get: free in the driver or in CuPy's pool."""
    import cupy

    free, _total = cupy.cuda.runtime.memGetInfo()
    return int(free) + int(cupy.get_default_memory_pool().free_bytes())


@contextmanager
def memory_errors(what: str, needed: int) -> Iterator[None]:
    """Turns CuPy's out-of-memory error into :class:`DeviceMemoryError`: ``what`` needs ``needed`` bytes."""
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise DeviceMemoryError(what, needed=needed, free=free_memory()) from error


@cache
def _facts(index: int) -> DeviceFacts:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    attributes = cupy.cuda.Device(index).attributes
    name = properties["name"]
    cc = _compute_capability(index)
    return DeviceFacts(
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name),
        cc=cc,
        arch=arch_for_device(cc),
        sm_count=int(attributes["MultiProcessorCount"]),
        l2_bytes=int(attributes["L2CacheSize"]),
        shared_per_block=int(attributes["MaxSharedMemoryPerBlockOptin"]),
        shared_per_sm=int(attributes["MaxSharedMemoryPerMultiprocessor"]),
        memory_bytes=int(properties["totalGlobalMem"]),
        clock_mhz=int(attributes["ClockRate"]) / 1000.0,
        driver=int(cupy.cuda.runtime.driverGetVersion()),
    )


def _compute_capability(index: int) -> tuple[int, int]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return int(properties["major"]), int(properties["minor"])
