# SPDX-License-Identifier: Apache-2.0
"""Draw the figures: measure what is missing, or take the committed rows."""

from __future__ import annotations

import importlib.resources
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from flashllm.cli._cases import BadUsage, usage_errors

_FORMATS = ("png", "svg", "pdf")


def _experiments() -> Path:
    """The folder ``experiments`` of the checkout that this package is part of, or that is the current folder."""
    package = Path(str(importlib.resources.files("flashllm")))
    for root in (package.parent.parent, Path.cwd()):
        if (root / "experiments" / "figures" / "entry.py").is_file():
            return root / "experiments"
    raise BadUsage("figures are drawn in a checkout of flashllm, by experiments/figures; there is none here")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
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
    type=click.Choice(_FORMATS),
    multiple=True,
    default=_FORMATS,
    show_default=True,
    help="Write only files of this format; may be repeated.",
)
@click.option("--from-results", is_flag=True, help="Measure nothing: needs no GPU.")
@click.option(
    "--quick",
    is_flag=True,
    help="Measure the shapes of OPT-30B alone, and draw only that; its rows go into OUT/quick/results.",
)
@click.option("--list", "list_names", is_flag=True, help="List the figures.")
def command(
    names: tuple[str, ...],
    out: Path,
    formats: tuple[str, ...],
    from_results: bool,
    quick: bool,
    list_names: bool,
) -> None:
    """Draw the figures NAME (all when none is given) and print the tables behind them.

    Cases that experiments/results does not have for this GPU, driver and commit are measured first: a whole figure
    takes minutes to half an hour, and may be interrupted. --from-results draws the committed rows.
    """
    experiments = _experiments()
    if str(experiments.parent) not in sys.path:
        sys.path.insert(0, str(experiments.parent))
    figures: Any = import_module("experiments.figures")
    entry: Any = import_module("experiments.figures.entry")
    for name in names:
        if name not in figures.ENTRIES:
            raise BadUsage(f"NAME: expected some of {', '.join(figures.ENTRIES)}, got {name!r}")
    if from_results and quick:
        raise BadUsage("--quick: expected nothing beside --from-results, which measures nothing")
    chosen = [entry.entry(name) for name in names or figures.ENTRIES]
    if list_names:
        formatter = click.get_current_context().make_formatter()
        formatter.write_dl([(figure.name, _summary(figure.name)) for figure in chosen])
        click.echo(formatter.getvalue(), nl=False)
        return
    if find_spec("matplotlib") is None:
        raise BadUsage('drawing needs matplotlib: pip install -e ".[plot]"')
    root = experiments
    if not from_results:
        if quick:
            root = _quick_root(experiments, out)
            chosen = [figure for figure in chosen if figure.sweeps]
        _measure(chosen, root, quick=quick)
    for figure in chosen:
        data = figure.load(root)
        files = entry.draw(figure, data, out, formats=formats)
        click.echo(figure.table(data))
        for file in files:
            click.echo(file, err=True)


def _measure(chosen: list[Any], root: Path, *, quick: bool) -> None:
    from flashllm import backends
    from flashllm.bench import environment

    with usage_errors():
        selected = backends.select(None)
        commit, dirty = environment.commit_and_dirty()
    if selected.name != "cuda":
        raise BadUsage(f"measuring needs a GPU ({selected.reason}); --from-results draws what is committed")
    if not quick and (commit is None or dirty is not False):
        tree = "an unknown commit" if commit is None else "one with changes, or that git knows nothing of"
        raise BadUsage(f"experiments/results has rows of committed trees, and this is {tree}; --quick measures it")
    measure: Any = import_module("experiments.figures.measure")
    for sweep in dict.fromkeys(sweep for figure in chosen for sweep in figure.sweeps):
        click.echo(measure.measure(sweep, root / "results", quick=quick), err=True)


def _quick_root(experiments: Path, out: Path) -> Path:
    """A folder like ``experiments`` whose rows are those of quick measurements alone."""
    root = out / "quick"
    (root / "results").mkdir(parents=True, exist_ok=True)
    for name in ("reference", "kernel_log"):
        link = root / name
        if not link.exists():
            link.symlink_to((experiments / name).resolve(), target_is_directory=True)
    return root


def _summary(name: str) -> str:
    """The first paragraph of the docstring of a figure's module."""
    text = import_module(f"experiments.figures.{name}").__doc__ or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "`")
