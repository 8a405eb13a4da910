# SPDX-License-Identifier: Apache-2.0
"""Measure the sparse product against cuBLAS, shape by shape."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashllm.baselines import SYSTEMS, parse_systems
from flashllm.cli._cases import BadUsage, backend_option, case_options, refuse_same_file, usage_errors, use_device
from flashllm.cli._models import given_options
from flashllm.cli._progress import progress
from flashllm.statuses import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from flashllm.backends.emulator_counts import Counts
    from flashllm.bench.cases import Group
    from flashllm.bench.environment import Environment
    from flashllm.bench.plan_cases import Work
    from flashllm.bench.results import Row
    from flashllm.bench.runner_types import Wanted
    from flashllm.bench.session import Session

_FILE = click.Path(path_type=Path, dir_okay=False)
_OF_A_GPU = ("l2", "launch", "cublas_layouts", "time_cap", "ablation", "pdl", "systems")
"""Parameters that say what to time, and how."""


def _list_models(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from flashllm.bench.models import MODELS

    for model in MODELS.values():
        shapes = "  ".join(
            f"{layer.name} {f'{layer.count} x ' if layer.count > 1 else ''}{layer.m}x{layer.k}"
            for layer in model.layers
        )
        size = f"{model.block_bytes / 1e6:>6.0f} MB dense"
        click.echo(f"{model.name:<15} {model.blocks:>3} blocks  {size}  {shapes}")
    context.exit()


@click.command(epilog="Exit status: 0 fine, 1 a wrong result, 2 bad usage, 130 interrupted (the rows so far are kept).")
@case_options
@backend_option
@click.option(
    "--l2",
    type=click.Choice(["cold", "warm"]),
    default="cold",
    show_default=True,
    help="cold rotates over weight copies that L2 cannot hold; warm repeats on one copy.",
)
@click.option(
    "--launch",
    type=click.Choice(["graph", "stream"]),
    default="graph",
    show_default=True,
    help="CUDA graphs, or plain launches from Python (adds cupy.matmul for fp16).",
)
@click.option(
    "--cublas-layouts",
    type=click.Choice(["both", "row"]),
    default="both",
    show_default=True,
    help="Let cuBLAS choose how W is stored, or give it W as [M, K] only.",
)
@click.option(
    "--time-cap",
    type=click.FloatRange(0.01),
    default=0.25,
    show_default=True,
    metavar="SECONDS",
    help="Stop measuring after this much GPU time per system and case, firm median or not.",
)
@click.option(
    "--check-rows",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    metavar="ROWS",
    help="Rows of W compared with a float64 product.",
)
@click.option(
    "--model-gpu",
    default=None,
    metavar="NAME",
    help="Without a GPU: which to model, and to choose formats for.  [default: H100 80GB]",
)
@click.option(
    "--ablation",
    is_flag=True,
    help="Also measure our kernel without word reordering, without overlap, and clearing whole tiles "
    "(fp16, N = 9 to 16, on a GPU); of Tiled-CSL where no --format is named.",
)
@click.option(
    "--pdl",
    is_flag=True,
    help="Also measure launches of our kernel that may overlap each other, as flashllm-pdl (in CUDA graphs, on a GPU "
    "of compute capability 9.0 or newer).",
)
@click.option(
    "--systems",
    metavar="NAMES",
    help="Other systems to measure beside cuBLAS (fp16, on a GPU), comma-separated: "
    f"{', '.join(SYSTEMS)}; all: those that can run here (docs/baselines.md).",
)
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON Lines on stdout; everything else on stderr.")
@click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write the rows as CSV too.")
@click.option(
    "--out",
    type=_FILE,
    metavar="FILE",
    help="Append every row to FILE (JSON Lines) as soon as it is measured.",
)
@click.option(
    "--save",
    is_flag=False,
    flag_value="bench",
    default=None,
    metavar="[WHAT]",
    help="Like --out, into experiments/results (the current folder where there is none), named "
    "TIME-GPU-WHAT.jsonl.  [WHAT: bench]",
)
@click.option(
    "--resume",
    type=_FILE,
    metavar="FILE",
    help="Skip the cases FILE already has and append the rest to it; starts FILE if absent.",
)
@click.option(
    "--list-models",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_models,
    help="List the known models and their weight shapes.",
)
def command(
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    weights: Path | None,
    tensor: str | None,
    sparsity: str | None,
    n: str | None,
    dtype: str | None,
    pattern: str | None,
    formats: str | None,
    seed: int,
    device: int | None,
    backend: str | None,
    l2: str,
    launch: str,
    cublas_layouts: str,
    time_cap: float,
    check_rows: int,
    model_gpu: str | None,
    ablation: bool,
    pdl: bool,
    systems: str | None,
    as_json: bool,
    csv_file: Path | None,
    out: Path | None,
    save: str | None,
    resume: Path | None,
) -> None:
    """Measure the sparse product against cuBLAS, shape by shape.

    Without options it measures the 12 weight shapes of OPT-30B, 66B and 175B at 70, 80 and 90 % zeros, N = 8, 16 and
    32, each in the format that suits it best (docs/auto.md). Every result is checked before and after it is timed.
    Without a GPU the same command runs the same kernels on a CPU emulator, on small shapes: it checks the numerics,
    counts what the kernels do and models what the bytes would cost; it reports no measured times.
    """
    from rich.console import Console

    notes = Console(stderr=True, highlight=False)
    with usage_errors():
        from flashllm import backends
        from flashllm.bench import environment, results, roofline
        from flashllm.bench.plan_cases import plan_work
        from flashllm.bench.session import Session
        from flashllm.device import device_facts
        from flashllm.gpus import gpu_of
        from flashllm.registry import DEFAULT_FORMAT

        if sum(option is not None for option in (out, save, resume)) > 1:
            raise BadUsage("--out, --save and --resume: give one of them")
        if save is not None and (not save or Path(save).name != save):
            raise BadUsage(f"--save: expected a name without folders, got {save!r}")
        if csv_file is not None:
            refuse_same_file("--csv", csv_file, {"--out": out, "--resume": resume, "--weights": weights})
        if not math.isfinite(time_cap):
            raise BadUsage(f"--time-cap: expected seconds from 0.01 on, got {time_cap}")
        if pdl and launch != "graph":
            raise BadUsage(f"--pdl: expected --launch graph beside it, got {launch}")
        compared = () if systems is None else parse_systems(systems)
        gpu = roofline.find_gpu(model_gpu or roofline.DEFAULT_GPU, argument="model-gpu")
        if device is not None and backend in ("emulator", "reference"):
            raise BadUsage(f"--device: expected nothing with --backend {backend}, which uses no GPU")
        use_device(device)
        chosen = backends.select(backend)
        work = plan_work(
            backend=chosen.name,
            models=models,
            shapes=shapes,
            weights=weights,
            tensor=tensor,
            sparsity=sparsity,
            n=n,
            dtype=dtype,
            pattern=pattern,
            seed=seed,
            formats=DEFAULT_FORMAT if ablation and formats is None else formats,
            gpu=gpu_of(device_facts()) if chosen.name == "cuda" else gpu,
        )
        session = Session(out=out, resume=resume)
        if csv_file is not None:
            results.ensure_writable(csv_file)
        facts = environment.collect(chosen.name, sweep_id=session.sweep_id)
        session.check_same_machine(facts)
        if save is not None:
            folder = Path("experiments/results")
            session.out = (folder if folder.is_dir() else Path()) / environment.result_name(facts.gpu, save)
            results.ensure_rows(session.out)
    if chosen.name == "emulator":
        first = f"emulated, not GPU times: the GPU's kernels on this CPU ({chosen.reason}); numerics, counts and bytes"
    elif chosen.name == "reference":
        first = f"no timing: NumPy reference backend ({chosen.reason}); numerics and bytes only"
    else:
        first = f"{facts.gpu}, driver {facts.driver}, CUDA {facts.cuda}, cuBLAS {facts.cublas}"
    idle = given_options(_OF_A_GPU) if chosen.name != "cuda" else []
    without = (f"{', '.join(idle)}: without effect, as nothing is measured without a GPU",) if idle else ()
    for note in (first, *work.notes, *without):
        notes.print(note, soft_wrap=True, markup=False)

    def emit(row: Any) -> None:
        session.add(row)
        if as_json:
            click.echo(row.to_json())

    counted: list[tuple[Row, Counts]] = []
    interrupted = False
    try:
        if chosen.name == "cuda":
            _run_cuda(
                work,
                session,
                facts,
                emit,
                notes,
                l2=l2,
                launch=launch,
                layouts=cublas_layouts,
                time_cap=time_cap,
                check_rows=check_rows,
                ablation=ablation,
                pdl=pdl,
                compared=compared,
            )
        else:
            _run_host(work, session, facts, emit, notes, counted, check_rows=check_rows)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        _finish(session, Console(stderr=as_json, highlight=False), gpu, csv_file, counted)
    if interrupted:
        notes.print("interrupted; the rows measured so far are kept")
    if not session.all_right:
        notes.print("[red]a result is wrong[/]: see the rows marked WRONG")
        sys.exit(1)
    if interrupted:
        sys.exit(INTERRUPTED)


def _remaining(work: Work, session: Session, notes: Console, wanted: Wanted) -> int:
    """How many cases are still to be measured; prints how many are skipped."""
    cases = [(group, *case) for group in work.groups for case in group.cases]
    left = sum(wanted(*case) for case in cases)
    if left < len(cases):
        notes.print(f"{len(cases) - left} of {len(cases)} cases are in {session.out} already", soft_wrap=True)
    return left


def _run_cuda(
    work: Work,
    session: Session,
    facts: Environment,
    emit: Callable[[Any], None],
    notes: Console,
    *,
    l2: str,
    launch: str,
    layouts: str,
    time_cap: float,
    check_rows: int,
    ablation: bool,
    pdl: bool,
    compared: tuple[str, ...],
) -> None:
    from flashllm.backends import dependent
    from flashllm.bench import comparisons, systems, timing
    from flashllm.bench.runner import CudaRunner, Settings, check_memory
    from flashllm.device import device_facts
    from flashllm.errors import DeviceMemoryError

    settings = Settings(
        method=timing.Method(launch=launch, l2=l2, cap_s=time_cap),
        layouts=systems.LAYOUTS_BOTH if layouts == "both" else systems.LAYOUTS_ROW,
        check_rows=check_rows,
        ablation=ablation,
        pdl=pdl,
        compared=compared,
    )
    launches = (launch, f"{launch}-pdl") if pdl else (launch,)

    def wanted(group: Group, sparsity: float | None, n: int, name: str) -> bool:
        return any(session.is_wanted(group, sparsity, n, name, l2=l2, launch=style) for style in launches)

    left = _remaining(work, session, notes, wanted)
    if left == 0:
        return
    with usage_errors():
        if pdl:
            dependent.check(device_facts())
        for group in work.groups:
            comparisons.check_group(group, compared)
        check_memory(work.groups, work.source, settings)
    runner = CudaRunner(facts, settings, work.source, emit)
    with progress(notes, left) as advance, usage_errors(DeviceMemoryError):
        runner.run(work.groups, wanted=wanted, advance=advance)
    notes.print(f"pure read bandwidth of this run: {runner.read_gbps:.0f} GB/s")


def _run_host(
    work: Work,
    session: Session,
    facts: Environment,
    emit: Callable[[Any], None],
    notes: Console,
    counted: list[tuple[Row, Counts]],
    *,
    check_rows: int,
) -> None:
    from flashllm.bench.runner_host import run_host

    def wanted(group: Group, sparsity: float | None, n: int, name: str) -> bool:
        return session.is_wanted(group, sparsity, n, name, l2=None, launch=None)

    left = _remaining(work, session, notes, wanted)
    with progress(notes, left) as advance, usage_errors(MemoryError):
        run_host(
            work.groups,
            facts,
            work.source,
            check_rows=check_rows,
            emit=emit,
            wanted=wanted,
            advance=advance,
            note_counts=lambda row, counts: counted.append((row, counts)),
        )


def _finish(
    session: Session, console: Console, gpu: Any, csv_file: Path | None, counted: list[tuple[Row, Counts]]
) -> None:
    """Write the CSV file and show the rows, including earlier ones of a resumed file if their method is the same."""
    from flashllm.bench import report, results, tables
    from flashllm.bench.report_counts import counts_table

    rows = results.latest([*session.earlier, *session.rows])
    if not rows:
        return
    if csv_file is not None:
        with usage_errors():
            results.write_csv(csv_file, rows)
    last = next((row for row in reversed(rows) if row.system not in SYSTEMS), rows[-1])
    rows = [row for row in rows if _method(row, last) == _method(last, last)]
    parts = report.timing_table(rows) if rows[-1].gpu is not None else report.model_table(rows, gpu)
    if counted:
        parts += counts_table(counted)
    tables.show(console, parts, file_width=160)
    if session.saved:
        console.print(f"rows appended to {session.out}: {session.saved}", soft_wrap=True)


def _method(row: Row, last: Row) -> tuple[object, ...]:
    """What the rows of one table share with ``last``. Overlapping launches, which are systems of their own, stand in
    the same table, and so do the systems we compare with, which may have types and patterns of their own.
    """
    case = last if row.system in SYSTEMS else row
    return row.backend, case.dtype, case.pattern, row.l2, row.launch and row.launch.removesuffix("-pdl")
