# SPDX-License-Identifier: Apache-2.0
"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[str, int], None]
"""``advance(title, done)``: what is being done, and how many blocks, files or steps finished since the last call."""


def ignore(title: str, done: int) -> None:
    """Discard the progress."""
