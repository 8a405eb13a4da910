# SPDX-License-Identifier: Apache-2.0
"""Figures drawn from committed rows, with no GPU: ``python3 -m experiments.figures NAME --out DIR``.

A figure is one module of this package with an ``ENTRY`` (``entry.py``), named in ``ENTRIES``. Rows come from
``rows.py``, looks from ``style.py``; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

ENTRIES = ("ladder", "speedup", "floor")
"""Modules of this package that draw a figure."""
