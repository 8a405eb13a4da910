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
    """Method that pruned it; ``none`` for a model without a record of pruning or training."""
    ratios: str | None
    sparsity: float | None
    """Requested fraction of zeros."""
    sparsity_real: float
    """Actual fraction of zeros in the linear layers of blocks."""
    calibration: str | None
    """Name of the text that it was calibrated with, and the part of it."""
    prune_seconds: float | None
    """Time that pruning took on ``prune_device``."""
    prune_device: str | None
    """The GPU's name, or e.g. ``2 CPUs``."""
    finetuned_tokens: int
    """Number of tokens it was trained on after pruning, with the zeros fixed."""
    format: str
    """``dense``, or the formats of the packed matrices, comma-separated."""
    dtype: str
    text: str
    """Name of the text file, and the part of it."""
    text_sha256: str
    """SHA-256 of the tokens of all windows, as little-endian int64."""
    windows: int
    length: int
    tokens: int
    """Number of tokens that were predicted."""
    ppl: float | None
    """``None`` where it is not finite."""
    bits_per_byte: float | None
    """``None`` where it is not finite."""
    seconds: float
    logit_error: float | None
    """Largest difference from the float64 logits of the same weights, over one window; ``None`` where not finite."""
    logit_error_dense: float | None
    """The same for dense 16-bit products."""
    check: str | None
    """``pass`` where ``logit_error`` is finite and at most twice ``logit_error_dense``, else ``fail``."""


def read(path: Path) -> list[QualityRow]:
    """Rows of a file, read as by :func:`flashllm.bench.flat_rows.read`."""
    return flat_rows.read(path, QualityRow, schema=SCHEMA, kind="quality")
