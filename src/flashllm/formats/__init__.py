# SPDX-License-Identifier: Apache-2.0
"""Sparse weight formats: encode, decode, check, count bytes. No kernel is known here."""

from __future__ import annotations

from flashllm.formats.base import DType, RoundingReport, SparseWeight
from flashllm.formats.tiled_csl import TiledCSL

FORMATS: dict[str, type[TiledCSL]] = {"tiled-csl": TiledCSL}
"""Weight classes by format name."""

__all__ = ["FORMATS", "DType", "RoundingReport", "SparseWeight", "TiledCSL"]
