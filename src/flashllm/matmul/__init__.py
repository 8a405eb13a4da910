# SPDX-License-Identifier: Apache-2.0
"""The product y[N, M] = x[N, K] @ W[M, K]^T: choice of the format, planning, dispatch, launch and tuning."""

from flashllm.matmul.auto import pack
from flashllm.matmul.planning import Plan, plan
from flashllm.matmul.product import spmm

__all__ = ["Plan", "pack", "plan", "spmm"]
