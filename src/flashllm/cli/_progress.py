# SPDX-License-Identifier: Apache-2.0
"""The progress bar of commands that work through cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress(notes: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows a bar on ``notes`` if it is a terminal. Yields a function that takes what is being done now and how many
    cases have been finished since the last call.
    """
    if not notes.is_terminal:  # older versions of rich would end even a disabled bar with an empty line
        yield lambda title, cases: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=notes, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("", total=total)

        def advance(title: str, cases: int) -> None:
            bar.update(task, description=title, advance=cases)

        yield advance
