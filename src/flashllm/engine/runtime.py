# SPDX-License-Identifier: Apache-2.0
"""Where an engine runs: a GPU with a stream of its own, or the CPU, where the emulator runs the same kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashllm.engine.products import GpuProducts, HostProducts, Products
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec

_EMULATED_SMS = 4
_BLOCKS_OF_A_WORKER = 64
HOST_BACKENDS = ("emulator", "reference")


class Runtime(Protocol):
    """Arrays, launches and products of one device. All work runs in the order of one stream."""

    xp: Any
    """NumPy or CuPy."""
    sm_count: int
    products: Products
    """Multiplies by matrices."""

    def launch(self, spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> object:
        """Launch a kernel."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        """A context in which operations of ``xp`` go to the stream."""

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats ``launches``, whose kernels must have run before: on a GPU, as one CUDA graph."""

    def send(self, target: Any, values: NDArray[Any]) -> None:
        """Write host ``values`` into the array ``target`` of the same shape and type."""

    def fetch(self, array: Any) -> NDArray[Any]:
        """A copy of an array on the host; waits for what was launched before."""

    def wait(self) -> None:
        """Wait for everything that was launched."""

    def close(self) -> None:
        """Release what products hold in addition to their operands. Nothing captured may run afterwards."""


class GpuRuntime:
    """The current GPU.

    ``overlap``: a kernel may start while the previous one is still running, and waits for that one before it touches
    activations (docs/kernels/pdl.md); the default where the GPU and the installed packages support it. No launch of a
    pass writes what the next one reads before its wait: that is weights, which nothing writes, and the cache entries of
    earlier positions, which attention reads.
    """

    def __init__(self, *, overlap: bool | None = None) -> None:
        import cupy

        from flashllm.backends import dependent, select
        from flashllm.device import device_facts

        select("cuda")
        facts = device_facts()
        if overlap is None:
            overlap = facts.cc >= dependent.LEAST_CC and dependent.available()
        elif overlap:
            dependent.check(facts)
        self.xp: Any = cupy
        self.overlap = overlap
        self.sm_count = facts.sm_count
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.products: Products = GpuProducts(self.stream, overlap=overlap)

    def launch(self, spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> object:
        """As :class:`Runtime` says."""
        from flashllm.backends import cuda

        cuda.launch(spec, grid, args, stream=self.stream, overlap_previous=self.overlap)
        return None

    def active(self) -> contextlib.AbstractContextManager[object]:
        """As :class:`Runtime` says."""
        stream: contextlib.AbstractContextManager[object] = self.stream
        return stream

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """As :class:`Runtime` says."""
        from flashllm import graphs

        graph = graphs.capture(launches, self.stream)
        return lambda: graph.launch(self.stream)

    def send(self, target: Any, values: NDArray[Any]) -> None:
        """As :class:`Runtime` says."""
        target.set(np.ascontiguousarray(values), stream=self.stream)
        self.stream.synchronize()  # ``values`` may be gone once this returns

    def fetch(self, array: Any) -> NDArray[Any]:
        """As :class:`Runtime` says."""
        found: NDArray[Any] = array.get(stream=self.stream)
        self.stream.synchronize()
        return found

    def wait(self) -> None:
        """As :class:`Runtime` says."""
        self.stream.synchronize()

    def close(self) -> None:
        """As :class:`Runtime` says."""
        self.stream.synchronize()
        self.products.close()


class HostRuntime:
    """The CPU: decoder kernels run on the emulator, products of packed weights there too or in NumPy."""

    def __init__(self, backend: str = "emulator") -> None:
        from flashllm.backends import select

        if backend not in HOST_BACKENDS:
            raise ArgumentError("backend", expected=" or ".join(HOST_BACKENDS), got=repr(backend))
        select("emulator")  # the decoder kernels need it in any case
        self.xp: Any = np
        self.sm_count = _EMULATED_SMS
        self.products: Products = HostProducts(backend)

    def launch(self, spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> object:
        """As :class:`Runtime` says."""
        from flashllm.backends import emulator

        # Each worker creates the threads of its blocks anew: for few blocks one worker finishes sooner than two.
        return emulator.launch(spec, grid, args, workers=1 if math.prod(grid) <= _BLOCKS_OF_A_WORKER else None)

    def active(self) -> contextlib.AbstractContextManager[object]:
        """As :class:`Runtime` says."""
        return contextlib.nullcontext()

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """As :class:`Runtime` says."""
        return launches

    def send(self, target: Any, values: NDArray[Any]) -> None:
        """As :class:`Runtime` says."""
        target[...] = values

    def fetch(self, array: Any) -> NDArray[Any]:
        """As :class:`Runtime` says."""
        return np.array(array)

    def wait(self) -> None:
        """As :class:`Runtime` says."""

    def close(self) -> None:
        """As :class:`Runtime` says."""


def open_runtime(backend: str | None = None) -> Runtime:
    """The GPU where there is one, or what ``backend`` names: ``cuda``, ``emulator`` or ``reference``.

    Raises ``MissingDependencyError`` or ``UnsupportedDeviceError`` if that is not usable, and ``ArgumentError``.
    """
    from flashllm.backends import select

    name = select(backend).name
    return GpuRuntime() if name == "cuda" else HostRuntime(name)
