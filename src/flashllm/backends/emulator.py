# SPDX-License-Identifier: Apache-2.0
"""Runs the GPU kernels on the CPU: the same sources, compiled by g++, each CUDA thread a fiber.

For testing without a GPU and for counting what a kernel does. Times mean nothing here. The emulator checks what a
GPU does not: reads of memory nobody wrote (it is poisoned), copies not waited for, barriers that not everyone
reaches, collectives in divergent code, operands of wgmma that no fence published, accesses outside the arrays.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashllm.backends import emulator_build
from flashllm.backends.emulator_build import (
    BuildOptions,
    EmulatedKernel,
    available,
    compile_emulated,
    sanitizer_environment,
)
from flashllm.backends.emulator_counts import Counts, SharedAccess
from flashllm.cpus import cores
from flashllm.errors import ArgumentError, FlashLLMError, MissingDependencyError
from flashllm.jit.spec import KernelSpec, normalize_arch, shared_limit

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.formats.weight import SparseWeight
    from flashllm.matmul.kernel import KernelChoice

__all__ = [
    "BuildOptions",
    "Counts",
    "EmulationError",
    "SharedAccess",
    "available",
    "compile_emulated",
    "emulated_device",
    "launch",
    "preload",
    "sanitizer_environment",
    "spmm",
    "unload",
]

_MESSAGE_BYTES = 2048
_MAX_ARGUMENTS = 64
_GUARD = 512  # guard elements before an output; after it as many, plus a whole block of rows
_GUARD_ROWS = 64
_SCRATCH_GUARD = 1 << 17  # guard bytes after scratch memory: several images of x
_NAN_BITS = 0x7FDA  # NaN in fp16 and bf16, and not the one that conversions give


class EmulationError(FlashLLMError, RuntimeError):
    """A kernel did what no kernel may: the message says what, in which block, warp and lane."""


class _Extent(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
    )


class _Dependent(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class _Request(ctypes.Structure):
    """As ``Request`` in cuda/emulator/emu/launch.hpp."""

    _fields_ = (
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("extents", ctypes.POINTER(_Extent)),
        ("extent_count", ctypes.c_uint64),
        ("dependents", ctypes.POINTER(_Dependent)),
        ("dependent_count", ctypes.c_uint64),
        ("counts", ctypes.POINTER(ctypes.c_uint64)),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_uint64),
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    run: Any
    sizes: tuple[int, ...]
    """Bytes of each argument."""
    counters: tuple[str, ...]


_loaded: dict[tuple[KernelSpec, BuildOptions], _Loaded] = {}
_lock = threading.Lock()


def launch(
    spec: KernelSpec,
    grid: Sequence[int],
    args: Sequence[Any],
    *,
    arch: str = "90a",
    seed: int = 0,
    sanitize: bool = False,
    workers: int | None = None,
    build: BuildOptions | None = None,
    dependent: Sequence[NDArray[Any]] = (),
) -> Counts:
    """Run ``spec`` on ``grid`` (1 to 3 block counts) with C-contiguous NumPy arrays and NumPy scalars as ``args``.

    ``arch`` selects the code path. ``seed`` determines the order of warps and lanes and which asynchronous copies
    complete early; equal seeds and ``workers`` (host threads, default: all cores) reproduce a schedule. With
    ``sanitize`` the kernel runs under AddressSanitizer, which must be in the process
    (:func:`sanitizer_environment`). ``build`` replaces ``arch`` and ``sanitize`` and says more. ``dependent`` are the
    arrays among ``args``, or contiguous parts of them, that a thread may touch only once it has waited for the
    preceding launch, or has met at a barrier a thread that had.

    Raises :class:`EmulationError` when the kernel misbehaves, :class:`ArgumentError` for arguments that do not fit
    it, :class:`MissingDependencyError` without a compiler, ``CompileError`` when it does not compile.
    """
    options = build or BuildOptions(arch=arch, sanitize=sanitize)
    loaded = _load(spec, options)
    blocks = [int(n) for n in grid] + [1] * (3 - len(grid))
    if len(blocks) != 3 or not all(0 < n < 2**31 for n in blocks):
        raise ArgumentError("grid", expected="1 to 3 block counts >= 1", got=str(list(grid)))
    if len(args) != len(loaded.sizes):
        raise ArgumentError("args", expected=f"{len(loaded.sizes)} arguments of {spec.label}", got=str(len(args)))
    extents: list[_Extent] = []
    values = [_argument(i, value, loaded.sizes[i], extents) for i, value in enumerate(args)]
    pointers = (ctypes.c_void_p * max(len(values), 1))(*(value.ctypes.data for value in values))
    counts = (ctypes.c_uint64 * len(loaded.counters))()
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    request = _Request(
        arguments=pointers,
        grid=(ctypes.c_uint32 * 3)(*blocks),
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        workers=workers or cores(),
        seed=seed,
        extents=(_Extent * max(len(extents), 1))(*extents),
        extent_count=len(extents),
        dependents=(_Dependent * max(len(dependent), 1))(*(_part(array, extents) for array in dependent)),
        dependent_count=len(dependent),
        counts=counts,
        message=ctypes.cast(message, ctypes.c_char_p),
        message_bytes=_MESSAGE_BYTES,
    )
    if loaded.run(ctypes.byref(request)) != 0:
        raise EmulationError(f"{spec.label} (seed {seed}): {message.value.decode(errors='replace')}")
    return Counts.from_values(dict(zip(loaded.counters, counts, strict=True)))


def preload(specs: Iterable[KernelSpec], *, build: BuildOptions | None = None) -> None:
    """Compile and load many kernels at once, several per shared object, on all cores."""
    options = build or BuildOptions()
    _check_sanitizer(options)
    missing = [spec for spec in specs if (spec, options) not in _loaded]
    for kernel in emulator_build.compile_all(missing, options):
        with _lock:
            _loaded[kernel.spec, options] = _open(kernel)


def unload() -> None:
    """Forget every loaded kernel (for tests that change device code on the fly)."""
    with _lock:
        _loaded.clear()


def emulated_device(arch: str = "90a", *, sm_count: int = 4) -> DeviceFacts:
    """A made-up small GPU to plan for: few multiprocessors, so that small products are split as large ones are."""
    from flashllm.device import DeviceFacts

    name = normalize_arch(arch)
    digits = name.rstrip("af")
    shared = shared_limit(name) or 99 * 1024
    return DeviceFacts(
        index=0,
        name=f"CPU emulator (sm_{name})",
        cc=(int(digits[:-1]), int(digits[-1])),
        arch=name,
        sm_count=sm_count,
        l2_bytes=1 << 20,
        shared_per_block=shared,
        shared_per_sm=shared + 1024,
        memory_bytes=1 << 30,
        clock_mhz=0.0,
        driver=0,
    )


def spmm(
    x: NDArray[Any],
    w: SparseWeight,
    *,
    choice: KernelChoice | None = None,
    arch: str = "90a",
    seed: int = 0,
    sm_count: int = 4,
    blocks: int | None = None,
    row_cost: int = 0,
    sanitize: bool = False,
    build: BuildOptions | None = None,
) -> tuple[NDArray[Any], Counts]:
    """y[N, M] = x[N, K] @ W[M, K]^T by the real kernel, planned for :func:`emulated_device`.

    ``x`` is C-contiguous of W's type (bf16: ``ml_dtypes.bfloat16`` or its bits as uint16), W on the host; y has
    the dtype of x. ``choice`` forces an instance, ``blocks`` the number of blocks that share W's tiles, where the end
    of a row of tiles counts as ``row_cost`` more tiles; the rest is as for :func:`launch`. Raises
    :class:`ArgumentError`, and :class:`EmulationError` also when the kernel writes outside y or past its scratch
    memory, or leaves its workspace not zero.
    """
    from dataclasses import replace

    from flashllm.formats.bits import kind_of, numpy_dtype
    from flashllm.matmul import planning
    from flashllm.matmul.stream_k import StreamK
    from flashllm.registry import kernel

    rows, columns = w.shape
    if w.is_device:
        raise ArgumentError("w", expected="a weight on the host", got="one on a device")
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != columns or x.shape[0] < 1:
        got = str(list(x.shape)) if isinstance(x, np.ndarray) else type(x).__name__
        raise ArgumentError("x", expected=f"a NumPy array [N >= 1, K = {columns}]", got=got)
    if kind_of(x.dtype) != w.dtype and not (w.dtype == "bf16" and x.dtype == np.uint16):
        raise ArgumentError("x", expected=f"dtype {numpy_dtype(w.dtype)} like the weight's", got=str(x.dtype))
    if not x.flags.c_contiguous:
        raise ArgumentError("x", expected="a C-contiguous array", got=f"strides {x.strides}")
    if row_cost and blocks is None:
        raise ArgumentError("row_cost", expected="a number of blocks beside it", got=f"{row_cost} alone")
    n = x.shape[0]
    build = build or BuildOptions(arch=arch, sanitize=sanitize)
    plan = planning.plan(w, n, device=emulated_device(build.arch, sm_count=sm_count), choice=choice, expand=False)
    if blocks is not None:
        if not isinstance(plan.split, StreamK):
            raise ArgumentError("blocks", expected=f"None: {plan.spec.name} has no stream-K split", got=str(blocks))
        plan = replace(plan, split=replace(plan.split, blocks=blocks, row_cost=row_cost))
    size, after = n * rows, _GUARD + _GUARD_ROWS * rows
    fenced = np.full(_GUARD + size + after, _NAN_BITS, np.uint16)
    y = fenced[_GUARD : _GUARD + size]
    needed = plan.workspace_bytes
    workspace = _aligned(np.zeros(needed, np.uint8) if needed else np.full(16, 0xFF, np.uint8))
    w = w.with_arrays({name: _aligned(array) for name, array in w.arrays().items()})
    inner = _fenced(x)
    memory = _aligned(np.full(max(plan.scratch_bytes, 16) + _SCRATCH_GUARD, 0xFF, np.uint8))
    scratch = memory[:-_SCRATCH_GUARD]
    args = kernel(w.format).arguments(w, plan.split, inner, y, workspace, scratch)
    dependent = [array for array in (inner, y, workspace, scratch) if any(array is one for one in args)]
    counts = launch(plan.spec, plan.grid, args, seed=seed, build=build, dependent=dependent)
    if needed and workspace.any():
        raise EmulationError(f"{plan.spec.label} (seed {seed}): the workspace is not zero after the launch")
    for name, guard in (("before", fenced[:_GUARD]), ("after", fenced[-after:])):
        if (guard != _NAN_BITS).any():
            raise EmulationError(f"{plan.spec.label} (seed {seed}): wrote {name} the output")
    if (memory[-_SCRATCH_GUARD:] != 0xFF).any():
        raise EmulationError(f"{plan.spec.label} (seed {seed}): wrote behind the scratch memory")
    return y.reshape(n, rows).view(x.dtype), counts


def _fenced(a: NDArray[Any]) -> NDArray[Any]:
    """A copy of ``a`` between NaNs: whatever a kernel reads outside it spoils the result."""
    buffer = _aligned(np.full(a.size + 2 * _GUARD, _NAN_BITS, np.uint16))
    inner: NDArray[Any] = buffer[_GUARD : _GUARD + a.size].reshape(a.shape)
    inner[...] = a.view(np.uint16)
    return inner


def _aligned(a: NDArray[Any]) -> NDArray[Any]:
    """``a``, or a copy of it at an address divisible by 16, as every GPU allocation has."""
    if a.ctypes.data % 16 == 0:
        return a
    room = np.empty(a.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy: NDArray[Any] = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def _part(array: NDArray[Any], extents: Sequence[_Extent]) -> _Dependent:
    if not array.flags.c_contiguous:
        raise ArgumentError("dependent", expected="C-contiguous arrays", got=f"strides {array.strides}")
    begin, end = array.ctypes.data, array.ctypes.data + array.nbytes
    if not any((one.begin or 0) <= begin and end <= (one.begin or 0) + one.bytes for one in extents):
        raise ArgumentError("dependent", expected="arrays among args, or parts of them", got=f"{list(array.shape)}")
    return _Dependent(begin=begin, bytes=array.nbytes)


def _argument(i: int, value: Any, size: int, extents: list[_Extent]) -> NDArray[Any]:
    """One kernel argument as an array whose bytes are the argument; arrays become pointers."""
    name = f"args[{i}]"
    if value is None:
        value = np.uint64(0)
    elif isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ArgumentError(name, expected="a C-contiguous array", got=f"strides {value.strides}")
        address = value.ctypes.data
        extents.append(_Extent(begin=address, bytes=value.nbytes, writable=value.flags.writeable, argument=i))
        value = np.uint64(address)
    elif not isinstance(value, np.generic):
        raise ArgumentError(name, expected="a NumPy array or scalar", got=type(value).__name__)
    if value.nbytes != size:
        raise ArgumentError(name, expected=f"{size} bytes", got=f"{value.nbytes} ({value.dtype})")
    return np.array([value])


def _load(spec: KernelSpec, options: BuildOptions) -> _Loaded:
    found = _loaded.get((spec, options))
    if found is None:
        _check_sanitizer(options)
        kernel = compile_emulated(spec, options)
        with _lock:
            found = _loaded.setdefault((spec, options), _open(kernel))
    return found


def _check_sanitizer(options: BuildOptions) -> None:
    if options.sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
        # Loading a sanitized object all the same would end the process.
        raise MissingDependencyError(
            "AddressSanitizer is not in this process; start Python with emulator.sanitizer_environment()"
        )


def _open(kernel: EmulatedKernel) -> _Loaded:
    library = ctypes.CDLL(str(kernel.path))
    sizes = (ctypes.c_uint32 * _MAX_ARGUMENTS)()
    count = library[f"flashllm_arguments_{kernel.index}"](sizes, _MAX_ARGUMENTS)
    names = library.flashllm_counters
    names.restype = ctypes.c_char_p
    run = library[f"flashllm_run_{kernel.index}"]
    return _Loaded(run=run, sizes=tuple(sizes[:count]), counters=tuple(names().decode().split()))
