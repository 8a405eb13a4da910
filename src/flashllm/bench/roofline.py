# SPDX-License-Identifier: Apache-2.0
"""Bytes a product must move and the time that takes: the floor every measured time is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from flashllm.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Read bandwidth of one GPU model in GB/s (10^9 bytes) and where the figure comes from."""

    name: str
    read_gbps: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(name="H100 80GB", read_gbps=3060.0, source="measured, pure read"),
        Gpu(name="H200", read_gbps=4530.0, source="measured, pure read"),
        Gpu(name="A100 40GB", read_gbps=1555.0, source="datasheet peak"),
        Gpu(name="A100 80GB", read_gbps=2039.0, source="datasheet peak (SXM)"),
        Gpu(name="H100 PCIe", read_gbps=2000.0, source="datasheet peak"),
        Gpu(name="L40S", read_gbps=864.0, source="datasheet peak"),
        Gpu(name="RTX 4090", read_gbps=1008.0, source="datasheet peak"),
    )
}
"""GPUs whose roofline can be modelled without having one."""

DEFAULT_GPU = "H100 80GB"


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name`` (case does not matter). Raises :class:`ArgumentError` with the known names."""
    gpu = GPUS.get(" ".join(name.lower().split()))
    if gpu is None:
        raise ArgumentError("model-gpu", expected=f"one of {', '.join(g.name for g in GPUS.values())}", got=repr(name))
    return gpu


def product_bytes(m: int, k: int, n: int, weight_bytes: int) -> int:
    """Bytes of y[n, m] = x[n, k] @ W[m, k]^T: weights and x read once, y written once."""
    return weight_bytes + 2 * n * k + 2 * n * m


def tflops(m: int, k: int, n: int, microseconds: float) -> float:
    """10^12 operations per second, counted as if W were dense."""
    return 2.0 * m * n * k / microseconds * 1e-6


def gbps(n_bytes: int, microseconds: float) -> float:
    """GB/s (10^9 bytes per second)."""
    return n_bytes / microseconds * 1e-3


def floor_us(n_bytes: int, read_gbps: float) -> float:
    """Microseconds to move ``n_bytes`` at ``read_gbps``."""
    return n_bytes / read_gbps * 1e-3
