# SPDX-License-Identifier: Apache-2.0
"""Show or empty the cache of compiled kernels and measured choices."""

from __future__ import annotations

import json

import click


@click.group()
def command() -> None:
    """Show or empty the cache of compiled kernels and measured choices."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Say where the cache is and how much it holds."""
    from flashllm.jit import cache

    found = cache.info()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(found.path),
                    "kernels": found.entries,
                    "bytes": found.size_bytes,
                    "tuned_files": found.tuned_files,
                }
            )
        )
        return
    click.echo(f"path     {found.path}")
    click.echo(f"kernels  {found.entries} ({found.size_bytes / 1e6:.2f} MB)")
    click.echo(f"tuned    {found.tuned_files} file(s) of measured choices")


@command.command()
@click.option("--tuned", is_flag=True, help="Remove the measured choices as well.")
def clear(tuned: bool) -> None:
    """Remove every compiled kernel; they are rebuilt when next needed."""
    from flashllm.jit import cache

    before = cache.info()
    removed = cache.clear(tuned=tuned)
    click.echo(f"removed {removed} of {before.entries + (before.tuned_files if tuned else 0)} from {before.path}")
