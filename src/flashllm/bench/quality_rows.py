# SPDX-License-Identifier: Apache-2.0
"""Rows of how well a model predicts a text: their fields, and files of them (JSON Lines)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashllm.bench import flat_rows
from flashllm.bench.flat_rows import FlatRow, append

__all__ = ["SCHEMA", "QualityRow", "append", "read"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class QualityRow(FlatRow):
    """One evaluation. ``None``: does not apply, or is not known."""

    schema: int
    kind: str
    """``quality``."""
    run_id: str
    time_utc: str
    commit: str | None
    dirty: bool | None
    command: str
    backend: str
    """``numpy``, ``cuda``, or what multiplied packed matrices on the CPU: ``reference``, ``emulator``."""
    gpu: str | None
    model: str
    """Name of its directory or file."""
    model_type: str
    method: str | None
    """What pruned it; ``none`` for a model as it came."""
    ratios: str | None
    sparsity: float | None
    """Fraction of zeros asked for."""
    sparsity_real: float
    """Of the linear layers of blocks."""
    calibration: str | None
    """Text that it was pruned with, and its part."""
    prune_seconds: float | None
    """That pruning took, on ``prune_device``."""
    prune_device: str | None
    """The GPU's name, or ``2 CPUs``."""
    finetuned_tokens: int
    """Trained on since, with the zeros fixed."""
    format: str
    """``dense``, or formats of the packed matrices, with commas."""
    dtype: str
    text: str
    """Name of the file and its part."""
    text_sha256: str
    """Of the tokens of all windows, as little-endian int64."""
    windows: int
    length: int
    tokens: int
    """Predicted."""
    ppl: float | None
    """``None`` where it is no float."""
    bits_per_byte: float | None
    """``None`` where it is no float."""
    seconds: float
    logit_error: float | None
    """Largest difference to logits in float64 of the same weights, over one window; ``None`` where it is no float."""
    logit_error_dense: float | None
    """The same of dense 16-bit products."""
    check: str | None
    """``pass`` where ``logit_error`` is a float and at most twice ``logit_error_dense``, else ``fail``."""


def read(path: Path) -> list[QualityRow]:
    """Rows of a file, as :func:`flashllm.bench.flat_rows.read` does."""
    return flat_rows.read(path, QualityRow, schema=SCHEMA, kind="quality")
