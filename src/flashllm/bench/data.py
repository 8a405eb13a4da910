# SPDX-License-Identifier: Apache-2.0
"""Random sparse matrices with the same bytes on the host (NumPy) and on the device (``cuda/bench/weights.cu``).

Every element is a pure function of (seed, row, column). On the device bf16 is held as its uint16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashllm.bench.cases import PATTERNS, Group
from flashllm.errors import ArgumentError
from flashllm.formats.base import DType
from flashllm.formats.bits import INFINITY, MAGNITUDE, numpy_dtype, widen
from flashllm.jit.spec import KernelSpec

_GOLDEN = 0x9E3779B97F4A7C15
_FULL = 2.0**32
# kPerColumn and kPerBlock of weights.cu; the other patterns decide per element.
_SHARING = {"columns": 1, "block": 2}
_BLOCK = 32
_RAW_STD = 2.0 * float(np.sqrt(4.0 * (65536.0**2 - 1.0) / 12.0))  # of 2 (u0 + u1 + u2 + u3), u uniform 16-bit
_STRIP_ELEMENTS = 1 << 20
_DEVICE_STRIP_ELEMENTS = 1 << 26
_C_TYPES = {"fp16": "__half", "bf16": "__nv_bfloat16"}
_X_SEED = 1 << 32

UInt64 = npt.NDArray[np.uint64]


def specs() -> list[KernelSpec]:
    """Kernels of this module, for ahead-of-time compilation."""
    return [_spec(dtype) for dtype in _C_TYPES]


def _spec(dtype: str) -> KernelSpec:
    return KernelSpec(
        name="random_matrix",
        source="bench/weights.cu",
        function="flashllm::random_matrix",
        template=(("T", _C_TYPES[dtype]),),
        threads=256,
    )


def _mix(z: UInt64) -> UInt64:
    """splitmix64's finaliser, as in weights.cu."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(seed: int) -> UInt64:
    return _mix(np.array([seed + _GOLDEN & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))


def row_thresholds(rows: int, columns: int, *, density: float, pattern: str, seed: int, device: bool = False) -> Any:
    """uint64[rows], NumPy or CuPy: an element is kept when its 32 random bits are below its row's threshold.

    ``row-equal`` keeps round(density * columns) elements of every row, as pruning row by row does (Wanda, Sun et al.
    2023); ``per-row`` draws each row's density from d +- min(d, 1 - d); ``skewed`` lets it fall linearly over the rows
    from d + min(d, 1 - d) to d - min(d, 1 - d); every other pattern has the same density in all rows.
    """
    if pattern not in PATTERNS:
        raise ArgumentError("pattern", expected=f"one of {', '.join(PATTERNS)}", got=repr(pattern))
    if pattern == "row-equal":
        return _equal_thresholds(rows, columns, round(density * columns), seed, device)
    width = min(density, 1.0 - density)
    values = np.full(rows, density)
    if pattern == "per-row":
        values += width * (2.0 * np.random.default_rng(seed).random(rows) - 1.0)
    elif pattern == "skewed":
        values += width * (1.0 - 2.0 * (np.arange(rows) + 0.5) / rows)
    return np.rint(values * _FULL).astype(np.uint64)


def _equal_thresholds(rows: int, columns: int, count: int, seed: int, device: bool) -> Any:
    """One more than the ``count``-th smallest bits of each row; elements that tie with these bits are all kept."""
    if device:
        import cupy as xp
    else:
        xp = np
    out = xp.zeros(rows, dtype=np.uint64)
    key = xp.asarray(_key(seed))
    strip = max(1, (_DEVICE_STRIP_ELEMENTS if device else _STRIP_ELEMENTS) // max(1, columns))
    for first in range(0, rows if count else 0, strip):
        last = min(rows, first + strip)
        index = xp.arange(first * columns, last * columns, dtype=np.uint64).reshape(last - first, columns)
        bits = _mix(key ^ _mix(index * np.uint64(2))) >> np.uint64(32)
        out[first:last] = xp.partition(bits, count - 1, axis=1)[:, count - 1] + np.uint64(1)
    return out


def random_matrix(
    rows: int,
    columns: int,
    *,
    density: float = 1.0,
    pattern: str = "uniform",
    seed: int = 0,
    std: float = 1.0,
    dtype: DType = "fp16",
    device: bool = False,
) -> Any:
    """Matrix [rows, columns] with bell-shaped zero-mean values of standard deviation ``std``, the rest zero.

    Patterns: ``uniform`` keeps each element with probability ``density``; ``columns`` keeps whole columns;
    ``block`` keeps whole 32 x 32 blocks; for ``row-equal``, ``per-row`` and ``skewed`` see :func:`row_thresholds`.
    Host: NumPy float16 or ml_dtypes.bfloat16; device: CuPy float16, or uint16 bits for bf16.
    """
    if not 0.0 <= density <= 1.0:
        raise ArgumentError("density", expected="a fraction from 0 to 1", got=str(density))
    thresholds = row_thresholds(rows, columns, density=density, pattern=pattern, seed=seed, device=device)
    scale = np.float32(std / _RAW_STD)
    sharing = _SHARING.get(pattern, 0)
    if device:
        return _on_device(rows, columns, thresholds, seed, sharing, scale, dtype)
    return _on_host(rows, columns, thresholds, seed, sharing, scale, dtype)


def _on_host(
    rows: int, columns: int, thresholds: UInt64, seed: int, sharing: int, scale: np.float32, dtype: DType
) -> npt.NDArray[Any]:
    out = np.empty((rows, columns), dtype=numpy_dtype(dtype))
    key = _key(seed)
    strip = max(1, _STRIP_ELEMENTS // max(1, columns))
    column = np.arange(columns, dtype=np.uint64)[None, :]
    for first in range(0, rows, strip):
        row = np.arange(first, min(rows, first + strip), dtype=np.uint64)[:, None]
        index = row * np.uint64(columns) + column
        group = index
        if sharing == _SHARING["columns"]:
            group = np.broadcast_to(column, index.shape)
        elif sharing == _SHARING["block"]:
            across = np.uint64(-(-columns // _BLOCK))
            group = row // np.uint64(_BLOCK) * across + column // np.uint64(_BLOCK)
        keep = _mix(key ^ _mix(group * np.uint64(2))) >> np.uint64(32)
        bits = _mix(key ^ _mix(index * np.uint64(2) + np.uint64(1)))
        total = np.zeros(index.shape, dtype=np.int32)
        for shift in (0, 16, 32, 48):
            total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int32)
        value = (2 * total - np.int32(4 * 65535 - 1)).astype(np.float32) * scale
        out[first : first + row.shape[0]] = np.where(keep < thresholds[row], value, np.float32(0)).astype(out.dtype)
    return out


def _on_device(
    rows: int, columns: int, thresholds: Any, seed: int, sharing: int, scale: np.float32, dtype: DType
) -> Any:
    import cupy

    from flashllm.backends import cuda

    out = cupy.empty((rows, columns), dtype=cupy.float16 if dtype == "fp16" else cupy.uint16)
    spec = _spec(dtype)
    blocks = min(-(-rows * columns // spec.threads), 1 << 16)
    arguments = (
        out,
        np.int64(rows),
        np.int64(columns),
        cupy.asarray(thresholds),
        np.uint64(seed),
        np.int32(sharing),
        scale,
    )
    cuda.launch(spec, (blocks,), arguments)
    return out


def make_weights(group: Group, sparsity: float, *, device: bool) -> Any:
    """Dense ``W[m, k]`` of ``group`` at ``sparsity``, values of standard deviation 1 / sqrt(K)."""
    return random_matrix(
        group.m,
        group.k,
        density=1.0 - sparsity,
        pattern=group.pattern,
        seed=group.seed,
        std=float(1.0 / np.sqrt(group.k)),
        dtype=group.dtype,
        device=device,
    )


def make_inputs(group: Group, n: int, *, device: bool) -> Any:
    """Dense ``x[n, k]`` of standard deviation 1, drawn independently of the weights."""
    return random_matrix(n, group.k, seed=group.seed + _X_SEED + n, dtype=group.dtype, device=device)


def to_float64(array: Any, dtype: str) -> Any:
    """``array`` as float64, on the host or device as before; bf16 may come as uint16 bits."""
    if dtype == "bf16" and array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def largest_magnitude(array: Any, dtype: DType) -> float:
    """Largest finite absolute value of a 16-bit matrix, found from its bit patterns one strip at a time."""
    bits, infinity = array.view(np.uint16), np.uint16(INFINITY[dtype])
    strip = max(1, (1 << 24) // max(1, array.shape[1]))
    largest = 0
    for first in range(0, array.shape[0], strip):
        magnitude = bits[first : first + strip] & MAGNITUDE
        largest = max(largest, int((magnitude * (magnitude < infinity)).max()))
    return float(widen(np.array([largest], dtype=np.uint16), dtype)[0])
