# SPDX-License-Identifier: Apache-2.0
"""Dense <-> Tiled-CSL on the current CUDA device: host side of cuda/encode/tiled_csl.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashllm.backends.cuda import launch
from flashllm.device import current_device, memory_errors
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES, DType, ReportCallback, RoundingReport
from flashllm.formats.bits import check_dtype, kind_of, numpy_dtype
from flashllm.formats.sources import check_shape, is_cupy
from flashllm.formats.tiled_csl import TiledCSL, check_order
from flashllm.formats.tiled_csl_encode import ORDERS, WORDS_PER_VECTOR, check_vectors, tile_grid
from flashllm.jit.spec import KernelSpec

_SOURCE = "encode/tiled_csl.cu"
_THREADS = 256
_BITS16 = "flashllm::csl_encode::Bits16"
_REPORT_FIELDS = ("total", "changed", "became_zero", "became_infinite")  # as enum RoundingField
_ROUNDING = {"fp16": "flashllm::csl_encode::Float32ToFp16", "bf16": "flashllm::csl_encode::Float32ToBf16"}


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
    sources = [_BITS16, *_ROUNDING.values()]
    fills = [_fill_spec(source, order) for source in sources for order in ORDERS]
    return [*(_count_spec(source) for source in sources), *fills, _decode_spec()]


def encode(a: Any, *, dtype: str | None = None, order: str = "bank", report: ReportCallback | None = None) -> TiledCSL:
    """Encode a CuPy matrix [M, K] on the current device; the same bytes as the NumPy encoder.

    ``a`` holds float16, bfloat16 or float32 (rounded to nearest even in the kernel), or uint16 bit
    patterns when ``dtype`` says of which type. Its rows are contiguous; the row pitch is free. ``dtype``
    defaults to bf16 for bf16, else fp16. ``report`` receives what the rounding did. Memory beside the
    result: at most 20 bytes per tile. Waits for the device once, to learn the size of the result. Raises
    ``ArgumentError``.
    """
    import cupy

    way = check_order(order)
    source, kind = _source_of(a, dtype)
    shape = _check_layout(a)
    _check_device(a, "a")
    grid_m, grid_k = tile_grid(shape)
    tiles = grid_m * grid_k
    pitch = a.strides[0] // a.itemsize if shape[0] > 1 else shape[1]
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
    if report is not None:
        # A 16-bit source is not rounded: its nonzero elements are the stored ones.
        effect = [nnz, 0, 0, 0] if source == _BITS16 else [int(v) for v in rounding.get()]
        report(RoundingReport(**dict(zip(_REPORT_FIELDS, effect, strict=True))))
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

    ``out``, a C-contiguous CuPy array of that shape and type, is written when given; then nothing is
    allocated.
    """
    import cupy

    if not w.is_device:
        raise ArgumentError("w", expected="a weight on a device (see to_device)", got="a weight on the host")
    _check_device(w.words, "w")
    if w.words.data.ptr % 16:
        raise ArgumentError("w", expected="words aligned to 16 bytes", got=f"address {w.words.data.ptr:#x}")
    rows, columns = w.shape
    dtype = numpy_dtype(w.dtype)
    if out is None:
        with memory_errors("decoded weight", rows * columns * dtype.itemsize):
            out = cupy.empty((rows, columns), dtype)
    elif not is_cupy(out) or out.shape != (rows, columns) or out.dtype != dtype or not out.flags.c_contiguous:
        expected = f"a C-contiguous CuPy array of {dtype} [{rows}, {columns}]"
        got = f"{type(out).__name__} of {getattr(out, 'dtype', '?')} {tuple(getattr(out, 'shape', ()))}"
        raise ArgumentError("out", expected=expected, got=got)
    grid_m, grid_k = w.tiles
    pair_stores = columns % 2 == 0 and out.data.ptr % 4 == 0
    size = (np.int64(rows), np.int64(columns), np.int32(grid_k), np.int32(pair_stores))
    launch(_decode_spec(), (grid_m * grid_k,), (w.words, w.tile_offsets, *size, out))
    return out


def _source_of(a: Any, dtype: str | None) -> tuple[str, DType]:
    """The kernels' source type and the value type for an input and the ``dtype`` asked for."""
    if not is_cupy(a):
        raise ArgumentError("a", expected="a CuPy array", got=type(a).__name__)
    wanted = check_dtype(dtype) if dtype is not None else None
    kind = kind_of(a.dtype)
    if a.dtype == np.uint16:
        if wanted is None:
            raise ArgumentError("dtype", expected="'fp16' or 'bf16' for uint16 bit patterns", got="None")
        return _BITS16, wanted
    if kind == "fp32":
        target: DType = wanted or "fp16"
        return _ROUNDING[target], target
    for own in DTYPES:
        if kind == own:
            if wanted not in (None, own):
                expected = f"{own!r} for {a.dtype} input (convert to float32 first to round to another type)"
                raise ArgumentError("dtype", expected=expected, got=repr(wanted))
            return _BITS16, own
    raise ArgumentError("a", expected="float16, bfloat16, float32 or uint16 bit patterns", got=str(a.dtype))


def _check_device(a: Any, argument: str) -> None:
    current = current_device()
    if int(a.device.id) != current:
        raise ArgumentError(argument, expected=f"data on the current device {current}", got=f"device {a.device.id}")


def _check_layout(a: Any) -> tuple[int, int]:
    shape = check_shape(a.shape, argument="a")
    contiguous = shape[1] == 1 or a.strides[1] == a.itemsize
    separate = shape[0] == 1 or (a.strides[0] >= shape[1] * a.itemsize and a.strides[0] % a.itemsize == 0)
    if not (contiguous and separate):
        raise ArgumentError("a", expected="rows that are contiguous (row-major)", got=f"strides {a.strides}")
    return shape
