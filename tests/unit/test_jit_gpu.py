# SPDX-License-Identifier: Apache-2.0
"""Loading and launching compiled kernels on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm.errors import UnsupportedDeviceError
from flashllm.jit import KernelSpec

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

SOURCE = """\
template <int kFactor>
__global__ void scale(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = kFactor * x[i];
}
// y[i] = x[n - 1 - i] through dynamic shared memory, one block.
__global__ void reverse(const float* x, float* y, int n) {
  extern __shared__ float buffer[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) buffer[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = buffer[n - 1 - i];
}
"""

SCALE = KernelSpec(name="scale", source="demo.cu", function="scale", template=(("kFactor", "3"),), threads=64)
REVERSE = KernelSpec(name="reverse", source="demo.cu", function="reverse", threads=256, shared_bytes=96 * 1024)


@pytest.fixture(autouse=True)
def _demo_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from flashllm.backends import cuda
    from flashllm.jit import sources

    (tmp_path / "demo.cu").write_text(SOURCE)
    monkeypatch.setattr(sources, "cuda_root", lambda: tmp_path)
    cuda.unload()
    yield
    cuda.unload()


def test_launch(cp: Any) -> None:
    from flashllm.backends import cuda

    x = cp.arange(1000, dtype=cp.float32)
    y = cp.full(1000, cp.nan, dtype=cp.float32)
    cuda.launch(SCALE, (16,), (x, y, np.int32(1000)))
    assert (y == 3 * x).all()
    assert cuda.load(SCALE) is cuda.load(replace(SCALE))


def test_launch_on_a_stream(cp: Any) -> None:
    from flashllm.backends import cuda

    x = cp.arange(1000, dtype=cp.float32)
    y = cp.full(1000, cp.nan, dtype=cp.float32)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    cuda.launch(SCALE, (16,), (x, y, np.int32(1000)), stream=stream)
    stream.synchronize()
    assert (y == 3 * x).all()
    assert cp.cuda.get_current_stream() != stream


def test_large_dynamic_shared_memory(cp: Any) -> None:
    from flashllm.backends import cuda

    n = REVERSE.shared_bytes // 4
    x = cp.arange(n, dtype=cp.float32)
    y = cp.empty_like(x)
    cuda.launch(REVERSE, (1,), (x, y, np.int32(n)))
    assert (y == x[::-1]).all()


def test_too_much_shared_memory_is_a_clear_error(cp: Any) -> None:
    from flashllm.backends import cuda

    with pytest.raises(UnsupportedDeviceError, match="reverse: a block needs 300,000 bytes of shared memory"):
        cuda.load(replace(REVERSE, shared_bytes=300_000))


def test_capture_in_a_graph(cp: Any) -> None:
    from flashllm.backends import cuda

    x = cp.arange(1000, dtype=cp.float32)
    y = cp.zeros_like(x)
    cuda.load(SCALE)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cuda.launch(SCALE, (16,), (x, y, np.int32(1000)))
        cuda.launch(SCALE, (16,), (y, x, np.int32(1000)), stream=stream)
        graph = stream.end_capture()
    assert not y.any(), "capturing must not run anything"
    graph.launch(stream)
    stream.synchronize()
    assert (x == 9 * cp.arange(1000, dtype=cp.float32)).all()


def test_edited_source_is_loaded_anew(cp: Any, tmp_path: Path) -> None:
    from flashllm.backends import cuda

    x = cp.ones(64, dtype=cp.float32)
    cuda.launch(SCALE, (1,), (x, x, np.int32(64)))
    (tmp_path / "demo.cu").write_text(SOURCE.replace("kFactor * x", "10 * kFactor * x"))
    cuda.unload()
    cuda.launch(SCALE, (1,), (x, x, np.int32(64)))
    assert (x == 90).all()


def test_device_facts(cp: Any) -> None:
    from flashllm.backends import select
    from flashllm.device import device_facts, free_memory

    facts = device_facts()
    assert facts.cc >= (8, 0)
    assert facts.sm_count > 0
    assert facts.l2_bytes > 1 << 20
    assert facts.shared_per_block >= 99 * 1024
    assert 0 < free_memory() <= facts.memory_bytes
    assert select().name == "cuda"
    assert facts.name in select().reason
