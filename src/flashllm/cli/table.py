# SPDX-License-Identifier: Apache-2.0
"""Print result files as a markdown table."""

from __future__ import annotations

from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, usage_errors


@click.command()
@click.argument("files", nargs=-1, required=True, type=READ_FILE, metavar="RESULTS...")
@click.option("--full", is_flag=True, help="Add a row for every case.")
@click.option("--allow-dirty", is_flag=True, help="Take rows measured with local changes, for drafts.")
def command(files: tuple[Path, ...], full: bool, allow_dirty: bool) -> None:
    """Print result files as a markdown table.

    RESULTS are files that `flashllm bench --out` or --save wrote. They are read in the order of their names, and of
    repeated measurements the last one counts. Rows that name no commit or hold a wrong result are refused.
    """
    with usage_errors():
        from flashllm.bench import report, results

        rows = [row for file in sorted(files, key=lambda file: file.name) for row in results.read(file)]
        click.echo(report.markdown(rows, full=full, allow_dirty=allow_dirty), nl=False)
