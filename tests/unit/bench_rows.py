# SPDX-License-Identifier: Apache-2.0
"""A valid result row to vary in tests."""

from __future__ import annotations

from typing import Any

from flashllm.bench.results import Row


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "schema": 1, "kind": "kernel", "run_id": "r", "sweep_id": "s", "time_utc": "2026-11-23T00:00:00Z",
        "commit": "c" * 40, "dirty": False, "command": "flashllm bench", "backend": "cuda", "gpu": "NVIDIA H200",
        "arch": "sm_90a", "sm_count": 132, "driver": "580.1", "cuda": "13.0", "cupy": "14.2.0", "cublas": "13.1.0",
        "sm_mhz": 1980, "temp_c": 40, "power_w": 400.5, "model": "opt-30b", "layer": "fc1", "M": 28672, "K": 7168,
        "N": 16, "dtype": "fp16", "sparsity": 0.8, "sparsity_real": 0.80001, "pattern": "uniform", "seed": 0,
        "system": "flashllm", "format": "tiled-csl", "kernel": "tiled_csl", "choice": "auto", "deterministic": True,
        "l2": "cold", "launch": "graph", "copies": 4, "rotated_mb": 660.0, "read_gbps": 4500.0, "bytes": 165000000,
        "median_us": 60.0, "p20_us": 59.9, "p80_us": 60.1, "min_us": 59.8, "launches": 640, "tflops": 109.6,
        "gbps": 2750.0, "roofline_fraction": 0.61, "cublas_us": 102.0, "speedup": 1.7, "max_err_over_bound": 0.98,
        "reference": "float64 on 512 rows", "check": "pass",
    }  # fmt: skip
    return Row(**{**values, **changes})
