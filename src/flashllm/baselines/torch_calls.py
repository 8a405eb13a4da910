# SPDX-License-Identifier: Apache-2.0
"""PyTorch's operators called on CuPy's memory and streams, so that a CUDA graph can capture them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashllm.baselines.baseline import Way
from flashllm.errors import MissingDependencyError


def torch() -> Any:
    """The package. Raises :class:`MissingDependencyError` where it is not installed, or sees no GPU."""
    try:
        import torch as package
    except ImportError as error:
        raise MissingDependencyError("PyTorch is not installed: pip install torch") from error
    if not package.cuda.is_available():
        raise MissingDependencyError(f"PyTorch {package.__version__} sees no GPU; install a build for CUDA")
    return package


def as_tensor(array: Any) -> Any:
    """A CuPy array as a tensor on the same memory."""
    return torch().from_dlpack(array)


def as_bits(tensor: Any) -> Any:
    """A 2-D fp16 or bf16 tensor as a CuPy array on the same memory: float16, or uint16 bits."""
    import cupy

    package = torch()
    if tensor.dtype == package.float16:
        return cupy.from_dlpack(tensor)
    return cupy.from_dlpack(tensor.view(package.int16)).view(np.uint16)


def way(
    label: str,
    copies: int,
    multiply: Callable[[int], Any],
    *,
    transposed: bool = False,
    error_limit: float = Way.error_limit,
) -> Way:
    """A way that calls ``multiply(copy)``, which returns a new tensor [N, M], or [M, N] where ``transposed``.

    The tensor comes from PyTorch's allocator, whose memory stays where it is, so a captured graph may write there.
    """
    package = torch()
    last: list[Any] = []

    def launch(copy: int, stream: Any) -> None:
        with package.cuda.stream(package.cuda.ExternalStream(int(stream.ptr))):
            last[:] = [multiply(copy)]

    def output() -> Any:
        bits = as_bits(last[0])
        return bits.T if transposed else bits

    def buffer() -> Any:
        import cupy

        # Before the first launch there is no tensor yet, and so nothing to poison.
        return as_bits(last[0]) if last else cupy.empty(1, dtype=cupy.float16)

    return Way(
        label=label,
        deterministic=None,
        copies=copies,
        launch=launch,
        buffer=buffer,
        output=output,
        error_limit=error_limit,
    )
