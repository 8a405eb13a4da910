# SPDX-License-Identifier: Apache-2.0
"""Committed numbers as figures use them: measured rows, development logs, kernels of others.

Folders are below ``experiments``; their README files say how each kind of number came about. Reading a damaged file
raises :class:`flashllm.errors.FormatError` or ``OSError``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flashllm.bench import results
from flashllm.errors import FormatError

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
Key = TypeVar("Key", bound=Hashable)


class Case(NamedTuple):
    """A product: W [M, K] with a fraction of zeros, N columns of x."""

    M: int
    K: int
    N: int
    zeros: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A kernel beside cuBLAS of the same run, microseconds of one launch."""

    us: float
    cublas_us: float

    @property
    def speedup(self) -> float:
        """Speed-up over cuBLAS of the same run."""
        return self.cublas_us / self.us


@dataclass(frozen=True, kw_only=True)
class Final(Measured):
    """A row of ``flashllm bench``."""

    format: str
    commit: str
    """The first ten digits, and whether the tree had changes since; those of committed rows have none."""
    floor_us: float
    """Time that reading W and x and writing y takes at the bandwidth that the same run measured."""
    bytes: int
    """Bytes of W, x and y."""
    stated: float | None = None
    """The row's own speed-up, from times with more digits than the row has; the README's tables are made of these."""

    @property
    def speedup(self) -> float:
        """Speed-up over cuBLAS of the same run."""
        return super().speedup if self.stated is None else self.stated


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A time of a development log."""

    step: str
    variant: str
    case: Case
    us: float


def newest(root: Path, format_name: str, *, gpu: str = H100, launch: str = "graph") -> dict[Case, Final]:
    """The last measurement of each case in ``results``: of our kernel for a format, fp16, uniform zeros, L2-cold.

    Rows that failed their check or have no cuBLAS beside them do not count.
    """
    return newest_of_all(root, launch=launch).get((gpu, format_name), {})


def newest_of_all(root: Path, *, launch: str = "graph") -> dict[tuple[str, str], dict[Case, Final]]:
    """Likewise for every GPU and format, whose names are the keys, with each file read once."""
    return _last(root, ("*",), lambda row: (str(row.gpu), row.format), launch=launch)


def chosen(root: Path) -> dict[str, dict[Case, Final]]:
    """By GPU, measurements of the format that ``flashllm bench`` chose itself, in sweeps saved as ``auto-sweep`` or,
    beside other systems, ``opt-systems``.
    """
    sweeps = ("auto-sweep", "opt-systems")
    return _last(root, sweeps, lambda row: str(row.gpu), launch="graph", choice="auto-format")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The systems of one GPU, measured beside each other."""

    gpu: str
    commits: tuple[str, ...]
    systems: Mapping[str, Mapping[Case, Final]]
    """By the name of the system; ours in the format that ``auto`` took. ``zeros`` of a case are those of the matrix
    that a system multiplies: 0 for a dense one, 0.5 for a 2:4 one."""


def compared(root: Path, what: str = "opt-systems") -> tuple[Compared, ...]:
    """For each GPU, the newest measurement of every case of every system in the files of a sweep saved as ``what``.

    A sweep that was resumed elsewhere consists of several files. Those of another sweep would have other shapes and
    commits.
    """
    cases = _last(root, (what,), lambda row: (str(row.gpu), row.system), launch="graph", **_ANY_SYSTEM)
    found = []
    for gpu in in_order(gpu for gpu, _ in cases):
        systems = {name: here for (where, name), here in cases.items() if where == gpu}
        if systems:
            commits = {row.commit for here in systems.values() for row in here.values()}
            found.append(Compared(gpu=gpu, commits=tuple(sorted(commits)), systems=systems))
    return tuple(found)


def ablation(root: Path) -> dict[str, dict[str, dict[Case, float]]]:
    """By GPU and by the idea left out, ``""`` for none: microseconds of our kernel in files saved as ``ablation``."""
    found: dict[str, dict[str, dict[Case, float]]] = {}
    for system in ("flashllm", "flashllm-ablation"):
        times = _last(root, ("ablation",), lambda row: (str(row.gpu), row.kernel), launch="graph", system=system)
        for (where, kernel), cases in times.items():
            idea = kernel.partition(":")[0] if system == "flashllm-ablation" else ""
            of_gpu = found.setdefault(where, {})
            of_gpu.setdefault(idea, {}).update({case: row.us for case, row in cases.items()})
    return {gpu: found[gpu] for gpu in in_order(found)}


def in_order(gpus: Iterable[str]) -> list[str]:
    """Each GPU once: first those that all figures show, then others by name."""
    return sorted(set(gpus), key=lambda gpu: (gpu not in (H100, H200), gpu))


_ANY_SYSTEM: Mapping[str, Any] = {"system": None, "dtype": None, "pattern": None}


def _last(
    root: Path, saved_as: Sequence[str], key: Callable[[results.Row], Key], **more: Any
) -> dict[Key, dict[Case, Final]]:
    """``more``: values that fields must have in addition to or instead of the usual ones; ``None``: any."""
    wanted = {
        "system": "flashllm",
        "dtype": "fp16",
        "pattern": "uniform",
        "l2": "cold",
        "check": "pass",
        **more,
    }
    wanted = {field: value for field, value in wanted.items() if value is not None}
    found: dict[Key, dict[Case, Final]] = {}
    files = {file for what in saved_as for file in (root / "results").glob(f"*-{what}.jsonl")}
    for file in sorted(files):  # names begin with the time
        for row in results.read(file):
            if any(getattr(row, field) != value for field, value in wanted.items()):
                continue
            if row.sparsity is None or row.median_us is None or row.cublas_us is None or row.read_gbps is None:
                continue
            found.setdefault(key(row), {})[Case(row.M, row.K, row.N, row.sparsity)] = Final(
                us=row.median_us,
                cublas_us=row.cublas_us,
                format=row.format,
                commit=_tree(row),
                floor_us=row.bytes / (row.read_gbps * 1e3),
                bytes=row.bytes,
                stated=row.speedup,
            )
    return found


def _tree(row: results.Row) -> str:
    if row.commit is None:
        return "unknown"
    return row.commit[:10] + ("" if row.dirty is False else " and changes")


def log(root: Path, name: str) -> list[Logged]:
    """The times of ``kernel_log/NAME.json``; variants that the log says give wrong results are left out."""
    return [
        Logged(step=row["step"], variant=row["variant"], case=_case(row), us=float(row["median_us"]))
        for row in _read(root / "kernel_log" / f"{name}.json")
        if "median_us" in row and row.get("right", True)
    ]


def reference(root: Path, name: str, system: str) -> dict[Case, Measured]:
    """The times of one system by others in ``reference/NAME.json``."""
    return {
        _case(row): Measured(us=float(row["us"]), cublas_us=float(row["cublas_us"]))
        for row in _read(root / "reference" / f"{name}.json")
        if row["system"] == system
    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(path=str(path), field="rows", expected="an object with a list", got=str(error)) from error
    assert isinstance(rows, list)
    return rows


def _case(row: dict[str, Any]) -> Case:
    return Case(int(row["M"]), int(row["K"]), int(row["N"]), float(row["sparsity"]))
