# SPDX-License-Identifier: Apache-2.0
"""The processor this runs on."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
