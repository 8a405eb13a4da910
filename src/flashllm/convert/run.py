# SPDX-License-Identifier: Apache-2.0
"""Converts a whole checkpoint to sparse weights, file by file; files that are already whole can be kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashllm import __version__
from flashllm.convert import folder
from flashllm.convert.choose import choose
from flashllm.convert.matrix import Rounder, load, survey
from flashllm.convert.plan import FilePlan, Source, origin_of, plan_files
from flashllm.convert.upload import Upload
from flashllm.errors import ArgumentError, MissingDependencyError
from flashllm.formats.bits import numpy_dtype
from flashllm.formats.sources import is_cupy, to_host
from flashllm.gpus import Gpu
from flashllm.io.checkpoint import Checkpoint, open_checkpoint
from flashllm.io.container import ContainerWriter
from flashllm.io.files import claimed
from flashllm.io.manifest import (
    DENSE,
    DTYPE_CHOICES,
    FORMAT_CHOICES,
    NOTE,
    Identity,
    Manifest,
    Options,
    Part,
    StoredTensor,
    StoredWeight,
    part_text,
)
from flashllm.io.safetensors_file import LAYOUT_NAMES
from flashllm.matmul.auto import AUTO, DEFAULT_N, check_batches, current_gpu
from flashllm.progress import Advance, ignore
from flashllm.registry import weight_class

_NOTE_BYTES = 4096  # for the identity of a conversion, including names of 255 characters
_ENTRY_BYTES = 1024  # for a matrix or tensor in a part, besides its names


@dataclass
class Seconds:
    """Where the time for the matrices went, and how many bytes they have as dense 16-bit matrices."""

    choosing: float = 0.0
    encoding: float = 0.0
    """From the mapped file to the encoded buffers, on the host or the device, without choosing a format."""
    whole: float = 0.0
    """Including choosing, writing and all other tensors."""
    matrix_bytes: int = 0

    @property
    def encoding_gbps(self) -> float | None:
        """10^9 bytes of dense matrices per second of encoding; ``None`` where there were none."""
        return self.matrix_bytes / self.encoding * 1e-9 if self.matrix_bytes and self.encoding else None

    @property
    def whole_gbps(self) -> float | None:
        """10^9 bytes of dense matrices per second of everything; ``None`` where there were none."""
        return self.matrix_bytes / self.whole * 1e-9 if self.matrix_bytes and self.whole else None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of :func:`convert`."""

    manifest: Manifest
    kept_files: int
    """Files that were there already."""
    seconds: Seconds


def convert(
    source: Checkpoint | str | Path,
    out: str | Path,
    *,
    format: str = AUTO,
    n: int | Sequence[int] = DEFAULT_N,
    dtype: str = "keep",
    fuse: bool = True,
    gpu: Gpu | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: Advance = ignore,
) -> Conversion:
    """Write the checkpoint ``source`` as a directory ``out`` of sparse weights; see docs/conversion.md.

    ``format`` is ``"auto"``, a registered format or ``"dense"``. ``auto`` chooses for ``n``, the numbers of rows of x,
    and for ``gpu``, by default the current GPU or, if there is none, an H100 80GB. ``dtype`` is ``"keep"``, ``"fp16"``
    or ``"bf16"``. ``fuse`` joins layers with the same input into one matrix. ``device`` is ``"cpu"`` or ``"gpu"``:
    where matrices are encoded; the bytes are the same. ``resume`` keeps the whole files of an earlier run. ``progress``
    counts files.

    ``out`` must be new or empty, or with ``resume`` hold files of the same conversion. Takes less memory than twice the
    largest matrix in 16 bits. Raises ``ArgumentError``, ``FormatError`` for a checkpoint that cannot be converted,
    ``MissingDependencyError`` if a GPU is requested and there is none, and ``OSError``.
    """
    checked = _check_options(format, n, dtype, fuse)
    if device not in ("cpu", "gpu"):
        raise ArgumentError("device", expected="'cpu' or 'gpu'", got=repr(device))
    on_device = device == "gpu"
    if on_device:
        from flashllm.device import gpu_problem

        if (problem := gpu_problem()) is not None:
            raise MissingDependencyError(f"device: {problem}; see `flashllm doctor`")
    if format == AUTO:
        gpu = gpu or current_gpu()
        checked = Options(format=AUTO, n=checked.n, dtype=dtype, fuse=fuse, gpu=gpu.name)
    started = time.perf_counter()
    opened = nullcontext(source) if isinstance(source, Checkpoint) else open_checkpoint(source)
    with opened as checkpoint:
        plans = plan_files(checkpoint, checked)
        identity = Identity(flashllm=__version__, source=origin_of(checkpoint), options=checked)
        with claimed(Path(out)) as directory, Upload() if on_device else nullcontext() as upload:
            parts = folder.prepare(directory, checkpoint, identity, plans, resume=resume)
            kept = len(parts)
            seconds = Seconds()
            for plan in plans:
                progress(plan.file, 0)
                if plan.file not in parts:
                    work = _Work(checkpoint, checked, gpu, seconds, upload)
                    parts[plan.file] = work.write(directory / plan.file, plan, identity)
                progress(plan.file, 1)
            manifest = Manifest(identity=identity, parts=tuple(parts[plan.file] for plan in plans))
            folder.finish(directory, manifest)
    seconds.whole = time.perf_counter() - started
    return Conversion(manifest=manifest, kept_files=kept, seconds=seconds)


def _check_options(format: str, n: int | Sequence[int], dtype: str, fuse: bool) -> Options:
    for name, value, choices in (("format", format, FORMAT_CHOICES), ("dtype", dtype, DTYPE_CHOICES)):
        if value not in choices:
            raise ArgumentError(name, expected=f"one of {', '.join(choices)}", got=repr(value))
    # Where the format is given, nothing depends on N.
    return Options(format=format, n=check_batches(n) if format == AUTO else (), dtype=dtype, fuse=bool(fuse))


class _Work:
    """Writes files of one conversion."""

    def __init__(
        self, checkpoint: Checkpoint, options: Options, gpu: Gpu | None, seconds: Seconds, upload: Upload | None
    ) -> None:
        self._checkpoint, self._options, self._gpu = checkpoint, options, gpu
        self._seconds, self._upload = seconds, upload

    def write(self, path: Path, plan: FilePlan, identity: Identity) -> Part:
        """Write one file; returns its part of the manifest."""
        names = [len(member.name) for one in (*plan.matrices, *plan.tensors) for member in one.members]
        writer = ContainerWriter(
            path,
            weights=[matrix.name for matrix in plan.matrices],
            tensors=[*(f"{matrix.name}.weight" for matrix in plan.matrices), *(one.name for one in plan.tensors)],
            note_bytes=_NOTE_BYTES + sum(4 * length + _ENTRY_BYTES for length in names),
        )
        with writer:
            weights = tuple(self._matrix(writer, matrix) for matrix in plan.matrices)
            tensors = tuple(self._tensor(writer, one) for one in plan.tensors)
            part = Part(file=plan.file, weights=weights, tensors=tensors)
            writer.note(NOTE, part_text(identity, part))
        return part

    def _matrix(self, writer: ContainerWriter, matrix: Source) -> StoredWeight:
        started = time.perf_counter()
        array, rounding = load(self._checkpoint, matrix, upload=self._upload)
        _wait(array)
        there = time.perf_counter()
        found = survey(array)
        choice = choose(array, found, self._options, dtype=matrix.dtype, gpu=self._gpu)
        chosen = time.perf_counter()
        stored = 2 * array.shape[0] * array.shape[1]
        self._seconds.matrix_bytes += stored
        if choice.format == DENSE:
            self._seconds.encoding += there - started
            writer.add_tensor(f"{matrix.name}.weight", to_host(array))
        else:
            weight = weight_class(choice.format).from_dense(array, dtype=matrix.dtype)
            _wait(array)
            self._seconds.encoding += there - started + time.perf_counter() - chosen
            del array  # writing needs only the encoded buffers
            writer.add_weight(matrix.name, weight)
            stored = weight.nbytes
        self._seconds.choosing += chosen - there
        rows, columns = matrix.shape
        return StoredWeight(
            name=matrix.name,
            shape=(rows, columns),
            dtype=matrix.dtype,
            members=matrix.members,
            format=choice.format,
            why="; ".join(filter(None, (choice.why, matrix.note))),
            bytes_stored=stored,
            nnz=found.nnz,
            max_tile_nnz=None if choice.format == DENSE else found.max_tile_nnz,
            changed=rounding.changed,
            became_zero=rounding.became_zero,
        )

    def _tensor(self, writer: ContainerWriter, source: Source) -> StoredTensor:
        rounder = Rounder(self._checkpoint, source)
        with writer.tensor(source.name, LAYOUT_NAMES[source.dtype], source.shape) as out:
            for bits in rounder.strips():
                out.write(bits.view(numpy_dtype(source.dtype)))
        return StoredTensor(
            name=source.name,
            shape=source.shape,
            dtype=source.dtype,
            members=source.members,
            changed=rounder.report.changed,
        )


def _wait(array: Any) -> None:
    """Wait for the device, if ``array`` is there, so that the times measured are those of the work."""
    if is_cupy(array):
        import cupy

        cupy.cuda.get_current_stream().synchronize()
