# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint go into which file, which of them become one, and in which type they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashllm.errors import FormatError, brief
from flashllm.formats.base import DTYPES, DType
from flashllm.formats.check import is_int
from flashllm.io.checkpoint import Checkpoint, TensorInfo
from flashllm.io.fingerprint import fingerprint
from flashllm.io.manifest import OUTSIDE_FILE, Member, Options, Origin, block_file
from flashllm.io.safetensors_file import LAYOUT_NAMES
from flashllm.models.layout import LAYOUTS, Group, Layout, layout_of

_FLOATS: Mapping[str, DType] = {stored: dtype for dtype, stored in LAYOUT_NAMES.items()}
_WIDE = ("F32", "F64")
_DERIVED = ".rotary_emb.inv_freq"
"""Old Llama checkpoints hold it; every reader computes it from the configuration."""
_MAX_LAYERS = 99_999


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor to store: one of the checkpoint, or several of equal type with their rows stacked."""

    name: str
    """For a matrix, without ``.weight``."""
    members: tuple[Member, ...]
    shape: tuple[int, ...]
    dtype: DType
    """The type in which it is stored."""
    note: str = ""
    """Why it is not fused with others that multiply the same input."""


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """What goes into one file."""

    file: str
    matrices: tuple[Source, ...]
    tensors: tuple[Source, ...]


def plan_files(checkpoint: Checkpoint, options: Options) -> tuple[FilePlan, ...]:
    """The files of a conversion: one for each block, then one for the tensors outside the blocks.

    Raises ``FormatError`` for an unknown architecture, a linear layer that is missing or not a matrix, a block that the
    configuration does not count, and types that are not floats.
    """
    layout, layers = _architecture(checkpoint)
    by_block: list[list[str]] = [[] for _ in range(layers)]
    outside: list[str] = []
    stem, _, end = layout.block.partition("{}")
    for name in checkpoint.tensors:
        if not name.startswith(stem):
            outside.append(name)
            continue
        number = name[len(stem) :].partition(f"{end}.")[0]
        if not number.isascii() or not number.isdigit() or str(int(number)) != number or int(number) >= layers:
            raise _bad(checkpoint, name, f"a block of 0..{layers - 1}, as num_hidden_layers says", number)
        if not name.endswith(_DERIVED):
            by_block[int(number)].append(name)
    plans = [_block(checkpoint, layout, layer, names, options) for layer, names in enumerate(by_block)]
    others = tuple(_source(checkpoint, name, (name,), options) for name in outside)
    return (*plans, FilePlan(file=OUTSIDE_FILE, matrices=(), tensors=others))


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Which checkpoint this is. Raises ``FormatError`` for an unknown architecture, and ``OSError``."""
    _, layers = _architecture(checkpoint)
    path = Path(checkpoint.path)  # a link keeps its own name: links in the Hugging Face cache lead to hashes
    return Origin(
        model_type=str(checkpoint.config["model_type"]),
        name=(path.name if path.name.strip(".") else path.resolve().name) or "model",
        layers=layers,
        fingerprint=fingerprint(checkpoint),
    )


def _architecture(checkpoint: Checkpoint) -> tuple[Layout, int]:
    config = checkpoint.config
    kind, layers = config.get("model_type"), config.get("num_hidden_layers")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise _bad(checkpoint, "model_type", f"one of {', '.join(LAYOUTS)}", kind)
    if not is_int(layers) or not 1 <= layers <= _MAX_LAYERS:
        raise _bad(checkpoint, "num_hidden_layers", f"an integer in 1..{_MAX_LAYERS}", layers)
    return layout_of(kind), layers


def _block(
    checkpoint: Checkpoint, layout: Layout, layer: int, names: Sequence[str], options: Options
) -> FilePlan:  # fmt: skip
    prefix = layout.prefix(layer)
    matrices: list[Source] = []
    biases: list[Source] = []
    for group in layout.groups:
        weights, of_group = _group(checkpoint, prefix, group, options)
        matrices += weights
        biases += of_group
    taken = {member.name for source in (*matrices, *biases) for member in source.members}
    others = [_source(checkpoint, name, (name,), options) for name in names if name not in taken]
    return FilePlan(file=block_file(layer), matrices=tuple(matrices), tensors=(*biases, *others))


def _group(checkpoint: Checkpoint, prefix: str, group: Group, options: Options) -> tuple[list[Source], list[Source]]:
    """Matrices and biases of layers that multiply the same input."""
    alone: list[Source] = []
    for member in group.members:
        weight = f"{prefix}.{member}.weight"
        if weight not in checkpoint.tensors:
            raise _bad(checkpoint, weight, "a tensor, as every block has it", None)
        source = _source(checkpoint, f"{prefix}.{member}", (weight,), options)
        if len(source.shape) != 2 or 0 in source.shape:
            raise _bad(checkpoint, weight, "a matrix [M, K], M and K > 0", list(source.shape))
        alone.append(source)
    own = [f"{prefix}.{member}.bias" for member in group.members]
    there = [name for name in own if name in checkpoint.tensors]
    biases = [_source(checkpoint, name, (name,), options) for name in there]
    rows = {f"{source.name}.bias": source.shape[0] for source in alone}
    for source in biases:
        if source.shape != (rows[source.name],):
            raise _bad(checkpoint, source.name, f"{rows[source.name]} elements", list(source.shape))
    if len(alone) == 1 or not options.fuse:
        return alone, biases
    note = ""
    if len({(source.dtype, source.shape[1]) for source in alone}) > 1:
        note = "not one with the others of its input: types or K differ"
    elif len({source.dtype for source in biases}) > 1 or len(there) not in (0, len(own)):
        note = "not one with the others of its input: their biases differ"
    if note:
        return [_with_note(source, note) for source in alone], biases
    name = f"{prefix}.{group.name}"
    fused = [_together(name, alone)]
    return fused, [_together(f"{name}.bias", biases)] if biases else []


def _source(checkpoint: Checkpoint, name: str, members: tuple[str], options: Options) -> Source:
    info = checkpoint.info(members[0])
    shape = tuple(info.shape)
    member = Member(name=info.name, rows=shape[0] if shape else 1, dtype=info.stored)
    return Source(name=name, members=(member,), shape=shape, dtype=_target(checkpoint, info, options))


def _target(checkpoint: Checkpoint, info: TensorInfo, options: Options) -> DType:
    if info.dtype not in _FLOATS and info.dtype not in _WIDE:
        raise _bad(checkpoint, f"{info.name}.dtype", ", ".join((*_FLOATS, *_WIDE)), info.dtype)
    for dtype in DTYPES:
        if options.dtype == dtype:
            return dtype
    return _FLOATS.get(info.dtype, "fp16")


def _together(name: str, sources: Sequence[Source]) -> Source:
    return Source(
        name=name,
        members=tuple(member for source in sources for member in source.members),
        shape=(sum(source.shape[0] for source in sources), *sources[0].shape[1:]),
        dtype=sources[0].dtype,
    )


def _with_note(source: Source, note: str) -> Source:
    return Source(name=source.name, members=source.members, shape=source.shape, dtype=source.dtype, note=note)


def _bad(checkpoint: Checkpoint, field: str, expected: str, got: object) -> FormatError:
    return FormatError(field=field, expected=expected, got=brief(got), path=str(checkpoint.path))
