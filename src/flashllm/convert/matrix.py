# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way from a checkpoint to a file: joined, rounded, counted, in strips of rows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.convert.plan import Source
from flashllm.convert.upload import Upload
from flashllm.errors import FormatError
from flashllm.formats.base import RoundingReport
from flashllm.formats.bits import MAGNITUDE, RoundingTally, kind_of, numpy_dtype, to_bits
from flashllm.formats.sources import is_cupy
from flashllm.formats.tiles import TILE_K, TILE_M
from flashllm.io.checkpoint import Checkpoint

_STRIP_BYTES = 4 << 20  # of the source: rounding takes several times as much
_DEVICE_STRIP_ROWS = 32 * TILE_M
_WORD_FLAGS = 8


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Counts of the nonzero elements of a matrix."""

    nnz: int
    max_tile_nnz: int
    """Most nonzero elements in a tile of 128 x 64."""
    by_row: NDArray[np.int64]


class Rounder:
    """Gives 16-bit patterns of one stored tensor, strip by strip, and counts what rounding changes."""

    def __init__(self, checkpoint: Checkpoint, source: Source) -> None:
        self._checkpoint, self._source = checkpoint, source
        self._tally = RoundingTally()

    @property
    def report(self) -> RoundingReport:
        """The rounding report of all strips so far."""
        return self._tally.report()

    def strips(self) -> Iterator[NDArray[np.uint16]]:
        """Strips of each member, or the whole member, one member after the other, each read only when its turn comes.

        Raises ``FormatError`` for a member whose shape differs from the listed one, and for a value that rounds to
        infinity.
        """
        for member in self._source.members:
            array = self.read(member.name)
            rows = array if array.ndim else array.reshape(1)
            if kind_of(array.dtype) == self._source.dtype:
                yield rows.view(np.uint16)  # nothing is copied
                continue
            height = max(1, _STRIP_BYTES // max(1, rows[:1].nbytes))
            for start in range(0, len(rows), height):
                yield to_bits(rows[start : start + height], self._source.dtype, tally=self._tally)
                if self._tally.became_infinite:
                    expected = f"values that {self._source.dtype} can hold"
                    if self._source.dtype == "fp16":
                        expected += "; bf16 can (--dtype bf16)"
                    raise FormatError(
                        field=member.name, expected=expected, got="one that rounds to infinity", path=self._path
                    )

    def read(self, name: str) -> NDArray[Any]:
        """A tensor of the checkpoint, checked against its entry there. Raises ``FormatError``."""
        array = self._checkpoint.read(name)
        info = self._checkpoint.info(name)
        if array.shape != tuple(info.shape) or not kind_of(array.dtype):
            got = f"{array.dtype} {list(array.shape)}"
            raise FormatError(field=name, expected=f"{info.dtype} {list(info.shape)}", got=got, path=self._path)
        return array

    def mapped(self) -> NDArray[Any] | None:
        """The tensor as the checkpoint returns it, if it is a single member of the wanted type; else ``None``."""
        if len(self._source.members) > 1:
            return None
        array = self.read(self._source.members[0].name)
        return array if kind_of(array.dtype) == self._source.dtype else None

    @property
    def _path(self) -> str:
        return str(self._checkpoint.path)


def load(checkpoint: Checkpoint, source: Source, *, upload: Upload | None) -> tuple[Any, RoundingReport]:
    """The 16-bit matrix [M, K] of ``source``, on the current device if ``upload`` is given; and what rounding changed.

    On the host, it is not copied where it can be mapped. Besides the matrix, this takes memory for a strip, and for one
    member where the checkpoint has to decode it. Raises ``FormatError``.
    """
    rounder = Rounder(checkpoint, source)
    array: Any = rounder.mapped() if upload is None else _on_device(rounder, source, upload)
    if array is None:
        array = np.empty(source.shape, numpy_dtype(source.dtype))
        _fill(array.view(np.uint16), rounder.strips())
    return array, rounder.report


def _fill(out: Any, strips: Iterator[Any]) -> None:
    end = 0
    for strip in strips:
        out[end : end + len(strip)] = strip
        end += len(strip)


def _on_device(rounder: Rounder, source: Source, upload: Upload) -> Any:
    import cupy

    from flashllm.device import memory_errors

    columns = source.shape[1]
    with memory_errors("matrix", 2 * source.shape[0] * columns):
        bits = cupy.empty((source.shape[0], columns), np.uint16)
    whole = rounder.mapped()
    end = 0
    for piece in rounder.strips() if whole is None else (whole.view(np.uint16),):
        upload.copy(bits[end : end + len(piece)], piece)
        end += len(piece)
    return bits.view(numpy_dtype(source.dtype))


def survey(a: Any) -> Survey:
    """Count the nonzero elements of a 16-bit matrix [M, K], NumPy or CuPy. Takes memory for a few strips."""
    on_device = is_cupy(a)
    xp: Any = importlib.import_module("cupy") if on_device else np
    step = _DEVICE_STRIP_ROWS if on_device else TILE_M
    rows, columns = a.shape
    tiles_k = -(-columns // TILE_K)
    by_row = np.empty(rows, np.int64)
    largest = 0
    bits = a.view(np.uint16)
    for start in range(0, rows, step):
        strip = bits[start : start + step]
        height = -(-len(strip) // TILE_M) * TILE_M
        flags = xp.zeros((height, tiles_k * TILE_K), np.uint8)
        flags[: len(strip), :columns] = (strip & MAGNITUDE) != 0
        # One 64-bit addition adds eight byte-sized flags: the sum of eight words leaves every byte at most 8.
        words = flags.view(np.uint64).reshape(height, tiles_k, _WORD_FLAGS).sum(axis=2, dtype=np.uint64)
        counts = words.view(np.uint8).reshape(height, tiles_k, _WORD_FLAGS).sum(axis=2, dtype=np.int64)
        tiles = counts.reshape(height // TILE_M, TILE_M, tiles_k).sum(axis=1)
        largest = max(largest, int(tiles.max()))
        sums = counts.sum(axis=1)[: len(strip)]
        by_row[start : start + step] = sums.get() if on_device else sums
    return Survey(nnz=int(by_row.sum()), max_tile_nnz=largest, by_row=by_row)
