# SPDX-License-Identifier: Apache-2.0
"""The measurements behind the figures: runs of ``flashllm bench`` that continue where an earlier one stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashllm.bench import environment, results

_GRID = ("--sparsity", "0.5,0.6,0.7,0.8,0.9", "--n", "8,16,32,64")
QUICK = ("--model", "opt-30b", "--time-cap", "0.05")
"""Options of a quick run in place of the paper's twelve shapes."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One ``flashllm bench``, whose rows are saved as ``what``."""

    what: str
    options: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    """Options that select the shapes; without any, those of the paper."""


AUTO = Sweep(what="auto-sweep", options=_GRID)
FORMATS = (
    Sweep(what="bitmap-opt-sweep", options=(*_GRID, "--format", "bitmap")),
    Sweep(what="slot24-opt-sweep", options=("--sparsity", "0.7,0.8,0.9", *_GRID[2:], "--format", "slot24")),
    Sweep(what="opt-sweep", options=("--sparsity", "0.8,0.9", *_GRID[2:], "--format", "tiled-csl")),
)
ABLATION = Sweep(
    what="ablation", options=("--ablation", "--n", "16"), shapes=("--shape", "28672x7168,7168x28672,9216x9216")
)
SYSTEMS = Sweep(what="opt-systems", options=(*_GRID, "--systems", "all"))
ZEROS = Sweep(
    what="zeros-systems",
    options=("--sparsity", "0.6,0.7,0.8,0.85,0.9,0.95,0.98,0.99", "--n", "16", "--systems", "all"),
    shapes=("--shape", "36864x9216"),
)


def measure(sweep: Sweep, folder: Path, *, quick: bool = False) -> Path:
    """Run the cases that ``sweep`` still lacks on this GPU and commit, and return its file of rows in ``folder``.

    Raises what ``flashllm bench`` raises, including ``SystemExit``, for example for a wrong result.
    """
    from flashllm.cli import bench

    folder.mkdir(parents=True, exist_ok=True)
    facts = environment.collect("cuda")
    file = unfinished(sweep.what, folder, facts) or folder / environment.result_name(facts.gpu, sweep.what)
    options: Sequence[str] = (*sweep.options, *(sweep.shapes or (QUICK if quick else ())), "--resume", str(file))
    bench.command.main(args=list(options), prog_name="flashllm bench", standalone_mode=False)
    return file


def unfinished(what: str, folder: Path, facts: environment.Environment) -> Path | None:
    """The newest file of ``what`` that a run with ``facts`` can continue; cases that it has are not run again."""
    for file in sorted(folder.glob(f"*-{what}.jsonl"), reverse=True):
        rows = results.read(file)
        if rows and all(
            getattr(rows[-1], field) == getattr(facts, field)
            for field in ("backend", "gpu", "driver", "commit", "dirty")
        ):
            return file
    return None
