# SPDX-License-Identifier: Apache-2.0
"""How notebooks show figures and tables: the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from IPython.display import Image, Markdown, display

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(figure: Figure) -> None:
    """Draw a figure here."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    display(Image(picture.getvalue()))


def table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> None:
    """Show a table."""
    rows = [head, ["---"] * len(head), *lines]
    display(Markdown("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)))
