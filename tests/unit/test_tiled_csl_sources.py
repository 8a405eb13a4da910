# SPDX-License-Identifier: Apache-2.0
"""What the Tiled-CSL encoder does with wider types and with scipy.sparse matrices."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp

import weight_cases as cases
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.base import RoundingReport
from flashllm.formats.bits import to_bits
from flashllm.formats.tiled_csl import TiledCSL


def nearest_even(value: float, dtype: str) -> int:
    """Pattern of a finite value rounded once, by exact arithmetic."""
    digits, least, largest = (11, -24, 65504.0) if dtype == "fp16" else (8, -133, 2.0**128 * (1 - 2.0**-8))
    sign = 0x8000 if np.signbit(value) else 0
    exact = Fraction(abs(value))
    if not exact:
        return sign
    exponent = max(int(np.frexp(abs(value))[1]) - digits, least)
    steps = exact / Fraction(2) ** exponent
    whole = int(steps)
    part = steps - whole
    whole += part > Fraction(1, 2) or (part == Fraction(1, 2) and whole % 2)
    result = whole * Fraction(2) ** exponent
    number = np.inf if result > Fraction(largest) else float(result)
    if dtype == "fp16":
        return sign | int(np.array(number, np.float16).view(np.uint16))
    return sign | int(np.array(number, np.float32).view(np.uint32) >> 16)


def hard_values(dtype: str) -> list[float]:
    """Doubles at, just below and just above the ties between neighbouring values, and at the ends."""
    rng = np.random.default_rng(1)
    widen = (lambda p: p.view(np.float16).astype(np.float64)) if dtype == "fp16" else None
    patterns = np.unique(
        np.concatenate([rng.integers(0, 0x7F7F if dtype == "bf16" else 0x7BFF, 400), np.arange(40)])
    ).astype(np.uint16)
    if widen is None:
        low = (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        high = ((patterns.astype(np.uint32) + 1) << 16).view(np.float32).astype(np.float64)
    else:
        low, high = widen(patterns), widen(patterns + np.uint16(1))
    with np.errstate(over="ignore"):
        ties = (low + high) / 2
    values = np.concatenate([low, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    ends = [0.0, 65504, 65519.999, 65520, 65536, 3.4e38, 3.3961775e38, 1e39, 1e300, 2.0**-25, 2.0**-24, 5e-324]
    return [*values.tolist(), *(-values[:50]).tolist(), *ends]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float64_is_rounded_once(dtype: str) -> None:
    values = hard_values(dtype)
    got = to_bits(np.array(values), dtype).tolist()
    assert got == [nearest_even(v, dtype) for v in values]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_to_nearest_even(dtype: str) -> None:
    values = [float(np.float32(v)) for v in hard_values(dtype) if abs(v) <= 3.4028234e38]
    assert to_bits(np.array(values, np.float32), dtype).tolist() == [nearest_even(v, dtype) for v in values]


def test_nans_and_infinities_of_wider_types() -> None:
    for source in (np.float32, np.float64):
        a = np.array([np.nan, -np.nan, np.inf, -np.inf], source)
        assert to_bits(a, "fp16").tolist() == [0x7E00, 0xFE00, 0x7C00, 0xFC00]
        assert to_bits(a, "bf16").tolist() == [0x7FC0, 0xFFC0, 0x7F80, 0xFF80]
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert to_bits(signalling, "bf16").tolist() == [0x7FC0, 0xFFC0, 0x7FC0]
    assert to_bits(signalling, "fp16").tolist() == [0x7E00, 0xFE00, 0x7E00]


def test_report_counts_each_effect() -> None:
    a = np.zeros((130, 70))
    a[0, :8] = [1.0, 1 + 2**-20, 1e-9, 1e6, np.inf, np.nan, -0.0, -3e-8]
    reports: list[RoundingReport] = []
    w = TiledCSL.from_dense(a, report=reports.append)
    assert reports == [RoundingReport(total=7, changed=4, became_zero=1, became_infinite=1)]
    assert w.nnz == 6
    reports.clear()
    TiledCSL.from_scipy(sp.csr_array(a.astype(np.float32)), report=reports.append)
    assert reports == [RoundingReport(total=7, changed=4, became_zero=1, became_infinite=1)]


def test_report_of_a_source_that_fits() -> None:
    a = cases.matrix("uniform", 140, 70, 0.5, 3, "fp16")
    reports: list[RoundingReport] = []
    w = TiledCSL.from_dense(a, report=reports.append)
    assert reports == [RoundingReport(total=w.nnz, changed=0, became_zero=0, became_infinite=0)]


def test_dtype_is_chosen_or_follows_the_source() -> None:
    ones = np.ones((3, 3))
    assert TiledCSL.from_dense(ones).dtype == "fp16"
    assert TiledCSL.from_dense(ones.astype(np.float16)).dtype == "fp16"
    assert TiledCSL.from_dense(ones.astype(ml_dtypes.bfloat16)).dtype == "bf16"
    assert TiledCSL.from_dense(ones, dtype="bf16").to_dense().dtype == ml_dtypes.bfloat16
    third = np.full((1, 1), 1 / 3, np.float16)
    assert TiledCSL.from_dense(third, dtype="bf16").to_dense().view(np.uint16) == nearest_even(
        float(third[0, 0]), "bf16"
    )
    assert TiledCSL.from_scipy(sp.csr_array(ones)).dtype == "fp16"


def scipy_source(layout: str, matrix: bool, value: Any = np.float32) -> tuple[Any, np.ndarray]:
    a = np.where(cases.mask("uniform", 300, 150, 0.2, 9), 1, 0) * np.arange(1, 151) % 97
    a[7] = 0
    make = getattr(sp, f"{layout}_{'matrix' if matrix else 'array'}")
    return make(a.astype(value)), a.astype(np.float16)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("value", [np.float32, np.float64, np.int8, np.int64, np.uint16])
def test_scipy_equals_dense(layout: str, matrix: bool, value: Any) -> None:
    s, dense = scipy_source(layout, matrix, value)
    before = {k: v.copy() for k, v in vars(s).items() if isinstance(v, np.ndarray)}
    for order in ("bank", "row"):
        w = TiledCSL.from_scipy(s, order=order)
        w.validate()
        want = TiledCSL.from_dense(dense, order=order)
        np.testing.assert_array_equal(w.words, want.words)
        np.testing.assert_array_equal(w.tile_offsets, want.tile_offsets)
    for name, array in before.items():
        np.testing.assert_array_equal(vars(s)[name], array)


def test_scipy_duplicates_explicit_zeros_and_unsorted_columns() -> None:
    row, column = np.array([2, 0, 2, 2, 1, 1]), np.array([5, 9, 5, 0, 3, 3])
    data = np.array([0.5, 0.0, 0.25, 4.0, 1.0, -1.0], np.float32)
    want = np.zeros((3, 10), np.float16)
    want[2, 5], want[2, 0] = 0.75, 4
    coo = sp.coo_array((data, (row, column)), shape=(3, 10))
    unsorted = sp.csr_array((data.copy(), [9, 3, 3, 5, 5, 0], [0, 1, 3, 6]), shape=(3, 10))
    unsorted.data[:] = [0.0, 1.0, -1.0, 0.5, 0.25, 4.0]
    kept = unsorted.indices.copy()
    for s in (coo, unsorted, unsorted.tocsc()):
        w = TiledCSL.from_scipy(s)
        assert w.nnz == 2
        np.testing.assert_array_equal(w.to_dense(), want)
    np.testing.assert_array_equal(unsorted.indices, kept)


def test_scipy_keeps_nan_and_infinity() -> None:
    s = sp.csr_array(np.array([[0, np.nan, np.inf, -np.inf, 1]], np.float32))
    assert TiledCSL.from_scipy(s).to_dense().view(np.uint16).tolist() == [[0, 0x7E00, 0x7C00, 0xFC00, 0x3C00]]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("order", ["bank", "row"])
def test_to_scipy(dtype: str, order: str) -> None:
    a = cases.matrix("skewed", 260, 140, 0.3, 4, dtype)
    s = TiledCSL.from_dense(a, order=order).to_scipy()
    assert s.dtype == np.float32
    s.check_format(full_check=True)
    assert s.has_canonical_format
    finite = np.nan_to_num(a.astype(np.float32), nan=7, posinf=8, neginf=9)
    s.data = np.nan_to_num(s.data, nan=7, posinf=8, neginf=9)
    np.testing.assert_array_equal(s.toarray(), finite)


def broken(layout: str, field: str, index: int, value: int) -> Any:
    s, _ = scipy_source(layout, False)
    array = {"row": lambda: s.coords[0], "col": lambda: s.coords[1]}.get(field, lambda: getattr(s, field))()
    array[index] = value
    return s


@pytest.mark.parametrize(
    ("layout", "field", "index", "value"),
    [
        ("csr", "indices", 3, 150),
        ("csr", "indices", 3, -1),
        ("csc", "indices", 5, 300),
        ("csc", "indices", 5, -7),
        ("coo", "row", 2, 300),
        ("coo", "row", 2, -1),
        ("coo", "col", 4, 150),
        ("coo", "col", 4, -2),
        ("csr", "indptr", 0, 1),
        ("csr", "indptr", 4, 10**6),
        ("csr", "indptr", 300, 10**6),
        ("csc", "indptr", 1, -5),
    ],
)
def test_unsound_scipy_indices(layout: str, field: str, index: int, value: int) -> None:
    with pytest.raises(FormatError) as error:
        TiledCSL.from_scipy(broken(layout, field, index, value))
    assert error.value.field == field
    assert error.value.index in (index, index + 1)


@pytest.mark.parametrize(
    "s",
    [
        np.ones((2, 2)),
        "matrix",
        sp.bsr_array(np.ones((4, 4))),
        sp.dia_array(np.ones((4, 4))),
        sp.lil_array(np.ones((4, 4))),
        sp.csr_array(np.ones((4, 4), np.complex128)),
        sp.coo_array(np.ones(4)),
        sp.csr_array((0, 4)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_refused_scipy_sources(s: Any) -> None:
    with pytest.raises(ArgumentError) as error:
        TiledCSL.from_scipy(s)
    assert error.value.argument == "s"
