# SPDX-License-Identifier: Apache-2.0
"""Table of the counts from emulated kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashllm.backends.emulator_counts import Counts
from flashllm.bench.report import several_formats, sparsity_of, weight_of
from flashllm.bench.results import Row

if TYPE_CHECKING:
    from rich.console import RenderableType


def counts_table(counted: Sequence[tuple[Row, Counts]]) -> list[RenderableType]:
    """One line per emulated launch: tensor-core instructions, global memory, barriers, shared memory."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="counted in the emulated kernels", title_justify="left")
    table.add_column("weights", overflow="fold")
    several = several_formats(row for row, _ in counted)
    for heading in ("N", "zeros"):
        table.add_column(heading, justify="right")
    table.add_column("tensor-core\ninstructions", justify="right", overflow="fold")
    for heading in ("MB\nread", "MB\nwritten*", "barriers", "shared\nwavefronts", "lost to\nconflicts"):
        table.add_column(heading, justify="right")
    for row, counts in counted:
        shared = (counts.scatter, counts.store4, counts.store16, counts.ldmatrix)
        table.add_row(
            escape(f"{weight_of(row)} {row.format}" if several else weight_of(row)),
            str(row.N),
            sparsity_of(row),
            _tensor_core(counts),
            f"{counts.global_read_bytes / 1e6:.2f}",
            f"{counts.global_write_bytes / 1e6:.2f}",
            f"{counts.barriers:,}",
            f"{sum(access.wavefronts for access in shared):,}",
            f"{sum(access.conflicts for access in shared):,}",
        )
    note = (
        "per launch, on a made-up GPU of 4 multiprocessors. MB: of global memory. "
        "A wavefront is one pass of a warp's access through shared memory.\n"
        "* partial sums; y, written once by plain stores, is not counted"
    )
    return [table, note]


def _tensor_core(counts: Counts) -> str:
    # A warpgroup's instruction (wgmma) has 64 rows, a warp's (mma) 16.
    kinds = ((shape, "wgmma" if shape.startswith("m64") else "mma", n) for shape, n in counts.mma.items())
    return ", ".join(f"{n:,} {name} {shape}" for shape, name, n in kinds) or "none"
