# SPDX-License-Identifier: Apache-2.0
"""Builds result rows from what a runner has measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flashllm.bench import roofline
from flashllm.bench.cases import Group
from flashllm.bench.environment import Environment, utc_now
from flashllm.bench.results import SCHEMA, Row
from flashllm.bench.telemetry import Reading
from flashllm.bench.timing import Method, Timing


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One system on one case: what ran, over which weights, how fast and how right."""

    system: str
    format: str
    kernel: str
    choice: str
    deterministic: bool | None
    sparsity: float | None
    sparsity_real: float
    weight_bytes: int
    copies: int
    ratio: float
    """Largest error in units of the bound; infinite when an element is not a number."""
    passed: bool
    reference: str
    timing: Timing | None = None
    cublas_us: float | None = None
    overlaps: bool = False
    """Launches may have overlapped each other."""


def make_row(
    environment: Environment,
    group: Group,
    n: int,
    measured: Measured,
    *,
    method: Method | None = None,
    read_gbps: float | None = None,
    reading: Reading | None = None,
) -> Row:
    """The row of ``measured``; without a ``timing`` in it (no GPU) every time stays ``None``."""
    m, k = group.m, group.k
    n_bytes = roofline.product_bytes(m, k, n, measured.weight_bytes)
    timing = measured.timing
    us = timing.median_us if timing else None
    finite = measured.ratio < 1e300
    reading = reading or Reading()
    return Row(
        schema=SCHEMA,
        kind="kernel",
        time_utc=utc_now(),
        **asdict(environment),
        sm_mhz=reading.sm_mhz,
        temp_c=reading.temp_c,
        power_w=reading.power_w,
        model=group.model,
        layer=group.layer,
        M=m,
        K=k,
        N=n,
        dtype=group.dtype,
        sparsity=measured.sparsity,
        sparsity_real=round(measured.sparsity_real, 6),
        pattern=group.pattern,
        seed=group.seed,
        system=measured.system,
        format=measured.format,
        kernel=measured.kernel,
        choice=measured.choice,
        deterministic=measured.deterministic,
        l2=method.l2 if method else None,
        launch=method.launch + "-pdl" * measured.overlaps if method else None,
        copies=measured.copies,
        rotated_mb=round(measured.copies * measured.weight_bytes / 1e6, 3),
        read_gbps=rounded(read_gbps, 1),
        bytes=n_bytes,
        median_us=rounded(us, 3),
        p20_us=rounded(timing.p20_us if timing else None, 3),
        p80_us=rounded(timing.p80_us if timing else None, 3),
        min_us=rounded(timing.min_us if timing else None, 3),
        launches=timing.launches if timing else 0,
        tflops=rounded(roofline.tflops(m, k, n, us) if us else None, 3),
        gbps=rounded(roofline.gbps(n_bytes, us) if us else None, 1),
        roofline_fraction=rounded(roofline.floor_us(n_bytes, read_gbps) / us if us and read_gbps else None, 4),
        cublas_us=rounded(measured.cublas_us, 3),
        speedup=rounded(measured.cublas_us / us if us and measured.cublas_us else None, 4),
        max_err_over_bound=round(measured.ratio, 4) if finite else None,
        reference=measured.reference,
        check="pass" if measured.passed and finite else "fail",
    )


def rounded(value: float | None, digits: int) -> float | None:
    """``value`` rounded to ``digits`` decimal places; ``None`` stays ``None``."""
    return None if value is None else round(value, digits)
