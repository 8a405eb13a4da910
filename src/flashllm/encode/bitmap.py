# SPDX-License-Identifier: Apache-2.0
"""Dense <-> bitmap on the current CUDA device: host side of cuda/encode/bitmap.cu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flashllm.backends.cuda import launch
from flashllm.device import memory_errors
from flashllm.encode.source import (
    BITS16,
    SOURCES,
    check_decodable,
    check_dense_output,
    check_on_device,
    layout_of,
    send_report,
    source_of,
)
from flashllm.errors import ArgumentError
from flashllm.formats.base import ReportCallback
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import (
    CHUNK_ROWS,
    GROUP,
    LANES,
    MAX_ROWS,
    PARTS,
    PLACE_TILES,
    SLACK,
    STREAM_ELEMENTS,
    STREAMS,
    chunks_for,
)
from flashllm.formats.bits import numpy_dtype
from flashllm.formats.runs import runs_of
from flashllm.formats.tiles import tile_grid
from flashllm.jit.spec import KernelSpec

_THREADS = PARTS * LANES
_TOTALS = 5  # nnz, and the four fields of the rounding report
_ROW_BYTES = 2 * STREAMS
_DECODED_ROWS = SLACK + PLACE_TILES * STREAM_ELEMENTS + 2  # value rows that one part may need in PLACE_TILES tiles


def _spec(name: str, *source: str, group_values: int | None = None, threads: int = _THREADS) -> KernelSpec:
    groups = () if group_values is None else (("kGroupValues", str(group_values)),)
    return KernelSpec(
        name=f"bitmap_{name}",
        source="encode/bitmap.cu",
        function=f"flashllm::bitmap_{name}",
        template=(*(("Source", text) for text in source), *groups),
        threads=threads,
    )


def _run_spec(name: str) -> KernelSpec:
    """A kernel in which each warp processes one run."""
    return _spec(name, threads=LANES)


def _decode_spec() -> KernelSpec:
    """A block decodes one part of ``PLACE_TILES`` tiles; each of its warps takes one of these tiles."""
    return replace(_spec("decode", threads=PLACE_TILES * LANES), shared_bytes=_DECODED_ROWS * _ROW_BYTES)


def specs() -> list[KernelSpec]:
    """Every kernel that this module can launch, including those that :mod:`flashllm.encode.slot24` needs."""
    write = [_spec("write", source, group_values=GROUP) for source in SOURCES]
    write.append(_spec("write", BITS16, group_values=2))  # slots are patterns already
    by_source = [*(_spec("count", source) for source in SOURCES), *write]
    return [*by_source, _run_spec("place"), _run_spec("join"), _decode_spec()]


def run_arguments(shape: tuple[int, int]) -> tuple[np.int32, np.int32]:
    """The runs of a matrix as kernels take them: how many, and the cost of a row's end."""
    runs = runs_of(tile_grid(shape))
    return np.int32(runs.count), np.int32(runs.row_cost)


def encode(
    a: Any, *, dtype: str | None = None, report: ReportCallback | None = None, group_values: int = GROUP
) -> Bitmap:
    """Encode a CuPy matrix [M, K] on the current device; the same bytes as the NumPy encoder.

    ``a`` holds float16, bfloat16 or float32 (rounded to nearest even in the kernel), or uint16 bit patterns when
    ``dtype`` says of which type. Its rows are contiguous; any row pitch is allowed. ``dtype`` defaults to bf16 for
    bf16, else fp16. ``report`` receives what the rounding did. Memory besides the result: 256 bytes per tile of 8192
    elements and 4 per run. Waits for the device once, to learn the size of the result. No group of ``a`` may have more
    than ``group_values`` elements; the groups of the bitmap then have no more either. Raises ``ArgumentError``.
    """
    import cupy

    source, kind = source_of(a, dtype)
    shape, pitch = layout_of(a)
    check_on_device(a, "a")
    tiles_m, tiles_k = tile_grid(shape)
    tiles = tiles_m * tiles_k
    size = (np.int32(shape[0]), np.int32(shape[1]))

    lags = cupy.empty((tiles, PARTS, STREAMS), np.uint8)
    totals = cupy.zeros(_TOTALS, np.uint64)
    fronts = cupy.empty(tiles + 1, np.int32)
    launch(_spec("count", source), (tiles,), (a, np.int64(pitch), lags, totals, *size))
    count, row_cost = run_arguments(shape)
    lengths = cupy.empty(int(count), np.int32)
    runs = (np.int32(tiles_m), np.int32(tiles_k), count, row_cost)
    places = cupy.empty((-(-tiles // PLACE_TILES), PARTS, STREAMS), np.uint16)
    launch(_run_spec("place"), lengths.shape, (lags, fronts, lengths, places, *runs))
    launch(_run_spec("join"), lengths.shape, (lengths, fronts, *runs))
    rows, nnz = (int(v) for v in cupy.stack([fronts[-1].astype(np.int64), totals[0].astype(np.int64)]).get())
    if not 0 <= rows <= MAX_ROWS:
        raise ArgumentError("a", expected=f"at most {MAX_ROWS} value rows", got=f"{rows % 2**32}")
    chunks = chunks_for(rows)
    with memory_errors("encoded weight", 2 * chunks * PARTS * CHUNK_ROWS * STREAMS + tiles * _THREADS * 8):
        values = cupy.zeros((chunks, PARTS, CHUNK_ROWS, LANES, 2), np.uint16)
        masks = cupy.empty((tiles, PARTS, LANES, 2), np.uint32)
    written = (lags, fronts, masks, values, places, *size, count, row_cost)
    launch(_spec("write", source, group_values=group_values), (tiles,), (a, np.int64(pitch), *written))
    send_report(report, source, nnz, totals[1:])
    return Bitmap(shape=shape, dtype=kind, nnz=nnz, masks=masks, values=values, fronts=fronts, places=places)


def decode_arguments(w: Bitmap, out: Any) -> tuple[KernelSpec, tuple[int], tuple[Any, ...]]:
    """Kernel, grid and arguments that write the dense matrix of ``w`` to ``out``."""
    tiles_m, tiles_k = w.tiles
    size = (np.int32(w.shape[0]), np.int32(w.shape[1]))
    arguments = (w.masks, w.values, w.fronts, w.places, out, *size, *run_arguments(w.shape))
    return _decode_spec(), (PARTS * -(-tiles_m * tiles_k // PLACE_TILES),), arguments


def decode(w: Bitmap, *, out: Any = None) -> Any:
    """Dense CuPy matrix [M, K] (float16 or ml_dtypes.bfloat16) of a weight on the current device.

    If ``out``, a C-contiguous CuPy array of that shape and type, is given, it is written and nothing is allocated.
    Decoding takes longer if K is not a multiple of 8 or ``out`` is not aligned to 16 bytes. Raises ``ArgumentError``.
    """
    import cupy

    check_decodable(w)
    if out is None:
        with memory_errors("decoded weight", w.shape[0] * w.shape[1] * 2):
            out = cupy.empty(w.shape, numpy_dtype(w.dtype))
    else:
        check_dense_output(out, w.shape, w.dtype)
    launch(*decode_arguments(w, out))
    return out
