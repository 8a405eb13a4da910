# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into the current GPU and launches them through CuPy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from flashllm.backends import dependent
from flashllm.device import current_device, device_facts
from flashllm.errors import CompileError, UnsupportedDeviceError
from flashllm.jit.compile import Cubin, compile_kernel
from flashllm.jit.spec import DEFAULT_SHARED_LIMIT, KernelSpec

_kernels: dict[tuple[int, KernelSpec], Any] = {}
_lock = threading.Lock()


def load(spec: KernelSpec) -> Any:
    """The kernel of ``spec`` on the current GPU, as CuPy's kernel object; compiled at most once per device.

    Call it as ``kernel(grid, block, args, shared_mem=spec.shared_bytes)`` or through :func:`launch`.
    Raises :class:`CompileError`, or :class:`UnsupportedDeviceError` when a block needs more shared
    memory than the GPU has.
    """
    key = (current_device(), spec)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _load(spec, key[0])
    return kernel


def launch(
    spec: KernelSpec, grid: Sequence[int], args: Sequence[Any], *, stream: Any = None, overlap_previous: bool = False
) -> None:
    """Launch ``spec`` on ``grid`` (1 to 3 block counts) with CuPy arrays and NumPy scalars as ``args``.

    Runs on ``stream`` (a CuPy stream; the current one for ``None``) and allocates nothing, so it can be
    captured in a CUDA graph once :func:`load` has run. Pointers are passed as they are: shapes, types,
    strides and alignment are the caller's to check. With ``overlap_previous`` it may start while the preceding launch
    still runs; the kernel has to wait for that one (docs/kernels/pdl.md).
    """
    kernel = load(spec)
    if overlap_previous:
        dependent.launch(kernel, grid, spec.threads, args, shared_bytes=spec.shared_bytes, stream=stream)
        return
    block = (spec.threads,)
    if stream is None:
        kernel(tuple(grid), block, tuple(args), shared_mem=spec.shared_bytes)
    else:
        with stream:
            kernel(tuple(grid), block, tuple(args), shared_mem=spec.shared_bytes)


def unload() -> None:
    """Forget every loaded kernel (for tests that change device code on the fly)."""
    with _lock:
        _kernels.clear()


def _load(spec: KernelSpec, device: int) -> Any:
    facts = device_facts(device)
    cubin = compile_kernel(spec, facts.arch)
    needed = cubin.resources.shared_static + spec.shared_bytes
    if needed > facts.shared_per_block:
        raise UnsupportedDeviceError(
            f"{spec.label}: a block needs {needed:,} bytes of shared memory, "
            f"{facts.name} has {facts.shared_per_block:,} per block"
        )
    kernel = _function(spec, facts.arch, cubin)
    if spec.shared_bytes > DEFAULT_SHARED_LIMIT:
        kernel.max_dynamic_shared_size_bytes = spec.shared_bytes
    return kernel


def _function(spec: KernelSpec, arch: str, cubin: Cubin) -> Any:
    import cupy

    try:
        return cupy.RawModule(path=str(cubin.path)).get_function(cubin.lowered_name)
    except Exception as error:
        if cubin.path.is_file():
            raise CompileError(f"{spec.label}: the driver refuses {cubin.path}: {error}") from error
    # Another process emptied the cache between our look-up and the load: build it once more.
    cubin = compile_kernel(spec, arch)
    return cupy.RawModule(path=str(cubin.path)).get_function(cubin.lowered_name)
