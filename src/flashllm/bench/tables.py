# SPDX-License-Identifier: Apache-2.0
"""Shows tables on consoles of any width: names may fold, numbers are never cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_READABLE = 30
"""Characters per line that a folding column should have; with fewer, the table has no lines between its columns."""
_LEAST = 12
"""Characters per line that a folding column has at least."""
_UNBOUNDED = 100_000


def show(console: Console, parts: Iterable[RenderableType], *, file_width: int) -> None:
    """Print ``parts``, which may be tables, each below the one before.

    Columns with ``overflow="fold"`` share what the others leave of the line; the others keep each cell in one piece.
    If that is wider than the console, lines are printed longer than it and the terminal wraps them. ``file_width`` is
    the width, in characters, used when the console is not a terminal.
    """
    from rich.table import Table

    if not console.is_terminal:
        console.width = file_width
    for part in parts:
        if isinstance(part, Table):
            _fit(part, console)
        console.print(part, crop=False)


def _fit(table: Table, console: Console) -> None:
    from rich import box
    from rich.measure import Measurement

    unbounded = console.options.update(width=_UNBOUNDED)
    whole, folding = 0, []
    for column in table.columns:
        cells = (column.header, *column.cells)
        widest = max(Measurement.get(console, unbounded, cell).maximum for cell in cells)
        if column.overflow == "fold":
            folding.append(widest)
        else:
            column.min_width, column.no_wrap = widest, True
            whole += widest
    count = len(table.columns)
    ruled = whole + sum(min(width, _READABLE) for width in folding) + 3 * count + 1
    if ruled <= console.width:
        return
    # A blank between two columns instead of a line between two blanks.
    table.box, table.padding, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, (0, 0, 0, 0), False, False
    bare = whole + sum(min(width, _LEAST) for width in folding) + count - 1
    if bare > console.width:
        table.width = bare
