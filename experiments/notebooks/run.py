# SPDX-License-Identifier: Apache-2.0
"""Execute the notebooks of this folder and write them, with their outputs, beside their sources.

A source is a Python file in jupytext's percent format. Equal sources, rows and packages give equal notebooks: cell ids
are numbers, and neither times nor paths of the machine are kept.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
SOURCES = tuple(sorted(FOLDER.glob("[0-9]_*.py")))
LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_CELL_SECONDS = 600
_PATHS = re.compile(r"/(?:home|root|tmp|usr|opt|var|Users|private)/")


def notebook_of(source: Path) -> Any:
    """The notebook of a source, without outputs."""
    import jupytext

    text = source.read_text(encoding="utf-8").removeprefix(LICENCE)
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata.clear()
    return notebook


def execute(notebook: Any) -> None:
    """Run all cells in a fresh kernel of this interpreter, which imports this checkout.

    Raises ``nbclient.exceptions.CellExecutionError`` at the first cell that fails.
    """
    import matplotlib.font_manager  # noqa: F401  makes its cache here, not with a message in a cell
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # Only the kernel specification of this interpreter: one on disk may be another's.
    specifications = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specifications, transport="ipc")
    client = NotebookClient(notebook, km=manager, timeout=_CELL_SECONDS, record_timing=False)
    client.execute(cleanup_kc=True, cwd=str(REPOSITORY), env=environment())
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)


def environment() -> dict[str, str]:
    """The kernel's environment: imports ``flashllm`` and ``experiments`` of this checkout, shows no debugger notes."""
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def texts(notebook: Any) -> Iterator[str]:
    """Sources, outputs and metadata, pictures left out."""
    yield json.dumps(notebook.metadata)
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", ()):
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            yield json.dumps({**output, "data": data})


def machine_paths(notebook: Any) -> list[str]:
    """Whatever in a notebook reveals the machine that ran it: absolute paths, and its name."""
    found = []
    # A short host name may be an ordinary word.
    own = [str(REPOSITORY), str(Path.home()), *([name] if len(name := platform.node()) > 6 else [])]
    for text in texts(notebook):
        found += [text[max(0, hit.start() - 20) : hit.end() + 40] for hit in _PATHS.finditer(text)]
        found += [name for name in own if name in text and name != "/"]
    return found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--check", is_flag=True, help="Execute, and write nothing.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, help="Write into this folder.")
def main(names: tuple[str, ...], check: bool, out: Path) -> None:
    """Execute the notebooks whose names begin with one of NAMES (default: all) and write their .ipynb files."""
    import nbformat
    from nbclient.exceptions import CellExecutionError

    chosen = [source for source in SOURCES if not names or source.name.startswith(names)]
    if unknown := [name for name in names if not any(source.name.startswith(name) for source in SOURCES)]:
        raise click.UsageError(
            f"no notebook begins with {', '.join(unknown)}; there are {', '.join(map(_name, SOURCES))}"
        )
    for source in chosen:
        notebook, begin = notebook_of(source), time.perf_counter()
        try:
            execute(notebook)
        except CellExecutionError as error:
            raise click.ClickException(f"{source.name}: {error}") from error
        if paths := machine_paths(notebook):
            raise click.ClickException(f"{source.name} shows paths of this machine: {'; '.join(paths)}")
        if not check:
            out.mkdir(parents=True, exist_ok=True)
            nbformat.validate(notebook)
            nbformat.write(notebook, out / f"{source.stem}.ipynb")
        click.echo(f"{source.stem:<24} {time.perf_counter() - begin:5.1f} s")


def _name(source: Path) -> str:
    return source.stem


if __name__ == "__main__":
    sys.exit(main())
