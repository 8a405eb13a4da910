# SPDX-License-Identifier: Apache-2.0
"""Figures from rows measured earlier or now: ``flashllm figures [NAME]``.

A figure is one module of this package with an ``ENTRY`` (``entry.py``), named in ``ENTRIES``. Rows come from
``rows.py``, looks from ``style.py``; matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

ENTRIES = (
    "ladder",
    "speedup",
    "floor",
    "utilisation",
    "ablation",
    "kernels",
    "sparsity",
    "crossover",
    "bytes",
    "quality",
    "decode",
    "fit",
)
"""Modules of this package that draw a figure."""
