# SPDX-License-Identifier: Apache-2.0
"""How long work tells what it does."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[str, int], None]
"""``advance(title, done)``: what is done now, and how many blocks, files or steps are finished since the last call."""


def ignore(title: str, done: int) -> None:
    """Nobody looks at the progress."""
