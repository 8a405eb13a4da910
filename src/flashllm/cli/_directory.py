# SPDX-License-Identifier: Apache-2.0
"""What `flashllm inspect` shows of a directory of sparse weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.io.manifest import ASKED_FOR, DENSE

if TYPE_CHECKING:
    from rich.table import Table

    from flashllm.inspection import LayerKind
    from flashllm.io.manifest import Manifest

_WIDTH = 120


def show_directory(directory: Path, *, as_json: bool) -> None:
    """Print the manifest of ``directory`` as JSON, or a table of its layers and the totals.

    Raises ``ArgumentError`` for any other directory, ``FormatError`` and ``OSError``.
    """
    from flashllm.io.sparse_model import SparseModel

    manifest = SparseModel(directory).manifest
    if as_json:
        click.echo(json.dumps(manifest.as_json(), allow_nan=False))
        return
    from rich.console import Console
    from rich.text import Text

    from flashllm.bench.tables import show
    from flashllm.inspection import layer_kinds

    kinds = layer_kinds(manifest)
    lines = (Text(line) for line in (*_reasons(kinds), *_totals(manifest)))
    show(Console(highlight=False), [Text(_heading(manifest)), _table(kinds), *lines], file_width=_WIDTH)


def _heading(manifest: Manifest) -> str:
    source, options = manifest.identity.source, manifest.identity.options
    how = "" if options.gpu is None else f" for {options.gpu}, N = {', '.join(map(str, options.n))}"
    return (
        f"{source.name}: {source.model_type}, {source.layers} blocks; --format {options.format}{how}; "
        f"flashllm {manifest.identity.flashllm}"
    )


def _table(kinds: list[LayerKind]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("count", "shape", "type", "format", "% zeros", "MB", "% of\ndense"):
        table.add_column(heading, justify="right" if heading not in ("type", "format") else "left")
    for kind in kinds:
        least, most = (f"{100 * share:.2f}" for share in (kind.least_sparsity, kind.most_sparsity))
        table.add_row(
            escape(kind.name),
            str(kind.count),
            f"{kind.shape[0]}x{kind.shape[1]}",
            kind.dtype,
            kind.format,
            least if least == most else f"{least} .. {most}",
            f"{kind.bytes_stored / 1e6:.2f}",
            f"{100 * kind.bytes_stored / kind.bytes_dense:.1f}",
        )
    return table


def _reasons(kinds: list[LayerKind]) -> list[str]:
    """Why ``auto`` left matrices dense: one reason for each kind, as reasons of a kind differ only in numbers."""
    dense = [kind for kind in kinds if kind.format == DENSE and not kind.whys[0].startswith(ASKED_FOR)]
    return [f"dense: {kind.name}: {kind.whys[0]}" for kind in dense]


def _totals(manifest: Manifest) -> list[str]:
    totals = manifest.totals()
    share = 100 * totals["bytes_stored"] / max(1, totals["bytes_dense"])
    lines = [
        f"{totals['weights']} matrices, {totals['sparse_weights']} of them sparse: "
        f"{100 * totals['sparsity']:.2f} % zeros, {totals['bytes_stored'] / 1e6:,.2f} MB, {share:.1f} % of dense",
        f"{totals['other_tensors']} other tensors: {totals['other_bytes'] / 1e6:,.2f} MB",
    ]
    if totals["changed"]:
        lines.append(f"{totals['changed']:,} values changed by rounding")
    return lines
