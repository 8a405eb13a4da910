# SPDX-License-Identifier: Apache-2.0
"""Say what got faster or slower between two result files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flashllm.cli._cases import READ_FILE, usage_errors


@click.command()
@click.argument("before", type=READ_FILE)
@click.argument("after", type=READ_FILE)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.02,
    show_default=True,
    help="Relative change of a median that counts, where the spread of the launches is not wider.",
)
@click.option(
    "--relative",
    is_flag=True,
    help="Compare times as multiples of cuBLAS's in the same run, which cancels clock drift.",
)
@click.option("--all", "every", is_flag=True, help="Show the cases that did not change, too.")
@click.option("--allow-missing", is_flag=True, help="Do not fail where cases of BEFORE are missing from AFTER.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per case.")
@click.pass_context
def command(
    context: click.Context,
    before: Path,
    after: Path,
    threshold: float,
    relative: bool,
    every: bool,
    allow_missing: bool,
    as_json: bool,
) -> None:
    """Say what got faster or slower between two result files.

    BEFORE and AFTER are files that `flashllm bench --out` or --save wrote. Cases match by system, format (or that it
    was chosen automatically), weights, N, zeros, launch mode and GPU. For continuous integration, exits with status 1
    when a case is slower beyond noise, wrong, or missing from AFTER; a slower cuBLAS is shown but is no failure.
    """
    with usage_errors():
        from flashllm.bench import compare, results

        found = compare.compare(results.read(before), results.read(after), threshold=threshold, relative=relative)
    if as_json:
        for change in found.changes:
            click.echo(json.dumps(change.to_dict(), allow_nan=False))
    else:
        click.echo("\n".join(compare.lines(found, every=every)))
    missing = () if allow_missing else found.only_before
    for row in missing:
        click.echo(f"missing: {compare.case_of(row)}", err=True)
    if found.failures or missing:
        context.exit(1)
