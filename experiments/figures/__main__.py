# SPDX-License-Identifier: Apache-2.0
"""Draw figures from committed rows, and print the tables behind them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from experiments.figures import ENTRIES
from experiments.figures.entry import FORMATS, draw, entry

_ROOT = Path(__file__).resolve().parents[1]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(ENTRIES), metavar="[NAME]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/figures"),
    show_default=True,
    help="Folder for the files.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=FORMATS,
    show_default=True,
    help="Only files of this format; may be repeated.",
)
def command(names: tuple[str, ...], out: Path, formats: tuple[str, ...]) -> None:
    """Draw the figures NAME (all when none is given) from the committed rows, and print the tables behind them."""
    if find_spec("matplotlib") is None:
        raise click.ClickException('drawing needs matplotlib: pip install -e ".[plot]"')
    for name in names or ENTRIES:
        figure = entry(name)
        data = figure.load(_ROOT)
        files = draw(figure, data, out, formats=formats)
        click.echo(figure.table(data))
        for file in files:
            click.echo(file, err=True)


if __name__ == "__main__":
    command(prog_name="python3 -m experiments.figures")
