# SPDX-License-Identifier: Apache-2.0
"""Measures the read bandwidth of the GPU's memory (``cuda/bench/read.cu``), the roofline for all times."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.bench import timing
from flashllm.errors import DeviceMemoryError, VerificationError
from flashllm.jit.spec import KernelSpec

BUFFER_BYTES = 2**30
_BLOCKS_PER_SM = 4
_WARMUP_MS = 200.0  # the first measurement of a run also brings the clocks up


def spec() -> KernelSpec:
    """The kernel that reads the buffer."""
    return KernelSpec(name="read_bandwidth", source="bench/read.cu", function="flashllm::read_bandwidth", threads=512)


def specs() -> list[KernelSpec]:
    """Kernels of this module, for ahead-of-time compilation."""
    return [spec()]


class _Read:
    """Reads one buffer, far larger than L2, from start to end."""

    copies = 1

    def __init__(self, data: Any, checksum: Any, blocks: int) -> None:
        self._arguments = (data, np.int64(data.size // 4), checksum)
        self._spec, self._blocks = spec(), blocks

    def launch(self, copy: int, stream: Any) -> None:
        from flashllm.backends import cuda

        cuda.launch(self._spec, (self._blocks,), self._arguments, stream=stream)


def read_gbps(stream: Any, *, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bandwidth in 10^9 bytes per second, measured with the same graphs and medians as everything else.

    Raises :class:`VerificationError` when the kernel did not read what the buffer holds.
    """
    import cupy

    from flashllm.device import device_facts, free_memory

    if free_memory() < 2 * buffer_bytes:
        raise DeviceMemoryError("read bandwidth measurement", needed=2 * buffer_bytes, free=free_memory())
    words = buffer_bytes // 16 * 4
    data = cupy.arange(words, dtype=cupy.uint32)
    data *= cupy.uint32(2654435761)  # no pattern that memory or link compression could use
    checksum = cupy.zeros(1, dtype=cupy.uint32)
    system = _Read(data, checksum, _BLOCKS_PER_SM * device_facts().sm_count)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        system.launch(0, stream)
        stream.synchronize()
    expected = int(np.bitwise_xor.reduce(_xor_fold(data)))
    if int(checksum[0]) != expected:
        raise VerificationError(f"read bandwidth kernel: checksum {int(checksum[0]):#x}, expected {expected:#x}")
    result = timing.measure([system], timing.Method(warmup_ms=_WARMUP_MS), stream=stream)[0]
    return words * 4 / result.median_us * 1e-3


def _xor_fold(data: Any) -> Any:
    """Halve ``data`` by XOR until it is small; returns a NumPy array with the same XOR."""
    while data.size > 4096 and data.size % 2 == 0:
        half = data.size // 2
        data = data[:half] ^ data[half:]
    return data.get()
