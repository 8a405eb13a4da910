# SPDX-License-Identifier: Apache-2.0
"""Dense <-> slot24 on the current CUDA device: host side of cuda/encode/slot24.cu."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from flashllm.backends.cuda import launch
from flashllm.device import memory_errors
from flashllm.encode import bitmap
from flashllm.encode.source import (
    SOURCES,
    check_decodable,
    check_dense_output,
    check_on_device,
    layout_of,
    send_report,
    source_of,
)
from flashllm.formats.base import ReportCallback
from flashllm.formats.bitmap_encode import LANES, PARTS
from flashllm.formats.bits import numpy_dtype
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_encode import slots_shape, unpaired
from flashllm.formats.slot24_pairs import GROUP_VALUES, PAIRS, Arrangement, check_group_values, check_window, tried
from flashllm.formats.slot24_parts import PARTS_OF, Parts, check_part_rows
from flashllm.formats.tiles import tile_grid
from flashllm.jit.spec import KernelSpec

_THREADS = PARTS * LANES
_TOTALS = 5  # nnz, and the four fields of the rounding report
_STAGE_BYTES = 64 * (2 * PAIRS + 8) * 2  # 64 dense rows of a window, which a block decodes


def _spec(name: str, *template: tuple[str, str], threads: int = _THREADS) -> KernelSpec:
    return KernelSpec(
        name=f"slot24_{name}",
        source="encode/slot24.cu",
        function=f"flashllm::slot24_{name}",
        template=template,
        threads=threads,
    )


def _mark_spec(source: str) -> KernelSpec:
    return _spec("mark", ("Source", source))


def _fill_spec(source: str, parts: Parts) -> KernelSpec:
    return _spec("fill", ("Source", source), ("kPartRows", str(parts.rows)))


def _pair_spec(parts: Parts, group_values: int) -> KernelSpec:
    template = ("kPartRows", str(parts.rows)), ("kGroupValues", str(group_values))
    return _spec("pair", *template, threads=parts.bands * LANES)


def _decode_spec(parts: Parts) -> KernelSpec:
    return replace(_spec("decode", ("kPartRows", str(parts.rows))), shared_bytes=_STAGE_BYTES)


def specs() -> list[KernelSpec]:
    """Every kernel of its own that this module can launch; it also uses those of the bitmap encoder."""
    parts = PARTS_OF.values()
    fill = [_fill_spec(source, shape) for source in SOURCES for shape in parts]
    pair = [_pair_spec(shape, values) for shape in parts for values in GROUP_VALUES]
    return [*map(_mark_spec, SOURCES), *fill, *pair, *map(_decode_spec, parts)]


def encode(
    a: Any,
    *,
    dtype: str | None = None,
    report: ReportCallback | None = None,
    window: int | None = None,
    part_rows: int | None = None,
    group_values: int | None = None,
) -> Slot24:
    """Encode a CuPy matrix [M, K] on the current device; the same bytes as the NumPy encoder.

    ``a`` holds float16, bfloat16 or float32 (rounded to nearest even in the kernel), or uint16 bit patterns when
    ``dtype`` says of which type. Its rows are contiguous; any row pitch is allowed. ``dtype`` defaults to bf16 for
    bf16, else fp16. ``report`` receives what the rounding did. ``window``, ``part_rows`` and ``group_values`` are as
    for ``Slot24.from_dense``.

    Memory besides the result: the matrix of slots, which takes 256 bytes for each window of each row, padded to whole
    tiles (half of the dense 16-bit matrix when windows have 256 columns), and M K / 8 bytes. Waits for the device once
    for each arrangement that it tries, and twice more. Raises ``ArgumentError``, also when the columns do not pair up
    as requested.
    """
    import cupy

    check_window(window)
    check_group_values(group_values)
    check_part_rows(part_rows)
    source, kind = source_of(a, dtype)
    shape, pitch = layout_of(a)
    check_on_device(a, "a")
    rows, columns = shape
    strips = tile_grid(shape)[0]
    matrix, size = (a, np.int64(pitch)), (np.int32(rows), np.int32(columns))

    with memory_errors("masks of columns", strips * PARTS * columns * 4):
        masks = cupy.empty((strips, PARTS, columns), np.uint32)
    totals = cupy.zeros(_TOTALS, np.uint64)
    groups = -(-columns // _THREADS)
    launch(_mark_spec(source), (strips * PARTS * groups,), (*matrix, masks, totals, *size))
    density = int(totals[0]) / (rows * columns)
    how, pairs = _pair_up(masks, shape, tried(window, part_rows, group_values, density))
    if how is None:
        raise unpaired(window, group_values)
    parts, chosen = how.parts, how.window

    slots_of = slots_shape(shape, chosen)
    picks_of = (len(pairs), PARTS, LANES, 2)
    with memory_errors("matrix of slots", 2 * slots_of[0] * slots_of[1] + 4 * math.prod(picks_of)):
        slots = cupy.empty(slots_of, np.uint16)
        picks = cupy.empty(picks_of, np.uint32)
    filled = (masks, pairs, slots, picks, *size, np.int32(chosen))
    launch(_fill_spec(source, parts), (len(pairs) // 2,), (*matrix, *filled))
    del masks, filled
    packed = bitmap.encode(slots, dtype=kind, group_values=how.group_values)
    send_report(report, source, packed.nnz, totals[1:])
    return Slot24(
        shape=shape,
        dtype=kind,
        nnz=packed.nnz,
        window=chosen,
        part_rows=parts.rows,
        group_values=how.group_values,
        masks=packed.masks,
        values=packed.values,
        fronts=packed.fronts,
        places=packed.places,
        picks=picks,
        columns=pairs,
    )


def _pair_up(masks: Any, shape: tuple[int, int], arrangements: list[Arrangement]) -> tuple[Arrangement | None, Any]:
    """The first arrangement with which all columns pair up, if any, and ``columns`` for it."""
    import cupy

    failed = cupy.empty(1, np.int32)
    for how in arrangements:
        tiles_m, tiles_k = tile_grid(slots_shape(shape, how.window))
        tiles = tiles_m * tiles_k
        with memory_errors("pairs of columns", tiles * _THREADS * how.parts.steps):
            columns = cupy.empty((tiles, PARTS, LANES, how.parts.steps), np.uint8)
        failed.fill(0)
        sizes = np.int32(shape[1]), np.int32(how.window)
        launch(_pair_spec(how.parts, how.group_values), (tiles // 2,), (masks, columns, failed, *sizes))
        if int(failed[0]) == 0:
            return how, columns
    return None, None


def decode_arguments(w: Slot24, out: Any) -> tuple[KernelSpec, tuple[int], tuple[Any, ...]]:
    """Kernel, grid and arguments that write the dense matrix of ``w`` to ``out``."""
    size = (np.int32(w.shape[0]), np.int32(w.shape[1]), np.int32(w.window))
    buffers = (w.masks, w.values, w.fronts, w.places, w.picks, w.columns)
    arguments = (*buffers, out, *size, *bitmap.run_arguments(slots_shape(w.shape, w.window)))
    return _decode_spec(PARTS_OF[w.part_rows]), (len(w.columns),), arguments


def decode(w: Slot24, *, out: Any = None) -> Any:
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
