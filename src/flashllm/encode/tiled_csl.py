# SPDX-License-Identifier: Apache-2.0
"""Dense <-> Tiled-CSL on the current CUDA device: host side of cuda/encode/tiled_csl.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.backends.cuda import launch
from flashllm.device import memory_errors
from flashllm.encode.source import (
    SOURCES,
    check_dense_output,
    check_on_device,
    layout_of,
    send_report,
    source_of,
)
from flashllm.errors import ArgumentError
from flashllm.formats.base import ReportCallback
from flashllm.formats.bits import numpy_dtype
from flashllm.formats.tiled_csl import TiledCSL, check_order
from flashllm.formats.tiled_csl_encode import ORDERS, WORDS_PER_VECTOR, check_vectors
from flashllm.formats.tiles import tile_grid
from flashllm.jit.spec import KernelSpec

_SOURCE = "encode/tiled_csl.cu"
_THREADS = 256


def _count_spec(source: str) -> KernelSpec:
    return KernelSpec(
        name="tiled_csl_count",
        source=_SOURCE,
        function="flashllm::tiled_csl_count",
        template=(("Source", source),),
        threads=_THREADS,
    )


def _fill_spec(source: str, order: str) -> KernelSpec:
    return KernelSpec(
        name="tiled_csl_fill",
        source=_SOURCE,
        function="flashllm::tiled_csl_fill",
        template=(("Source", source), ("kBankOrder", "true" if order == "bank" else "false")),
        threads=_THREADS,
    )


def _decode_spec() -> KernelSpec:
    return KernelSpec(name="tiled_csl_decode", source=_SOURCE, function="flashllm::tiled_csl_decode", threads=_THREADS)


def specs() -> list[KernelSpec]:
    """Every kernel this module can launch."""
    fills = [_fill_spec(source, order) for source in SOURCES for order in ORDERS]
    return [*(_count_spec(source) for source in SOURCES), *fills, _decode_spec()]


def encode(a: Any, *, dtype: str | None = None, order: str = "bank", report: ReportCallback | None = None) -> TiledCSL:
    """Encode a CuPy matrix [M, K] on the current device; the same bytes as the NumPy encoder.

    ``a`` holds float16, bfloat16 or float32 (rounded to nearest even in the kernel), or uint16 bit
    patterns when ``dtype`` says of which type. Its rows are contiguous; any row pitch is allowed. ``dtype``
    defaults to bf16 for bf16, else fp16. ``report`` receives what the rounding did. Memory besides the
    result: at most 20 bytes per tile. Waits for the device once, to learn the size of the result. Raises
    ``ArgumentError``.
    """
    import cupy

    way = check_order(order)
    source, kind = source_of(a, dtype)
    shape, pitch = layout_of(a)
    check_on_device(a, "a")
    grid_m, grid_k = tile_grid(shape)
    tiles = grid_m * grid_k
    pairs = shape[1] % 2 == 0 and pitch % 2 == 0 and a.data.ptr % (2 * a.itemsize) == 0
    matrix = (a, np.int64(shape[0]), np.int64(shape[1]), np.int64(pitch), np.int32(grid_k), np.int32(pairs))

    counts = cupy.empty(tiles, np.int32)
    rounding = cupy.zeros(4, np.uint64)
    launch(_count_spec(source), (tiles,), (*matrix, counts, rounding))

    vectors = (counts + np.int32(WORDS_PER_VECTOR - 1)) // np.int32(WORDS_PER_VECTOR)
    summary = cupy.stack([counts.sum(dtype=np.int64), vectors.sum(dtype=np.int64), vectors.max().astype(np.int64)])
    nnz, total, largest = (int(v) for v in summary.get())
    check_vectors(total)
    tile_offsets = cupy.empty(tiles + 2, np.int32)
    tile_offsets[0] = 0
    tile_offsets[1:-1] = cupy.cumsum(vectors, dtype=np.int32)
    tile_offsets[-1] = total
    with memory_errors("encoded weight", 4 * WORDS_PER_VECTOR * total):
        words = cupy.empty(total * WORDS_PER_VECTOR, np.uint32)
    if total:
        launch(_fill_spec(source, way), (tiles,), (*matrix, tile_offsets, words))
    send_report(report, source, nnz, rounding)
    return TiledCSL(
        shape=shape,
        dtype=kind,
        nnz=nnz,
        words=words,
        tile_offsets=tile_offsets,
        order=way,
        max_tile_words=largest * WORDS_PER_VECTOR,
    )


def decode(w: TiledCSL, *, out: Any = None) -> Any:
    """Dense CuPy matrix [M, K] (float16 or ml_dtypes.bfloat16) of a weight on the current device.

    If ``out``, a C-contiguous CuPy array of that shape and type, is given, it is written and nothing is
    allocated.
    """
    import cupy

    if not w.is_device:
        raise ArgumentError("w", expected="a weight on a device (see to_device)", got="a weight on the host")
    check_on_device(w.words, "w")
    if w.words.data.ptr % 16:
        raise ArgumentError("w", expected="words aligned to 16 bytes", got=f"address {w.words.data.ptr:#x}")
    rows, columns = w.shape
    dtype = numpy_dtype(w.dtype)
    if out is None:
        with memory_errors("decoded weight", rows * columns * dtype.itemsize):
            out = cupy.empty((rows, columns), dtype)
    else:
        check_dense_output(out, w.shape, w.dtype)
    grid_m, grid_k = w.tiles
    pair_stores = columns % 2 == 0 and out.data.ptr % 4 == 0
    size = (np.int64(rows), np.int64(columns), np.int32(grid_k), np.int32(pair_stores))
    launch(_decode_spec(), (grid_m * grid_k,), (w.words, w.tile_offsets, *size, out))
    return out
