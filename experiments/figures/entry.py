# SPDX-License-Identifier: Apache-2.0
"""What a figure is, and how it is written to disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from experiments.figures.measure import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = TypeVar("Data")

FORMATS = ("png", "svg", "pdf")
"""File formats of a figure."""


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[Data]):
    """A figure, or several of one kind, and the numbers behind it."""

    name: str
    load: Callable[[Path], Data]
    """What is drawn, from the folder ``experiments`` of a checkout. Raises ``FormatError`` or ``OSError``."""
    plot: Callable[[Data], Mapping[str, Figure]]
    """Figures by the names of their files, without suffix."""
    table: Callable[[Data], str]
    """The same numbers as markdown; needs no matplotlib."""
    sweeps: tuple[Sweep, ...] = ()
    """The sweeps its rows come from; none for a figure of other, earlier measurements, such as logs."""


def entry(name: str) -> Entry[Any]:
    """The entry of the module ``name`` of this package."""
    found = import_module(f"{__package__}.{name}").ENTRY
    assert isinstance(found, Entry)
    return found


def stamp(figure: Entry[Data], data: Data) -> str:
    """Text that differs between figures of different numbers; the files carry it."""
    return f"{figure.name} {hashlib.sha256(figure.table(data).encode()).hexdigest()[:16]}"


def draw(figure: Entry[Data], data: Data, out: Path, *, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write the figures of ``data`` into the folder ``out``, made where absent; returns the files.

    The same rows give the same bytes with the same matplotlib. Raises ``ImportError`` without matplotlib.
    """
    from experiments.figures import style

    out.mkdir(parents=True, exist_ok=True)
    files = []
    with style.applied():
        for name, drawn in figure.plot(data).items():
            for suffix in formats:
                files.append(out / f"{name}.{suffix}")
                drawn.savefig(files[-1], metadata=style.metadata(suffix, stamp(figure, data)))
    return files
