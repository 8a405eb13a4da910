# SPDX-License-Identifier: Apache-2.0
"""Bytes a product must move and the time that takes: the floor every measured time is compared with."""

from __future__ import annotations

from flashllm.gpus import DEFAULT_GPU, GPUS, Gpu, find_gpu

__all__ = [
    "DEFAULT_GPU",
    "GPUS",
    "Gpu",
    "find_gpu",
    "floor_us",
    "gbps",
    "product_bytes",
    "tflops",
]


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
