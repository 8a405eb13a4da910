# SPDX-License-Identifier: Apache-2.0
"""How fast attention in a decoding step is: microseconds, and the fraction of the memory bandwidth it reads with.

Every pair of ``--batch`` and ``--positions`` is timed for every ``--heads``, each number of ``--splits`` in turn::

    python experiments/attention_speed.py --heads 56x56x128,64x8x128 --batch 8,64 --positions 64,320,600 \\
        --splits plan,1,2,4 --out rows.jsonl

Launches rotate over the caches of so many layers that none is still in the L2 when its turn comes again, in CUDA graphs
(docs/measurement.md); the bandwidth is measured in the same run. Each key and each value of a row's positions counts as
read once. One row of each result is compared with float64: ``!`` marks a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from flashllm import backends
from flashllm.bench.cases import parse_batches, split_list
from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.decoder.attention import AttentionPlan, attention, plan_attention

PLANNED = 0
"""Given as the number of splits, stands for the plan's own number."""
_ELEMENT_BYTES = 2
_ERROR = 2.0**-10  # of the largest value: one rounding of weights and one of the result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step of one layer: a query for each row of the batch, all with the same number of positions."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    positions: int
    capacity: int
    """Positions that the cache has room for."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the keys and values of all positions."""
        return 2 * _ELEMENT_BYTES * self.batch * self.kv_heads * self.positions * self.head_dim

    def plan(self, splits: int, *, sm_count: int) -> AttentionPlan:
        """The plan for a GPU of ``sm_count`` multiprocessors. Raises ``ArgumentError``."""
        plan = plan_attention(
            rows=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=self.capacity,
            sm_count=sm_count,
        )
        return plan if splits == PLANNED else replace(plan, splits=splits, common_splits=splits)


class Operands:
    """Operands of a case on the GPU: bell-shaped fp16 values, with the caches of ``copies`` layers."""

    def __init__(self, case: Case, copies: int) -> None:
        import cupy

        from flashllm.bench.data import random_matrix

        shape = (2, case.batch, case.kv_heads, case.capacity, case.head_dim)
        matrix = (int(np.prod(shape[:-1])), case.head_dim)
        self.caches = [random_matrix(*matrix, seed=copy, device=True).reshape(shape) for copy in range(copies)]
        queries = random_matrix(case.batch * case.heads, case.head_dim, seed=copies, device=True)
        self.q = queries.reshape(case.batch, case.heads, case.head_dim)
        self.slots = cupy.arange(case.batch, dtype=np.int32)
        self.positions = cupy.full(case.batch, case.positions - 1, np.int32)
        self.out = cupy.empty((case.batch, case.heads * case.head_dim), np.float16)

    def right(self, case: Case) -> bool:
        """Whether the last row of ``out`` is right for the first cache."""
        got = self.out[-1].get().reshape(case.heads, case.head_dim)
        query = self.q[-1].get().astype(np.float64)
        keys, values = self.caches[0][:, -1, :, : case.positions].get().astype(np.float64)
        want = np.concatenate(
            [_mean(q, k, v) for q, k, v in zip(np.split(query, case.kv_heads), keys, values, strict=True)]
        )
        return bool((np.abs(got - want) <= _ERROR * np.abs(values).max()).all())


def _mean(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """Weighted mean of the values [positions, head_dim] of one key head, per query [group, head_dim] that shares it."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    mean: NDArray[Any] = weights @ v / weights.sum(axis=1, keepdims=True)
    return mean


class System:
    """One plan on the caches of a case."""

    def __init__(self, plan: AttentionPlan, operands: Operands) -> None:
        import cupy

        self.plan, self.copies, self._operands = plan, len(operands.caches), operands
        self._workspace = cupy.zeros(max(16, plan.workspace_bytes), np.uint8)

    def launch(self, copy: int, stream: Any) -> None:
        """Queue one layer; allocates nothing."""
        from flashllm.backends import cuda

        given = self._operands
        keys, values = given.caches[copy]
        attention(
            partial(cuda.launch, stream=stream),
            self.plan,
            dtype="fp16",
            q=given.q,
            keys=keys,
            values=values,
            slots=given.slots,
            positions=given.positions,
            out=given.out,
            workspace=self._workspace,
        )


def measure(case: Case, splits: Sequence[int], *, stream: Any, read_gbps: float, cap_s: float) -> list[dict[str, Any]]:
    """A row for each number of splits."""
    from flashllm.bench import timing
    from flashllm.device import device_facts

    facts = device_facts()
    with stream:
        operands = Operands(case, timing.rotation_copies(case.read_bytes, facts.l2_bytes, "cold"))
        plans = dict.fromkeys(case.plan(count, sm_count=facts.sm_count) for count in splits)
        systems = [System(plan, operands) for plan in plans]
        # The first system of a round is measured slow, so one more runs before it, unreported.
        timings = timing.measure([systems[0], *systems], timing.Method(cap_s=cap_s), stream=stream)[1:]
        rows = []
        for system, timed in zip(systems, timings, strict=True):
            operands.out.fill(float("nan"))
            system.launch(0, stream)
            gbps = case.read_bytes / timed.median_us * 1e-3
            rows.append(
                {
                    **asdict(case),
                    "splits": system.plan.splits,
                    "grouped": system.plan.is_grouped,
                    "copies": system.copies,
                    "bytes": case.read_bytes,
                    "median_us": round(timed.median_us, 3),
                    "p20_us": round(timed.p20_us, 3),
                    "p80_us": round(timed.p80_us, 3),
                    "gbps": round(gbps, 1),
                    "read_gbps": round(read_gbps, 1),
                    "fraction": round(gbps / read_gbps, 4),
                    "right": operands.right(case),
                }
            )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    return (
        f"{row['heads']}x{row['kv_heads']}x{row['head_dim']} batch {row['batch']}, {row['positions']} positions, "
        f"{row['splits']} splits: {row['median_us']:.2f} us{'' if row['right'] else '!'}, "
        f"{100 * row['fraction']:.0f} % of {row['read_gbps']:.0f} GB/s"
    )


def parse_heads(text: str) -> list[tuple[int, int, int]]:
    """``"64x8x128,..."``: query heads, heads of keys, elements of a head. Raises :class:`BadUsage`."""
    found = []
    for part in split_list(text):
        sizes = part.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise BadUsage(f"--heads: expected HEADSxKV_HEADSxHEAD_DIM, got {part!r}")
        found.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    return found


def parse_splits(text: str) -> list[int]:
    """``"plan,2"``: numbers of splits, ``PLANNED`` for the plan's. Raises :class:`BadUsage`."""
    parts = split_list(text)
    for part in parts:
        if part != "plan" and not (part.isdecimal() and int(part)):
            raise BadUsage(f"--splits: expected 'plan' or a number >= 1, got {part!r}")
    return [PLANNED if part == "plan" else int(part) for part in parts]


@click.command()
@click.option("--heads", default="56x56x128,64x8x128", show_default=True, metavar="HxKVxD,...", help="Shapes of heads.")
@click.option("--batch", default="8,64", show_default=True, metavar="N,...", help="Rows: a sequence each.")
@click.option("--positions", default="64,320,600", show_default=True, metavar="N,...", help="Of every row.")
@click.option("--capacity", type=click.IntRange(1), help="Positions of the cache.  [default: those of the row]")
@click.option("--splits", default="plan", show_default=True, metavar="plan|N,...", help="Blocks that share positions.")
@click.option("--time-cap", default=0.15, show_default=True, help="GPU seconds of each measurement.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Rows are appended here, JSON Lines.")
def main(
    heads: str, batch: str, positions: str, capacity: int | None, splits: str, time_cap: float, out: Path | None
) -> None:
    """Time the attention of a decoding step on this GPU."""
    shapes, counts = parse_heads(heads), parse_splits(splits)
    with usage_errors():
        cases = [
            Case(heads=h, kv_heads=kv, head_dim=d, batch=rows, positions=length, capacity=capacity or length)
            for h, kv, d in shapes
            for rows in parse_batches(batch)
            for length in parse_batches(positions)
        ]
        short = next((case for case in cases if case.positions > case.capacity), None)
        if short is not None:
            raise BadUsage(f"--capacity: expected at least {short.positions} positions, got {short.capacity}")
        backends.select("cuda")
        import cupy

        from flashllm.bench import bandwidth, environment

        facts = {key: value for key, value in asdict(environment.collect("cuda")).items() if key != "sweep_id"}
        stream = cupy.cuda.Stream(non_blocking=True)
        read_gbps = bandwidth.read_gbps(stream)
        for case in cases:
            for row in measure(case, counts, stream=stream, read_gbps=read_gbps, cap_s=time_cap):
                click.echo(line(row))
                if out is not None:
                    whole = {"kind": "attention", "time_utc": environment.utc_now(), **facts, **row}
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
