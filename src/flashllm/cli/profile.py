# SPDX-License-Identifier: Apache-2.0
"""Print, or run, the Nsight Compute command for one case."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.registry import DEFAULT_FORMAT

if TYPE_CHECKING:
    from flashllm.bench.plan_cases import Work

_KERNELS = "regex:spmm"  # leaves out packing, random weights and cuBLAS
_WARMUP_LAUNCHES = 4


@click.command()
@click.option("--shape", required=True, metavar="MxK", help="Weight shape, e.g. 28672x8192.")
@click.option("--sparsity", default="0.8", show_default=True, metavar="FRACTION", help="Fraction of zeros.")
@click.option("--n", default="16", show_default=True, metavar="N", help="Batch size.")
@click.option("--dtype", default="fp16", show_default=True, metavar="TYPE", help="fp16 or bf16.")
@click.option("--pattern", default="uniform", show_default=True, metavar="NAME", help="Where the zeros are.")
@click.option("--format", "formats", default=DEFAULT_FORMAT, show_default=True, metavar="NAME", help="Weight format.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Seed of the random weights.")
@click.option("--set", "sections", default="full", show_default=True, metavar="NAME", help="ncu's section set.")
@click.option("--out", type=click.Path(path_type=Path), metavar="NAME", help="Write NAME.ncu-rep too.")
@click.option("--run", is_flag=True, help="Run the command instead of printing it; needs ncu and a GPU.")
@click.option("--launch-only", is_flag=True, hidden=True, help="Launch the case a few times and exit.")
def command(
    shape: str,
    sparsity: str,
    n: str,
    dtype: str,
    pattern: str,
    formats: str,
    seed: int,
    sections: str,
    out: Path | None,
    run: bool,
    launch_only: bool,
) -> None:
    """Print, or run, the Nsight Compute command for one case.

    ncu runs at the clocks it finds (`--clock-control none`) and skips the first launches. The weights come
    from device memory, since ncu flushes the caches before each launch.
    """
    with usage_errors():
        from flashllm.bench.plan_cases import plan_work
        from flashllm.matmul.auto import current_gpu

        work = plan_work(
            backend="cuda",
            shapes=[shape],
            sparsity=sparsity,
            n=n,
            dtype=dtype,
            pattern=pattern,
            seed=seed,
            formats=formats,
            gpu=current_gpu(),
        )
        if work.cases != 1:
            raise BadUsage(f"profile takes one shape, one sparsity, one N and one format, got {work.cases} cases")
        if launch_only:
            _launch(work)
            return
    case = ["--shape", shape, "--sparsity", sparsity, "--n", n, "--dtype", dtype, "--pattern", pattern]
    case += ["--format", formats]
    arguments = ["ncu", "--clock-control", "none", "--set", sections, "--kernel-name", _KERNELS]
    arguments += ["--launch-skip", str(_WARMUP_LAUNCHES), "--launch-count", "1"]
    if out is not None:
        arguments += ["--export", str(out), "--page", "details"]
    arguments += [sys.executable, "-m", "flashllm", "profile", *case, "--seed", str(seed), "--launch-only"]
    if not run:
        click.echo(shlex.join(arguments))
        return
    if shutil.which("ncu") is None:
        raise BadUsage("ncu (Nsight Compute) is not on the PATH; it comes with the CUDA toolkit")
    sys.exit(subprocess.run(arguments, check=False).returncode)


def _launch(work: Work) -> None:
    """What ncu watches: the case's weights, plan and a few launches, nothing else."""
    from flashllm import backends

    backends.select("cuda")
    import cupy

    from flashllm.bench.data import make_inputs
    from flashllm.bench.systems import FlashLLM
    from flashllm.device import memory_errors
    from flashllm.registry import weight_class

    group = work.groups[0]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, memory_errors(f"weights of {group.title}", group.dense_bytes):
        dense = work.source.dense(group, group.sparsities[0], device=True)
        weight = weight_class(group.formats[0]).from_dense(dense, dtype=group.dtype)
        del dense
        system = FlashLLM([weight], make_inputs(group, group.batches[0], device=True), group.dtype)
        for _ in range(_WARMUP_LAUNCHES + 2):
            system.launch(0, stream)
        stream.synchronize()
    click.echo(f"{system.plan.label}: {_WARMUP_LAUNCHES + 2} launches", err=True)
