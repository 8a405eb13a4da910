# SPDX-License-Identifier: Apache-2.0
"""Wide x: the weight is expanded once to a dense scratch matrix, which cuBLAS multiplies.

A kernel reads and decodes W anew for every block of columns of x, so its time grows with N from its widest block on;
that of a dense product hardly grows until the tensor cores are busy. Above some N, it is faster to write W out dense.
cuBLAS then computes the sums, which may differ from float64 by a few times the error bound of our kernels
(docs/reliability.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.baselines.cublas_api import LT_ALIGNMENT
from flashllm.formats.bits import numpy_dtype
from flashllm.matmul.model import Model, Prediction, expand_us, predict
from flashllm.matmul.tensor_cores import N_BLOCKS
from flashllm.registry import encoder

if TYPE_CHECKING:
    from flashllm.baselines.cublas import Candidate, Cublas
    from flashllm.formats.weight import SparseWeight
    from flashllm.gpus import Gpu

LABEL = "expand, cublas"
"""What stands for the kernel's name in tables and rows."""
LEAST_N = N_BLOCKS[-1] + 1
LEAST_DENSE_BYTES = 1 << 24
"""Launches dominate the time of smaller matrices, and the model does not know their cost in an expansion."""
_MARGIN = 0.9  # an expansion must take less than this share of the kernel's time: its own is estimated, not fitted

_handles: dict[tuple[int, int], Cublas] = {}
_products: dict[tuple[int, int, int, int, int, str, bool], Candidate] = {}


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """How much scratch memory the dense matrix takes, at the start of the workspace."""

    scratch_bytes: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the model predicts for one product."""

    kernel: Prediction
    """The time by the kernel alone."""
    expand_us: float
    """Microseconds by expanding the weight."""
    expand: bool
    """Whether expanding pays."""

    @property
    def us(self) -> float:
        """Microseconds of the better way."""
        return self.expand_us if self.expand else self.kernel.us


def expected(
    format_name: str,
    *,
    m: int,
    k: int,
    n: int,
    weight_bytes: int,
    density: float,
    gpu: Gpu,
    model: Model | None = None,
) -> Expected:
    """Which way y[n, m] = x[n, k] @ W[m, k]^T takes less time.

    Raises :class:`ArgumentError` for a format without constants.
    """
    size: dict[str, Any] = {"m": m, "k": k, "n": n, "weight_bytes": weight_bytes, "density": density}
    prediction = predict(format_name, **size, gpu=gpu, model=model)
    us = expand_us(m=m, k=k, n=n, weight_bytes=weight_bytes, gpu=gpu, model=model)
    possible = n >= LEAST_N and 2 * m * k >= LEAST_DENSE_BYTES and encoder(format_name) is not None
    return Expected(kernel=prediction, expand_us=us, expand=possible and us < _MARGIN * prediction.us)


def expansion_of(w: SparseWeight) -> Expansion | None:
    """What expanding ``w`` takes; ``None`` for a format without a decoder on the GPU."""
    if encoder(w.format) is None:
        return None
    return Expansion(scratch_bytes=2 * w.shape[0] * w.shape[1])


def run(w: SparseWeight, x: Any, out: Any, workspace: Any, *, stream: Any = None) -> None:
    """Expand ``w`` into ``workspace`` and multiply checked operands; allocates nothing after the first call.

    The first call for a stream makes a cuBLAS handle with a workspace of its own of 32 MB, so a capture must come after
    that call.
    """
    import cupy

    stream = cupy.cuda.get_current_stream() if stream is None else stream
    module: Any = encoder(w.format)
    scratch = workspace.reshape(-1).view(np.uint8)
    dense = scratch[: 2 * w.shape[0] * w.shape[1]].view(numpy_dtype(w.dtype)).reshape(w.shape)
    with stream:
        module.decode(w, out=dense)
        at = (int(dense.data.ptr), int(x.data.ptr), int(out.data.ptr))
        aligned = all(address % LT_ALIGNMENT == 0 for address in at)
        _product(w.shape, int(x.shape[0]), w.dtype, int(stream.ptr), aligned=aligned).launch(*at, int(stream.ptr))


def release_stream(stream: int) -> None:
    """Like :func:`release`, for the stream with this handle, which another stream may have once it is gone."""
    for where in [where for where in _handles if where[1] == stream]:
        _handles.pop(where).close()
    for key in [key for key in _products if key[1] == stream]:
        del _products[key]


def release() -> None:
    """Destroy the cuBLAS handles of all streams. No captured graph of an expanded product may run afterwards."""
    for handle in _handles.values():
        handle.close()
    _handles.clear()
    _products.clear()


def _product(shape: tuple[int, int], n: int, dtype: str, stream: int, *, aligned: bool) -> Candidate:
    """cuBLAS's product: where the addresses allow it, cublasLt's first choice, which adds split-K pieces in fp32.

    Each stream has its own handle, since two products must not use the workspace of a handle at the same time.
    """
    from flashllm.baselines.cublas import Cublas, Layout
    from flashllm.device import current_device

    m, k = shape
    where = (current_device(), stream)
    key = (*where, m, k, n, dtype, aligned)
    found = _products.get(key)
    if found is None:
        handle = _handles.get(where)
        if handle is None:
            handle = _handles[where] = Cublas()
        ranked = handle.lt_candidates(Layout(), m=m, k=k, n=n, dtype=dtype) if aligned else []
        found = ranked[0] if ranked else handle.gemm_ex(Layout(), m=m, k=k, n=n, dtype=dtype)
        _products[key] = found
    return found
