# SPDX-License-Identifier: Apache-2.0
"""What got faster or slower between two sets of rows, beyond what the rows themselves call noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashllm.bench.report import label_of, sparsity_of, title_of
from flashllm.bench.results import Key, Row, case_key
from flashllm.errors import ArgumentError

Verdict = Literal["faster", "slower", "same", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("wrong", "slower", "faster", "same")
"""In the order in which they are shown."""
BASELINE = "cublas"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One case in both sets. Times are microseconds."""

    before: Row
    after: Row
    ratio: float
    """The compared times, after / before: below 1 is faster."""
    noise: float
    """Relative difference that counts as noise: the threshold, or the spread of the launches where that is wider."""
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The content of a line of JSON: the case, both times, and what they mean."""
        row = self.after
        return {
            "system": row.system,
            "format": label_of(row),
            "model": row.model,
            "layer": row.layer,
            "M": row.M,
            "K": row.K,
            "N": row.N,
            "dtype": row.dtype,
            "sparsity": row.sparsity,
            "pattern": row.pattern,
            "gpu": row.gpu,
            "before_us": self.before.median_us,
            "after_us": row.median_us,
            "ratio": self.ratio,
            "noise": self.noise,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cases that both sets have, and those that only one has."""

    changes: tuple[Change, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    relative: bool
    """Whether times are in units of cuBLAS's time in the same run."""

    def count(self, verdict: Verdict) -> int:
        """Cases with this verdict."""
        return sum(change.verdict == verdict for change in self.changes)

    @property
    def failures(self) -> tuple[Change, ...]:
        """Cases that are now wrong or slower; a slower cuBLAS is not our failure and does not count."""
        return tuple(
            change
            for change in self.changes
            if change.verdict == "wrong" or (change.verdict == "slower" and change.after.system != BASELINE)
        )

    def of_system(self, *, baseline: bool) -> list[Change]:
        """The cases of cuBLAS (``baseline``), or those of all other systems."""
        return [change for change in self.changes if (change.after.system == BASELINE) == baseline]


def geometric_mean(changes: Sequence[Change]) -> float | None:
    """Geometric mean of the ratios; ``None`` if there are none."""
    if not changes:
        return None
    return math.exp(math.fsum(math.log(change.ratio) for change in changes) / len(changes))


def compare(
    before: Iterable[Row], after: Iterable[Row], *, threshold: float = 0.02, relative: bool = False
) -> Comparison:
    """Match the timed rows of two sets by case, GPU and format, and judge each pair.

    Rows whose format was chosen (``auto``) match each other, whichever format it was. A case is slower or faster if
    its median changed by more than ``threshold`` and by more than the noise of both sets together, where the noise of
    a set is half of its spread from the 20th to the 80th percentile; it is wrong if the later result failed its check.
    With ``relative``, times are in units of cuBLAS's time in the same run, which cancels the effect of a slower clock
    on both; rows without a cuBLAS time, and those of cuBLAS itself, are left out. Of repeated measurements in a set
    the last counts. Raises :class:`ArgumentError` for a threshold outside 0 to 1 and if no case is in both sets.
    """
    if not 0 <= threshold < 1:
        raise ArgumentError("threshold", expected="a fraction from 0 to below 1", got=f"{threshold}")
    old, new = _by_case(before, relative), _by_case(after, relative)
    both = [key for key in new if key in old]
    if not both:
        raise ArgumentError("results", expected="timed rows of a case in both", got=_nothing_in_common(old, new))
    changes = [_judge(old[key], new[key], threshold, relative) for key in both]
    changes.sort(key=lambda change: (VERDICTS.index(change.verdict), -abs(math.log(change.ratio))))
    return Comparison(
        changes=tuple(changes),
        only_before=tuple(row for key, row in old.items() if key not in new),
        only_after=tuple(row for key, row in new.items() if key not in old),
        relative=relative,
    )


def lines(comparison: Comparison, *, every: bool = False) -> list[str]:
    """Markdown for people: a summary and the cases that changed, with ``every`` the others too."""
    unit = "time / cuBLAS" if comparison.relative else "time"
    text = [
        f"{len(comparison.changes)} cases in both: "
        + ", ".join(f"{comparison.count(verdict)} {verdict}" for verdict in VERDICTS)
        + f"; {len(comparison.only_before)} only before, {len(comparison.only_after)} only after."
    ]
    for baseline, name in ((False, "all systems but cuBLAS"), (True, "cuBLAS")):
        if (mean := geometric_mean(comparison.of_system(baseline=baseline))) is not None:
            text.append(f"{unit}, after / before, {name}: geometric mean {mean:.3f}.")
    shown = [change for change in comparison.changes if every or change.verdict != "same"]
    if shown:
        text += ["", "| case | before us | after us | change | noise | |", "|---|---|---|---|---|---|"]
    for change in shown:
        text.append(
            f"| {case_of(change.after)} | {change.before.median_us:.2f} | {change.after.median_us:.2f} "
            f"| {100 * (change.ratio - 1):+.1f} % | {100 * change.noise:.1f} % | {change.verdict} |"
        )
    return text


def case_of(row: Row) -> str:
    """The case of a row in a few words."""
    size = f"{title_of(row)} {row.M}x{row.K} N={row.N}".strip()
    zeros = "dense" if row.format == "dense" else f"{sparsity_of(row)} {row.pattern}"
    name = row.system if row.format == "dense" else f"{row.system} {label_of(row)}"
    return f"{name}, {size}, {zeros}, {row.dtype}" + (f", {row.launch}" if row.launch not in (None, "graph") else "")


def _by_case(rows: Iterable[Row], relative: bool) -> dict[Key, Row]:
    """The last timed row of each case. Rows whose format ``auto`` chose are one case, whichever format it chose."""
    timed = [row for row in rows if row.median_us and (not relative or (row.cublas_us and row.system != BASELINE))]
    found: dict[Key, Row] = {}
    for row in timed:
        system, _, *case = case_key(row)
        key = (row.gpu, system, label_of(row), *case)
        found.pop(key, None)
        found[key] = row
    return found


def _time(row: Row, relative: bool) -> float:
    assert row.median_us
    return row.median_us / row.cublas_us if relative and row.cublas_us else row.median_us


def _spread(row: Row) -> float:
    """Half of the distance from the 20th to the 80th percentile, relative to the median."""
    if row.p20_us is None or row.p80_us is None or not row.median_us:
        return 0.0
    return (row.p80_us - row.p20_us) / 2 / row.median_us


def _judge(before: Row, after: Row, threshold: float, relative: bool) -> Change:
    ratio = _time(after, relative) / _time(before, relative)
    noise = max(threshold, _spread(before) + _spread(after))
    verdict: Verdict = "same"
    if after.check != "pass":
        verdict = "wrong"
    elif ratio > 1 + noise:
        verdict = "slower"
    elif ratio < 1 / (1 + noise):
        verdict = "faster"
    return Change(before=before, after=after, ratio=ratio, noise=noise, verdict=verdict)


def _nothing_in_common(old: dict[Key, Row], new: dict[Key, Row]) -> str:
    for name, rows in (("the first", old), ("the second", new)):
        if not rows:
            return f"no timed row in {name}"
    gpus = [sorted({str(row.gpu) for row in rows.values()}) for rows in (old, new)]
    if not set(gpus[0]) & set(gpus[1]):
        return f"rows of {', '.join(gpus[0])} and of {', '.join(gpus[1])}"
    return f"{len(old)} and {len(new)} cases, all different"
