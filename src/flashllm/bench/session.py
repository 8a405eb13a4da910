# SPDX-License-Identifier: Apache-2.0
"""Keeps the rows of a run: in memory, and in a file to which a later run can add."""

from __future__ import annotations

from pathlib import Path

from flashllm.bench import results
from flashllm.bench.cases import Group
from flashllm.bench.environment import Environment
from flashllm.bench.results import Row
from flashllm.errors import ArgumentError


class Session:
    """Rows measured now and, with ``resume``, rows that the file had before."""

    def __init__(self, *, out: Path | None = None, resume: Path | None = None) -> None:
        """Read ``resume`` where there is one.

        Raises ``OSError`` if a file cannot be read or written, and ``FormatError`` if it holds anything but rows.
        """
        self.rows: list[Row] = []
        self.saved = 0
        """Rows that are in the file by now."""
        self.earlier: list[Row] = []
        self.out = out or resume
        if resume is not None and resume.exists():
            self.earlier = results.read(resume)
        if self.out is not None:
            results.ensure_rows(self.out)
            if self.out.is_file():  # not a pipe or a terminal; a row must not go on a line that a crash left unfinished
                results.drop_torn_line(self.out)
        self._done = {
            (
                *(r.model, r.layer, r.M, r.K, r.N, r.dtype, *results.zeros_key(r), r.pattern, r.seed),
                *(r.format, r.l2, r.launch),
            )
            for r in self.earlier
            if r.system in ("flashllm", "flashllm-pdl") and r.check == "pass"
        }

    @property
    def sweep_id(self) -> str | None:
        """The sweep that the resumed file belongs to."""
        return self.earlier[-1].sweep_id if self.earlier else None

    def check_same_machine(self, environment: Environment) -> None:
        """Raise :class:`ArgumentError` when resumed rows come from another machine or commit."""
        for field in ("backend", "gpu", "driver", "commit", "dirty"):
            now = getattr(environment, field)
            for row in self.earlier:
                before = getattr(row, field)
                if before != now:
                    raise ArgumentError("resume", expected=f"rows with {field} = {now}, as here", got=str(before))

    def is_wanted(
        self, group: Group, sparsity: float | None, n: int, format_name: str, *, l2: str | None, launch: str | None
    ) -> bool:
        """Whether no earlier row holds this case with a right result."""
        key = (
            group.model,
            group.layer,
            group.m,
            group.k,
            n,
            group.dtype,
            sparsity,
            None if group.zeros is None else round(group.zeros, 6),  # as in a row
            group.pattern,
            group.seed,
        )
        return (*key, format_name, l2, launch) not in self._done

    def add(self, row: Row) -> None:
        """Keep ``row`` and, where there is a file, put it on disk."""
        self.rows.append(row)
        if self.out is not None:
            results.append(self.out, row)
            self.saved += 1

    @property
    def all_right(self) -> bool:
        """Whether every row measured now passed its check."""
        return all(row.check == "pass" for row in self.rows)
