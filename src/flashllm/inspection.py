# SPDX-License-Identifier: Apache-2.0
"""What is in a weight, how its products would run, and which format suits it: the facts of ``flashllm inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashllm.formats.base import DType
from flashllm.formats.tiles import TILE_K, TILE_M
from flashllm.formats.weight import SparseWeight
from flashllm.gpus import Gpu
from flashllm.matmul import auto, model
from flashllm.matmul.auto import Ranking
from flashllm.matmul.expand import Expected, expected
from flashllm.matmul.planning import Plan, plan
from flashllm.matmul.sample import Contents, estimated, sampled

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.io.manifest import Manifest

_TILE_ELEMENTS = TILE_M * TILE_K


@dataclass(frozen=True, kw_only=True)
class Target:
    """The GPU for which times are estimated."""

    gpu: Gpu
    facts: DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Stored elements of a tile divided by all its elements, with padding counted as stored."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan and the time that the model predicts, which is ``None`` for a format without fitted constants."""

    plan: Plan
    expected: Expected | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One weight, or one matrix before it is packed."""

    name: str
    contents: Contents
    ranking: Ranking
    weight: SparseWeight | None
    """As stored in the file, or packed in the best format; ``None`` if there is only a shape."""
    packed_here: bool
    """Whether the matrix was packed here because the file holds it dense."""
    fill: Fill | None
    plans: dict[int, Planned]
    """By N, for ``weight``."""


def inspect_file(path: Path, tensor: str | None, n: Sequence[int], *, target: Target, sample: bool) -> list[Inspection]:
    """All packed weights of a file (or ``tensor`` of them), or one matrix that is not packed.

    Packed weights are inspected as they are, and other formats estimated for zeros at random places; with ``sample``
    they are decoded and some rows packed in every format, as for a dense matrix. Their buffers are memory-mapped, and
    only their structure is checked. Raises :class:`ArgumentError`, :class:`FormatError`, ``OSError``.
    """
    from flashllm.io.container import ContainerFile, packed_names
    from flashllm.io.matrices import read_matrix

    names = packed_names(path, tensor)
    if names is None:
        return [inspect_matrix(tensor or path.name, read_matrix(path, tensor), n, target=target)]
    with ContainerFile(path) as file:
        weights = {name: file.weight(name, validate=False, mmap=True) for name in names}
    return [inspect_weight(name, w, n, target=target, sample=sample) for name, w in weights.items()]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Similar matrices in a directory of sparse weights: the same layer of several blocks."""

    name: str
    """Name of the layer without the number of the block: ``model.layers.*.mlp.down_proj``."""
    shape: tuple[int, int]
    dtype: DType
    format: str
    """A registered format, or ``dense``."""
    count: int
    least_sparsity: float
    most_sparsity: float
    bytes_stored: int
    """Bytes of all these matrices together."""
    bytes_dense: int
    whys: tuple[str, ...]
    """What decided the format, each reason once."""


def layer_kinds(manifest: Manifest) -> list[LayerKind]:
    """The matrices of a directory by layer, shape, type and format, in the order of a forward pass."""
    alike: dict[tuple[str, tuple[int, int], DType, str], list[Any]] = {}
    for weight in manifest.weights.values():
        name = ".".join("*" if part.isdigit() else part for part in weight.name.split("."))
        alike.setdefault((name, weight.shape, weight.dtype, weight.format), []).append(weight)
    return [
        LayerKind(
            name=name,
            shape=shape,
            dtype=dtype,
            format=kind,
            count=len(weights),
            least_sparsity=min(weight.sparsity for weight in weights),
            most_sparsity=max(weight.sparsity for weight in weights),
            bytes_stored=sum(weight.bytes_stored for weight in weights),
            bytes_dense=sum(weight.bytes_dense for weight in weights),
            whys=tuple(dict.fromkeys(weight.why for weight in weights)),
        )
        for (name, shape, dtype, kind), weights in alike.items()
    ]


def inspect_weight(
    name: str, w: SparseWeight, n: Sequence[int], *, target: Target, sample: bool = False
) -> Inspection:  # fmt: skip
    """Inspect a packed weight, on the host."""
    formats = auto.usable_formats(None, target.gpu)
    if sample:
        contents = sampled(w.to_dense(), formats, dtype=w.dtype)
    else:
        contents = estimated(w.shape, w.density, formats, dtype=w.dtype)
    return _of_weight(name, w, contents, n, target=target, packed_here=False)


def inspect_matrix(name: str, a: Any, n: Sequence[int], *, target: Target) -> Inspection:
    """Inspect a dense NumPy or ``scipy.sparse`` matrix: rank formats by a sample, then pack it whole in the best."""
    ranking = auto.rank_formats_of(a, n, gpu=target.gpu)
    w = auto.pack(a, format=ranking.best.format, n=n)
    return _of_weight(name, w, ranking.contents, n, target=target, packed_here=True)


def _of_weight(
    name: str, w: SparseWeight, contents: Contents, n: Sequence[int], *, target: Target, packed_here: bool
) -> Inspection:
    """What is known of ``w``, with its actual bytes in place of the estimate for its format."""
    if w.format in contents.weight_bytes:
        contents = replace(contents, weight_bytes={**contents.weight_bytes, w.format: w.nbytes})
    return Inspection(
        name=name,
        contents=contents,
        ranking=auto.rank(contents, n, gpu=target.gpu),
        weight=w,
        packed_here=packed_here,
        fill=tile_fill(w),
        plans=_plans(w, n, target),
    )


def inspect_shape(
    shape: tuple[int, int], density: float, n: Sequence[int], *, target: Target, dtype: str
) -> Inspection:
    """Inspect a matrix of which only shape and density are known."""
    ranking = auto.rank_formats(shape, density, n, dtype=dtype, gpu=target.gpu)
    return Inspection(
        name=f"{shape[0]}x{shape[1]}",
        contents=ranking.contents,
        ranking=ranking,
        weight=None,
        packed_here=False,
        fill=None,
        plans={},
    )


def tile_fill(w: SparseWeight) -> Fill | None:
    """How full the tiles are, from offsets or masks; ``None`` for a format that has neither.

    Tiles of slot24 are tiles of slots, each of which stands for two elements of W.
    """
    counts = _counts(w.to_host().arrays())
    if counts is None or not counts.size:
        return None
    share = counts / _TILE_ELEMENTS
    return Fill(least=float(share.min()), mean=float(share.mean()), most=float(share.max()))


def _counts(arrays: dict[str, Any]) -> NDArray[np.int64] | None:
    """Number of elements in each tile that have a place in the buffers."""
    counts: NDArray[np.int64] | None = None
    if "tile_offsets" in arrays:
        from flashllm.formats.tiled_csl import WORDS_PER_VECTOR

        counts = np.diff(arrays["tile_offsets"][:-1].astype(np.int64)) * WORDS_PER_VECTOR
    elif "masks" in arrays:
        masks = arrays["masks"]
        counts = np.bitwise_count(masks).reshape(masks.shape[0], -1).sum(axis=1, dtype=np.int64)
    return counts


def _plans(w: SparseWeight, n: Sequence[int], target: Target) -> dict[int, Planned]:
    found = {}
    for count in n:
        likely = None
        if model.is_modelled(w.format):
            likely = expected(
                w.format,
                m=w.shape[0],
                k=w.shape[1],
                n=count,
                weight_bytes=w.nbytes,
                density=w.density,
                gpu=target.gpu,
            )
        found[count] = Planned(plan=plan(w, count, device=target.facts), expected=likely)
    return found


def as_json(found: Inspection) -> dict[str, Any]:
    """``found`` as values that JSON can hold; times in microseconds, sizes in bytes."""
    contents, ranking, gpu = found.contents, found.ranking, found.ranking.gpu
    m, k = contents.shape
    w = found.weight
    return {
        "name": found.name,
        "format": None if w is None else w.format,
        "packed_here": found.packed_here,
        "M": m,
        "K": k,
        "dtype": contents.dtype,
        "nnz": None if w is None else w.nnz,
        "sparsity": 1.0 - contents.density if w is None else w.sparsity,
        "bytes": None if w is None else w.nbytes,
        "bytes_per_element": None if w is None else w.bytes_per_element,
        "tile_fill": None if found.fill is None else vars(found.fill),
        "gpu": vars(gpu),
        "rows_packed_to_estimate": contents.packed_rows,
        "ranking": [
            {
                "format": candidate.format,
                "bytes": candidate.weight_bytes,
                "mean_us": candidate.mean_us,
                "us": {str(n): us for n, us in candidate.us.items()},
                "source": candidate.source,
                "reason": candidate.reason,
            }
            for candidate in (*ranking.candidates, ranking.dense)
        ],
        "plans": {str(n): _plan_as_json(planned) for n, planned in found.plans.items()},
    }


def _plan_as_json(planned: Planned) -> dict[str, Any]:
    made, likely = planned.plan, planned.expected
    predicted = None
    if likely is not None:
        predicted = {**vars(likely.kernel), "bound": likely.kernel.bound, "expand_us": likely.expand_us}
    return {
        "kernel": made.spec.label,
        "expand": made.expansion is not None,
        "source": made.source,
        "grid": list(made.grid),
        "workspace_bytes": made.workspace_bytes,
        "reason": made.reason,
        "predicted": predicted,
    }
