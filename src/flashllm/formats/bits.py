# SPDX-License-Identifier: Apache-2.0
"""Values as 16-bit patterns: rounding from wider types, exact widening, zero tests.

All formats store the bit patterns of fp16 or bf16 values, so the encoders work on ``uint16`` throughout.
Rounding is to nearest, ties to even. A NaN of a wider type becomes the quiet NaN with the same sign
(0x7e00 in fp16, 0x7fc0 in bf16), so that the host and the device encoder agree to the bit; 16-bit
sources keep every bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES, DType, RoundingReport

MAGNITUDE = np.uint16(0x7FFF)
"""Mask of all bits but the sign: a value is a zero of either sign when these bits are 0."""

INFINITY = {"fp16": 0x7C00, "bf16": 0x7F80}
"""Bit pattern of +infinity."""
_QUIET_NAN = {"fp16": 0x7E00, "bf16": 0x7FC0}


def check_dtype(dtype: str | None) -> DType:
    """``dtype`` itself if it names a value type; raises ``ArgumentError`` otherwise."""
    for known in DTYPES:
        if dtype == known:
            return known
    raise ArgumentError("dtype", expected=" or ".join(repr(d) for d in DTYPES), got=repr(dtype))


def bfloat16() -> np.dtype[Any]:
    """The NumPy dtype of bf16 arrays (from ml_dtypes)."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """NumPy dtype of a value type."""
    return np.dtype(np.float16) if dtype == "fp16" else bfloat16()


def kind_of(dtype: Any) -> str:
    """``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp64"``, or ``""`` for any other dtype or byte order."""
    name = str(dtype)
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}.get(name, "")


class RoundingTally:
    """Sums the effect of rounding over the parts of a matrix."""

    def __init__(self) -> None:
        self.total = self.changed = self.became_zero = self.became_infinite = 0

    def add(self, source: NDArray[Any], bits: NDArray[np.uint16], dtype: DType) -> None:
        """Count the elements of ``source`` that ``bits``, its rounded patterns, do not represent exactly."""
        nonzero = source != 0
        magnitude = bits & MAGNITUDE
        self.total += int(np.count_nonzero(nonzero))
        same = widen(bits, dtype) == source
        self.changed += int(source.size - np.count_nonzero(same) - np.count_nonzero(source != source))
        self.became_zero += int(np.count_nonzero(nonzero & (magnitude == 0)))
        self.became_infinite += int(np.count_nonzero((magnitude == INFINITY[dtype]) & ~same))

    def report(self) -> RoundingReport:
        """The sums as a report."""
        return RoundingReport(
            total=self.total,
            changed=self.changed,
            became_zero=self.became_zero,
            became_infinite=self.became_infinite,
        )


def widen(bits: NDArray[np.uint16], dtype: DType) -> NDArray[np.float32]:
    """float32 values of 16-bit patterns; exact."""
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bits(a: NDArray[Any], dtype: DType, *, tally: RoundingTally | None = None) -> NDArray[np.uint16]:
    """Patterns of ``a`` rounded to ``dtype``, same shape; a view when ``a`` has that type already.

    ``a`` is float16, bfloat16, float32 or float64. With ``tally`` the effect of the rounding is counted.
    """
    kind = kind_of(a.dtype)
    if kind == dtype:
        bits = a.view(np.uint16)
    elif kind in ("fp16", "bf16"):
        bits = _round_float32(widen(a.view(np.uint16), check_dtype(kind)), dtype)
    elif kind == "fp32":
        bits = _round_float32(a, dtype)
    else:
        bits = _round_float64(a, dtype)
    if tally is not None:
        tally.add(widen(a.view(np.uint16), check_dtype(kind)) if kind in DTYPES else a, bits, dtype)
    return bits


def _round_float32(a: NDArray[np.float32], dtype: DType) -> NDArray[np.uint16]:
    if dtype == "fp16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            bits = a.astype(np.float16).view(np.uint16)
    else:
        wide = np.ascontiguousarray(a).view(np.uint32)
        bits = ((wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
            np.uint16
        )
    return _quiet_nans(a, bits, dtype)


def _round_float64(a: NDArray[np.float64], dtype: DType) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "fp16":
            return _quiet_nans(a, a.astype(np.float16).view(np.uint16), dtype)
        # Two roundings to nearest could differ from one. So the first rounds to odd: toward zero, and then the
        # last bit is set if anything was lost. This keeps the second from mistaking a near tie for a tie.
        narrow = a.astype(np.float32)
        wide = narrow.view(np.uint32)
        back = narrow.astype(np.float64)
        wide -= (np.abs(back) > np.abs(a)).astype(np.uint32)
        wide |= ((back != a) & (a == a)).astype(np.uint32)
        return _round_float32(narrow, dtype)


def _quiet_nans(source: NDArray[Any], bits: NDArray[np.uint16], dtype: DType) -> NDArray[np.uint16]:
    nan = np.isnan(source)
    if nan.any():
        bits = np.where(nan, np.uint16(_QUIET_NAN[dtype]) | (np.signbit(source).astype(np.uint16) << 15), bits)
    return bits
