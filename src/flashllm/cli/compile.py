# SPDX-License-Identifier: Apache-2.0
"""Compile kernels ahead of time and show what they use; needs no GPU."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashllm.cli._cases import BadUsage

if TYPE_CHECKING:
    from flashllm.jit.compile import CompileResult


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every architecture of this release.")
@click.option("--arch", "archs", multiple=True, metavar="ARCH", help="One architecture, e.g. 90a; repeatable.")
@click.option("--kernel", "pattern", default="", metavar="TEXT", help="Only kernels whose label contains TEXT.")
@click.option(
    "--dump-sass",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write each kernel's machine code into DIR.",
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Compile this many kernels at a time."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per kernel and architecture.")
def command(
    everything: bool,
    archs: tuple[str, ...],
    pattern: str,
    dump_sass: Path | None,
    workers: int,
    as_json: bool,
) -> None:
    """Compile kernels ahead of time and show what they use; needs no GPU.

    Without --all or --arch, compiles for this machine's GPU. Exits with status 1 when a kernel does not
    compile, uses local memory (register spills) or needs more shared memory than its architecture has.
    """
    from flashllm import registry
    from flashllm.jit.compile import compile_many
    from flashllm.jit.sass import find_disassembler
    from flashllm.jit.spec import ALL_ARCHS, normalize_arch

    if archs:
        wanted = tuple(dict.fromkeys(normalize_arch(arch) for arch in archs))
    elif everything:
        wanted = ALL_ARCHS
    else:
        wanted = (_own_arch(),)
    if dump_sass is not None:
        find_disassembler()  # fails before the work, not after, if there is none
    specs = [spec for spec in registry.all_specs() if pattern in spec.label]
    jobs = [(spec, arch) for spec in specs for arch in wanted if spec.supports(arch)]
    if not jobs:
        raise BadUsage(f"--kernel: no kernel matches {pattern!r} on sm_{', sm_'.join(wanted)}")
    results = compile_many(jobs, workers=workers, allow_spills=True)
    problems = {id(result): problem for result in results if (problem := _problem(result)) is not None}
    if as_json:
        for result in results:
            click.echo(json.dumps(_row(result, problems.get(id(result)))))
    else:
        _print_table(results, problems)
    if dump_sass is not None:
        _dump(results, dump_sass)
    if problems:
        sys.exit(1)


def _own_arch() -> str:
    from flashllm.device import device_facts
    from flashllm.errors import MissingDependencyError

    try:
        return device_facts().arch
    except (ImportError, MissingDependencyError) as error:
        raise click.UsageError("no GPU here to compile for: give --all or --arch, e.g. --arch 90a") from error


def _problem(result: CompileResult) -> str | None:
    """Why this kernel is not acceptable on this architecture, or ``None``."""
    from flashllm.jit.spec import shared_limit

    if result.cubin is None:
        return str(result.error)
    resources = result.cubin.resources
    if resources.uses_local_memory:
        return f"{result.spec.label} uses local memory on sm_{result.arch}: {resources.describe_local()}"
    limit = shared_limit(result.arch)
    needed = resources.shared_static + result.spec.shared_bytes
    if limit is not None and needed > limit:
        return (
            f"{result.spec.label} needs {needed:,} bytes of shared memory, "
            f"a block on sm_{result.arch} can have {limit:,}"
        )
    return None


def _row(result: CompileResult, problem: str | None) -> dict[str, Any]:
    resources = result.cubin.resources if result.cubin else None
    return {
        "kernel": result.spec.label,
        "arch": result.arch,
        "threads": result.spec.threads,
        "registers": resources.registers if resources else None,
        "shared_static": resources.shared_static if resources else None,
        "shared_dynamic": result.spec.shared_bytes,
        "spill_bytes": resources.spill_store + resources.spill_load if resources else None,
        "local_bytes": max(resources.stack, resources.local) if resources else None,
        "cached": result.cubin.cached if result.cubin else None,
        "problem": problem,
    }


def _print_table(results: list[CompileResult], problems: dict[int, str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flashllm.bench.tables import show

    console = Console(highlight=False)
    table = Table(title=f"{len(results)} compiled kernels", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for heading in ("arch", "threads", "registers", "shared\n(static +\ndynamic)", "spills", "local", ""):
        table.add_column(heading, justify="right")
    previous = ""
    for result in results:
        row = _row(result, problems.get(id(result)))
        label = "" if row["kernel"] == previous else escape(row["kernel"])
        if label and previous:
            table.add_section()
        previous = row["kernel"]
        table.add_row(
            label,
            f"sm_{result.arch}",
            str(row["threads"]),
            _text(row["registers"]),
            f"{_text(row['shared_static'])} + {row['shared_dynamic']}",
            _text(row["spill_bytes"]),
            _text(row["local_bytes"]),
            "[red]failed[/]" if row["problem"] else "ok",
        )
    show(console, [table], file_width=120)
    for problem in problems.values():
        console.print(f"[red]failed[/] {escape(problem)}", soft_wrap=True)
    built = sum(1 for result in results if result.cubin and not result.cubin.cached)
    console.print(f"{len(results) - len(problems)} of {len(results)} are fine; {built} built now, the rest cached")


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)


def _dump(results: list[CompileResult], folder: Path) -> None:
    from flashllm.jit.sass import disassemble

    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for result in results:
        if result.cubin is not None:
            stem = re.sub(r"[^A-Za-z0-9_.=-]+", "_", result.spec.label).strip("_")
            (folder / f"{stem}.sm_{result.arch}.sass").write_text(disassemble(result.cubin.path), encoding="utf-8")
            written += 1
    click.echo(f"{written} SASS files in {folder}", err=True)
