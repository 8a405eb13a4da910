# SPDX-License-Identifier: Apache-2.0
"""What the device encoders take: dense CuPy matrices; host side of cuda/flashllm/source.cuh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.device import current_device
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES, DType, ReportCallback, RoundingReport
from flashllm.formats.bits import check_dtype, kind_of, numpy_dtype
from flashllm.formats.sources import check_shape, is_cupy

if TYPE_CHECKING:
    from flashllm.formats.weight import SparseWeight

BITS16 = "flashllm::source::Bits16"
"""Source of 16-bit elements, which keep every bit."""
ROUNDING = {"fp16": "flashllm::source::Float32ToFp16", "bf16": "flashllm::source::Float32ToBf16"}
"""Sources of float32, by the type they are rounded to."""
SOURCES = (BITS16, *ROUNDING.values())
_VECTOR_BYTES = 16
_REPORT_FIELDS = ("total", "changed", "became_zero", "became_infinite")  # as enum RoundingField


def source_of(a: Any, dtype: str | None) -> tuple[str, DType]:
    """The kernels' source type and the value type for an input and the requested ``dtype``."""
    if not is_cupy(a):
        raise ArgumentError("a", expected="a CuPy array", got=type(a).__name__)
    wanted = check_dtype(dtype) if dtype is not None else None
    kind = kind_of(a.dtype)
    if a.dtype == np.uint16:
        if wanted is None:
            raise ArgumentError("dtype", expected="'fp16' or 'bf16' for uint16 bit patterns", got="None")
        return BITS16, wanted
    if kind == "fp32":
        target: DType = wanted or "fp16"
        return ROUNDING[target], target
    for own in DTYPES:
        if kind == own:
            if wanted not in (None, own):
                expected = f"{own!r} for {a.dtype} input (convert to float32 first to round to another type)"
                raise ArgumentError("dtype", expected=expected, got=repr(wanted))
            return BITS16, own
    raise ArgumentError("a", expected="float16, bfloat16, float32 or uint16 bit patterns", got=str(a.dtype))


def check_on_device(a: Any, argument: str) -> None:
    """Raise ``ArgumentError`` unless ``a`` lies on the current device."""
    current = current_device()
    if int(a.device.id) != current:
        raise ArgumentError(argument, expected=f"data on the current device {current}", got=f"device {a.device.id}")


def layout_of(a: Any) -> tuple[tuple[int, int], int]:
    """Shape (M, K) of ``a`` and its row pitch in elements; raises ``ArgumentError`` unless rows are contiguous."""
    shape = check_shape(a.shape, argument="a")
    contiguous = shape[1] == 1 or a.strides[1] == a.itemsize
    separate = shape[0] == 1 or (a.strides[0] >= shape[1] * a.itemsize and a.strides[0] % a.itemsize == 0)
    if not (contiguous and separate):
        raise ArgumentError("a", expected="rows that are contiguous (row-major)", got=f"strides {a.strides}")
    return shape, a.strides[0] // a.itemsize if shape[0] > 1 else shape[1]


def send_report(report: ReportCallback | None, source: str, nnz: int, rounding: Any) -> None:
    """Call ``report`` with what ``rounding``, the kernels' counters, say."""
    if report is not None:
        # A 16-bit source is not rounded: its nonzero elements are the stored ones.
        effect = [nnz, 0, 0, 0] if source == BITS16 else [int(v) for v in rounding.get()]
        report(RoundingReport(**dict(zip(_REPORT_FIELDS, effect, strict=True))))


def check_decodable(w: SparseWeight) -> None:
    """Raise ``ArgumentError`` unless ``w`` lies on the current device, in buffers aligned for vector copies."""
    if not w.is_device:
        raise ArgumentError("w", expected="a weight on a device (see to_device)", got="a weight on the host")
    for name, array in w.arrays().items():
        check_on_device(array, "w")
        address = int(array.data.ptr)
        if address % _VECTOR_BYTES:
            expected = f"{name} aligned to {_VECTOR_BYTES} bytes"
            raise ArgumentError("w", expected=expected, got=f"address {address:#x}")


def check_dense_output(out: Any, shape: tuple[int, int], dtype: DType) -> None:
    """Raise ``ArgumentError`` unless ``out`` is a C-contiguous CuPy array [M, K] of the value type."""
    wanted = numpy_dtype(dtype)
    if not is_cupy(out) or out.shape != shape or out.dtype != wanted or not out.flags.c_contiguous:
        expected = f"a C-contiguous CuPy array of {wanted} [{shape[0]}, {shape[1]}]"
        got = f"{type(out).__name__} of {getattr(out, 'dtype', '?')} {tuple(getattr(out, 'shape', ()))}"
        raise ArgumentError("out", expected=expected, got=got)
