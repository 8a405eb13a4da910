# SPDX-License-Identifier: Apache-2.0
"""``spmm``: checks the operands, then multiplies on the GPU, on the CPU emulator or in NumPy."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm import backends
from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.formats.bits import numpy_dtype
from flashllm.formats.sources import is_cupy
from flashllm.formats.weight import SparseWeight
from flashllm.matmul import expand, planning
from flashllm.matmul.planning import Plan
from flashllm.registry import kernel

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.jit.spec import KernelSpec
    from flashllm.matmul.kernel import Split

_ALIGNMENT = {"x": 16, "w": 16, "out": 8, "workspace": 16}  # what every kernel may rely on
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def spmm(
    x: Any,
    w: SparseWeight,
    *,
    out: Any = None,
    workspace: Any = None,
    scratch: Any = None,
    stream: Any = None,
    plan: Plan | None = None,
    backend: str | None = None,
    overlap_previous: bool = False,
) -> Any:
    """y[N, M] = x[N, K] @ W[M, K]^T, accumulated in fp32 and rounded once to W's type.

    ``x`` is C-contiguous [N, K] of W's type: a CuPy array (or any GPU array with DLPack) for a device weight, a NumPy
    array for a host weight. A host weight is multiplied by NumPy or, with ``backend="emulator"``, by the GPU's kernel
    on the CPU. bf16 arrays have the dtype ``ml_dtypes.bfloat16`` or hold its bits as uint16. N >= 1 is any number.

    Given ``plan``, ``out`` [N, M] and the memory that the plan needs, a call after the first allocates nothing and can
    be captured in a CUDA graph. That memory is a ``workspace`` where ``plan.workspace_bytes`` is not 0 (uint8, zeroed
    once by the caller; a call leaves it zero, so one, as large as the largest, serves all products of a stream), and
    ``scratch`` where ``plan.scratch_bytes`` is not 0 (uint8, with any content; one serves all products of a stream
    too). For wide x, a plan may expand W to a dense matrix in a workspace of its own, which cuBLAS multiplies. Runs on
    ``stream`` (default: CuPy's current one) and does not wait for it. ``backend`` is ``"cuda"``, ``"emulator"``,
    ``"reference"``, or ``None`` to go by where the weight is.

    On a GPU of compute capability 9.0 or newer, ``overlap_previous`` lets the kernel start while the previous kernel on
    the stream still runs: it reads weights until that kernel has finished, and only then x. The condition is that the
    launch just before writes none of ``w``; it may write x, and use the same out and workspace (docs/kernels/pdl.md).
    An expanded weight and a product on the host overlap nothing.

    Stored elements, including NaN and infinities, multiply as in dense arithmetic. So does a pruned zero if the class
    of ``w`` has ``MULTIPLIES_ZEROS``: multiplied by an infinity or a NaN in x, it makes the output NaN, as a dense
    matrix with zeros would. In other formats (slot24), any of these products may be left out: such an output is either
    what the dense product gives or what the stored elements alone give. With finite x, there is no difference.

    Raises :class:`ArgumentError`, naming the argument, for a wrong type, shape, dtype, layout, alignment or device,
    :class:`DeviceMemoryError` if out, workspace or scratch does not fit, :class:`MissingDependencyError` if the
    emulator lacks its compiler or ``overlap_previous`` lacks the package that it launches with, and
    :class:`UnsupportedDeviceError` for ``overlap_previous`` on an older GPU.
    """
    if not isinstance(w, SparseWeight):
        raise ArgumentError("w", expected="a sparse weight such as flashllm.TiledCSL", got=type(w).__name__)
    if backend not in (None, *backends.BACKENDS):
        raise ArgumentError("backend", expected="'cuda', 'emulator', 'reference' or None", got=repr(backend))
    if backend in ("emulator", "reference") or (backend is None and not w.is_device):
        return _on_host(x, w, out, plan, emulated=backend == "emulator")
    backends.select("cuda")
    return _cuda(
        x,
        w,
        out=out,
        workspace=workspace,
        scratch=scratch,
        stream=stream,
        given=plan,
        overlap_previous=overlap_previous,
    )


def _on_host(x: Any, w: SparseWeight, out: Any, given: Plan | None, *, emulated: bool) -> Any:
    if not isinstance(x, np.ndarray):
        raise ArgumentError("x", expected="a NumPy array for a product on the host", got=type(x).__name__)
    n = _rows_of(x, w)
    _check_contiguous("x", x)  # the reference could do without, but a GPU cannot
    choice = _checked_plan(given, w, n).choice if given is not None else None
    if emulated:
        from flashllm.backends import emulator

        backends.select("emulator")
        arch = "90a" if choice is None or choice.spec.supports("90a") else "80"
        y, _ = emulator.spmm(x, w, choice=choice, arch=arch)
    else:
        from flashllm.backends import reference

        y = reference.spmm(x, w)
    if out is None:
        return y
    if not isinstance(out, np.ndarray) or out.shape != y.shape or out.dtype != y.dtype:
        raise ArgumentError("out", expected=f"a NumPy array {y.shape} of {y.dtype}", got=_describe(out))
    if not out.flags.writeable:
        raise ArgumentError("out", expected="an array that can be written", got="a read-only one")
    out[...] = y
    return out


def _cuda(
    x: Any,
    w: SparseWeight,
    *,
    out: Any,
    workspace: Any,
    scratch: Any,
    stream: Any,
    given: Plan | None,
    overlap_previous: bool,
) -> Any:
    from flashllm.backends import dependent
    from flashllm.device import device_facts

    if not w.is_device:
        raise ArgumentError("w", expected="a weight on the GPU (w.to_device())", got="a weight on the host")
    if isinstance(x, np.ndarray) or (not is_cupy(x) and not hasattr(x, "__dlpack__")):
        raise ArgumentError("x", expected="an array on the GPU", got=_describe(x))
    if not is_cupy(x):
        x = _from_dlpack(x, stream)
    facts = device_facts()
    if overlap_previous:
        dependent.check(facts)
    rows, columns = w.shape
    n = _rows_of(x, w)
    _check("x", x, dtype=w.dtype, facts=facts, alignment=_ALIGNMENT["x"] if columns % 8 == 0 else 2)
    for name, array in w.arrays().items():
        _check(f"w.{name}", array, dtype=None, facts=facts, alignment=_ALIGNMENT["w"])
    chosen = _checked_plan(given, w, n) if given is not None else planning.plan(w, n, device=facts)
    if out is None:
        out = _allocate("out", (n, rows), x.dtype, stream)
    elif not is_cupy(out) or out.shape != (n, rows) or out.dtype != x.dtype:
        raise ArgumentError("out", expected=f"a CuPy array ({n}, {rows}) of {x.dtype}", got=_describe(out))
    else:
        _check("out", out, dtype=w.dtype, facts=facts, alignment=_ALIGNMENT["out"] if rows % 4 == 0 else 2)
    what = "workspace" if chosen.expansion is None else "dense scratch matrix"
    workspace = _memory("workspace", workspace, chosen.workspace_bytes, facts, stream, what=what)
    scratch = _memory("scratch", scratch, chosen.scratch_bytes, facts, stream, what="scratch memory")
    if chosen.expansion is not None:
        expand.run(w, x, out, workspace, stream=stream)
    else:
        given_memory = (workspace, scratch)
        launch(w, chosen.spec, chosen.split, x, out, *given_memory, stream=stream, overlap_previous=overlap_previous)
    return out


def _memory(name: str, given: Any, needed: int, facts: DeviceFacts, stream: Any, *, what: str) -> Any:
    """What the caller gives or, if nothing, new memory of ``needed`` bytes; ``None`` if that is 0."""
    if given is None:
        return _allocate(what, (needed,), np.dtype(np.uint8), stream) if needed else None
    if not is_cupy(given) or given.nbytes < needed:
        raise ArgumentError(name, expected=f"a CuPy array of >= {needed} bytes", got=_describe(given))
    _check(name, given, dtype=None, facts=facts, alignment=_ALIGNMENT["workspace"])
    return given


def launch(
    w: SparseWeight,
    spec: KernelSpec,
    split: Split,
    x: Any,
    out: Any,
    workspace: Any,
    scratch: Any,
    *,
    stream: Any = None,
    overlap_previous: bool = False,
) -> None:
    """Multiply checked operands by instance ``spec`` of the kernel for ``w``; nothing is allocated.

    ``workspace`` and ``scratch`` may be ``None`` where ``split`` needs none.
    """
    from flashllm.backends import cuda

    memory = (out if given is None else given for given in (workspace, scratch))  # or a valid address that nobody uses
    args = kernel(w.format).arguments(w, split, x, out, *memory)
    cuda.launch(spec, split.grid, args, stream=stream, overlap_previous=overlap_previous)


def _from_dlpack(x: Any, stream: Any) -> Any:
    """A CuPy view of another package's array, ready for use on ``stream``."""
    kind = x.__dlpack_device__()[0]
    if kind not in _DLPACK_CUDA:
        raise ArgumentError("x", expected="an array on the GPU", got=f"{_describe(x)} on DLPack device type {kind}")
    import cupy

    with stream if stream is not None else contextlib.nullcontext():
        return cupy.from_dlpack(x)


def _checked_plan(given: Plan, w: SparseWeight, n: int) -> Plan:
    if given.format != w.format or given.shape != w.shape or given.dtype != w.dtype or given.n != n:
        raise ArgumentError(
            "plan",
            expected=f"a plan for shape {w.shape}, {w.format} of {w.dtype}, N = {n}",
            got=f"one for shape {given.shape}, {given.format} of {given.dtype}, N = {given.n}",
        )
    return given


def _rows_of(x: Any, w: SparseWeight) -> int:
    """N of ``x`` [N, K]."""
    if x.ndim != 2 or x.shape[1] != w.shape[1] or x.shape[0] < 1:
        raise ArgumentError("x", expected=f"shape [N >= 1, K = {w.shape[1]}]", got=f"shape {list(x.shape)}")
    return int(x.shape[0])


def _check_contiguous(name: str, array: Any) -> None:
    if not array.flags.c_contiguous:
        raise ArgumentError(name, expected="a C-contiguous array", got=f"strides {array.strides}")


def _check(name: str, array: Any, *, dtype: DType | None, facts: DeviceFacts, alignment: int) -> None:
    if dtype is not None and array.dtype != numpy_dtype(dtype) and not (dtype == "bf16" and array.dtype == np.uint16):
        raise ArgumentError(name, expected=f"dtype {numpy_dtype(dtype)}, as the weight", got=f"dtype {array.dtype}")
    _check_contiguous(name, array)
    if array.device.id != facts.index:
        raise ArgumentError(name, expected=f"an array on device {facts.index}", got=f"device {array.device.id}")
    if array.data.ptr % alignment:
        raise ArgumentError(
            name, expected=f"an address divisible by {alignment}", got=f"one {array.data.ptr % alignment} past it"
        )


def _allocate(what: str, shape: tuple[int, ...], dtype: Any, stream: Any) -> Any:
    import cupy

    from flashllm.device import memory_errors

    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    with memory_errors(what, needed), stream if stream is not None else contextlib.nullcontext():
        return cupy.zeros(shape, dtype) if what == "workspace" else cupy.empty(shape, dtype)


def _describe(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)} of {dtype}"
