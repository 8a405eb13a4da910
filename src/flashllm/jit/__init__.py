# SPDX-License-Identifier: Apache-2.0
"""Run-time compilation: a kernel description goes in, cached machine code comes out."""

from __future__ import annotations

from flashllm.jit.spec import ALL_ARCHS, KernelSpec, arch_for_device, normalize_arch, shared_limit

__all__ = ["ALL_ARCHS", "KernelSpec", "arch_for_device", "normalize_arch", "shared_limit"]
