# SPDX-License-Identifier: Apache-2.0
"""Turn result files into one web page."""

from __future__ import annotations

from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, refuse_same_file, usage_errors
from flashllm.io.files import write_whole


@click.command()
@click.argument("files", nargs=-1, required=True, type=READ_FILE, metavar="RESULTS...")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="File for the page.",
)
@click.option("--title", default="flashllm results", show_default=True, help="Heading of the page.")
def command(files: tuple[Path, ...], out: Path, title: str) -> None:
    """Turn result files into one web page.

    RESULTS are files that `flashllm bench --out` or --save wrote. The page is self-contained, with sortable tables,
    charts that can be filtered, and the whole row behind each number. Needs Bokeh: pip install "flashllm[report]".
    """
    with usage_errors():
        from flashllm.bench import page, results

        for file in files:
            refuse_same_file("--out", out, {"RESULTS": file})
        rows = [
            page.Sourced(row=row, file=file.name, line=line)
            for file in files
            for line, row in results.read_numbered(file)
        ]
    text = page.render(rows, title=title)
    write_whole(out, text, mode=0o644)
    click.echo(f"{len(rows)} rows, {len(text) / 1e6:.1f} MB: {out}", err=True)
