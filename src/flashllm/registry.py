# SPDX-License-Identifier: Apache-2.0
"""Every kernel instance of the package, for compile gates and listings."""

from __future__ import annotations

from flashllm.jit.spec import KernelSpec


def all_specs() -> list[KernelSpec]:
    """Each spec once, in a fixed order: products, encoders, measurement helpers."""
    from flashllm.bench import bandwidth, data
    from flashllm.encode import tiled_csl as encode_tiled_csl
    from flashllm.matmul import tiled_csl

    sources = (tiled_csl.specs(), encode_tiled_csl.specs(), bandwidth.specs(), data.specs())
    return list(dict.fromkeys(spec for specs in sources for spec in specs))
