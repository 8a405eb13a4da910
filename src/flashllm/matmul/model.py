# SPDX-License-Identifier: Apache-2.0
"""How long a product takes, estimated from bytes and decoding work; docs/auto.md says how well.

A kernel reads the packed weight and decodes it tile by tile while the next bytes arrive, so its time is a start-up plus
the longer of reading and decoding, with a smooth transition where they are about equal. The constants of each format
and width of a column block were fitted to measurements on an H200 (``model_h200.json``, written by
``experiments/fit_model.py``). On another GPU, the cycles of a tile and the start-up are assumed to be the same;
multiprocessors, clock and bandwidth are that GPU's. That is an extrapolation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from flashllm.errors import ArgumentError
from flashllm.formats.tiles import tile_grid
from flashllm.gpus import Gpu
from flashllm.matmul.tensor_cores import n_block_for

DATA_FILE = "model_h200.json"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one product moves and decodes."""

    weight_bytes: int
    """Bytes of the packed weight."""
    other_bytes: int
    """Bytes of x and y."""
    tiles: float
    """Tiles that are decoded for each block of columns."""
    nnz: float
    """Stored elements."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The time of one product and its parts, in microseconds; all ``column_blocks`` passes are included."""

    us: float
    start_us: float
    read_us: float
    decode_us: float
    n_block: int
    """Columns of x in one pass over the weight."""
    column_blocks: int

    @property
    def bound(self) -> str:
        """``"reading"`` or ``"decoding"``, whichever takes longer."""
        return "reading" if self.read_us >= self.decode_us else "decoding"


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """Fitted constants of one format's kernel for one width of a column block."""

    start_us: float
    """Time for the launch, the first bytes and the last sums."""
    tile_cycles: float
    """Cycles of a multiprocessor per tile, its elements not counted."""
    value_cycles: float
    """Cycles of a multiprocessor per stored element."""
    sharpness: float
    """Exponent of the smooth maximum: the larger, the better decoding hides behind reading, or the other way round."""

    def predict(self, load: Load, *, n_block: int, column_blocks: int, gpu: Gpu) -> Prediction:
        """The time of ``load`` in ``column_blocks`` passes over the weight."""
        read = (load.weight_bytes * column_blocks + load.other_bytes) / gpu.read_gbps * 1e-3
        cycles = (load.tiles * self.tile_cycles + load.nnz * self.value_cycles) / gpu.sm_count
        decode = column_blocks * cycles / gpu.clock_mhz
        return Prediction(
            us=self.start_us + smooth_max(read, decode, self.sharpness),
            start_us=self.start_us,
            read_us=read,
            decode_us=decode,
            n_block=n_block,
            column_blocks=column_blocks,
        )


@dataclass(frozen=True, kw_only=True)
class DenseTime:
    """Fitted constants of cuBLAS's best algorithm."""

    start_us: float
    read_share: float
    """Share of the bandwidth of a pure read."""

    def us(self, m: int, k: int, n: int, *, gpu: Gpu) -> float:
        """Microseconds: start-up, plus the time for the bytes or for the operations at peak, whichever is longer."""
        read = 2 * (m * k + n * (m + k)) / (gpu.read_gbps * self.read_share) * 1e-3
        multiply = 2 * m * n * k / gpu.tensor_flops * 1e-6
        return self.start_us + max(read, multiply)


@dataclass(frozen=True, kw_only=True)
class Model:
    """All constants, and what they were fitted to."""

    kernels: Mapping[str, Mapping[int, KernelTime]]
    """By format and width of the column block."""
    tile_bytes: Mapping[str, int]
    """Bytes of a tile besides its values, for formats whose number of tiles depends on where the zeros are and is known
    only from the bytes: slot24. Other formats have one tile for 128 x 64 elements."""
    dense: DenseTime
    gpu: str
    """GPU the rows were measured on."""
    files: tuple[str, ...]
    """Files of rows in experiments/results."""
    commits: tuple[str, ...]
    """Commits the rows were measured at."""


def smooth_max(a: float, b: float, sharpness: float) -> float:
    """(a^p + b^p)^(1/p) of non-negative numbers: the larger one where they differ, more where they are close."""
    low, high = sorted((a, b))
    return high * (1.0 + (low / high) ** sharpness) ** (1.0 / sharpness) if high > 0 else 0.0


@cache
def committed() -> Model:
    """The model that comes with the package."""
    text = resources.files("flashllm.matmul").joinpath(DATA_FILE).read_text(encoding="utf-8")
    return from_json(json.loads(text))


def from_json(data: Mapping[str, Any]) -> Model:
    """A model from what :func:`to_json` gave."""
    return Model(
        kernels={
            name: {int(width): KernelTime(**constants) for width, constants in widths.items()}
            for name, widths in data["kernels"].items()
        },
        tile_bytes=dict(data["tile_bytes"]),
        dense=DenseTime(**data["dense"]),
        gpu=data["gpu"],
        files=tuple(data["files"]),
        commits=tuple(data["commits"]),
    )


def to_json(model: Model) -> dict[str, Any]:
    """``model`` in a form that JSON can hold."""
    return {
        "gpu": model.gpu,
        "files": list(model.files),
        "commits": list(model.commits),
        "dense": vars(model.dense),
        "tile_bytes": dict(model.tile_bytes),
        "kernels": {
            name: {str(width): vars(constants) for width, constants in widths.items()}
            for name, widths in model.kernels.items()
        },
    }


def is_modelled(format_name: str) -> bool:
    """Whether constants for the kernel of ``format_name`` are known."""
    return format_name in committed().kernels


def load_of(m: int, k: int, n: int, *, weight_bytes: int, density: float, tile_bytes: int | None = None) -> Load:
    """What y[n, m] = x[n, k] @ W[m, k]^T moves and decodes, with W packed in ``weight_bytes``.

    ``tile_bytes`` is what :class:`Model` has for the format.
    """
    nnz = density * m * k
    tiles: float = math.prod(tile_grid((m, k)))
    if tile_bytes is not None:
        tiles = max(weight_bytes - 2 * nnz, tile_bytes) / tile_bytes
    return Load(weight_bytes=weight_bytes, other_bytes=2 * n * (m + k), tiles=tiles, nnz=nnz)


def predict(
    format_name: str,
    *,
    m: int,
    k: int,
    n: int,
    weight_bytes: int,
    density: float,
    gpu: Gpu,
    model: Model | None = None,
) -> Prediction:
    """The time, L2-cold in a CUDA graph, of y[n, m] = x[n, k] @ W[m, k]^T on ``gpu``.

    ``weight_bytes`` are those of the packed weight, ``density`` the fraction of stored elements. ``model`` replaces the
    package's. Raises :class:`ArgumentError` for a format without constants.
    """
    model = model or committed()
    kernels = model.kernels
    if format_name not in kernels:
        raise ArgumentError("format", expected=f"one of {', '.join(kernels)}", got=repr(format_name))
    widths = kernels[format_name]
    width = n_block_for(n, sorted(widths))
    tile_bytes = model.tile_bytes.get(format_name)
    load = load_of(m, k, n, weight_bytes=weight_bytes, density=density, tile_bytes=tile_bytes)
    return widths[width].predict(load, n_block=width, column_blocks=-(-n // width), gpu=gpu)


def expand_us(*, m: int, k: int, n: int, weight_bytes: int, gpu: Gpu, model: Model | None = None) -> float:
    """Microseconds of expanding W to a dense matrix and multiplying that by cuBLAS.

    Estimated, not fitted: the packed weight is assumed to be read, and the dense matrix written, at the speed of a pure
    read, after a start-up like that of cuBLAS.
    """
    model = model or committed()
    moved = weight_bytes + 2 * m * k
    return model.dense.start_us + moved / gpu.read_gbps * 1e-3 + model.dense.us(m, k, n, gpu=gpu)


def dense_us(m: int, k: int, n: int, *, gpu: Gpu, model: Model | None = None) -> float:
    """Microseconds, L2-cold in a CUDA graph, of the dense product by cuBLAS on ``gpu``.

    Fitted where the bytes decide the time. Where the operations do (N in the hundreds), it is a lower bound.
    """
    return (model or committed()).dense.us(m, k, n, gpu=gpu)
