# SPDX-License-Identifier: Apache-2.0
"""Times launches on the GPU: graphs over rotating weight copies, systems interleaved, firm medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashllm.graphs import capture

BATCH_MS = 4.0  # GPU time of one batch: thousands of times the event resolution, dozens of batches per second
MAX_BATCH = 1024  # launches per batch
MIN_SAMPLES = 8
COLD_BYTES = 500_000_000
COLD_L2_FACTOR = 5
MAX_COPIES = 4096  # 500 MB of 122 KB weights; a smaller weight is bound by its launch, wherever it is read from
_STREAM_PROBE_LAUNCHES = 3


class System(Protocol):
    """Something that can be launched on any of its ``copies`` of the weights."""

    copies: int

    def launch(self, copy: int, stream: Any) -> None:
        """Queue one product that reads weight copy ``copy`` on the CuPy stream; allocates nothing."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to measure; ``cap_s`` GPU seconds per system end it even if the median is not yet firm."""

    launch: str = "graph"
    l2: str = "cold"
    warmup_ms: float = 10.0
    cap_s: float = 0.25
    relative_error: float = 0.005


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one launch in microseconds over all batches, each batch an average over its launches."""

    median_us: float
    p20_us: float
    p80_us: float
    min_us: float
    launches: int
    relative_error: float


def rotation_copies(weight_bytes: int, l2_bytes: int, l2: str) -> int:
    """Copies of a weight to rotate over, so that none is still in L2 when its turn comes again.

    At least 2, and together at least max(5 x L2, 500 MB), but at most ``MAX_COPIES``; just 1 for ``l2="warm"``.
    """
    if l2 == "warm":
        return 1
    return min(MAX_COPIES, max(2, -(-max(COLD_L2_FACTOR * l2_bytes, COLD_BYTES) // max(1, weight_bytes))))


def batch_launches(launch_us: float, copies: int) -> int:
    """Launches per batch: about ``BATCH_MS`` of work (at most about ``MAX_BATCH``), in whole rotations."""
    wanted = min(max(1.0, BATCH_MS * 1000.0 / max(launch_us, 0.1)), MAX_BATCH)
    return copies * max(1, round(wanted / copies))


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics, like ``numpy.percentile``."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_error(values: Sequence[float]) -> float:
    """Estimated relative standard error of the median; infinite for fewer than three values.

    1.2533 sigma / sqrt(n) as for normal samples, with sigma = (p80 - p20) / 1.6832, which outliers do not
    move.
    """
    if len(values) < 3:
        return math.inf
    sigma = (percentile(values, 0.8) - percentile(values, 0.2)) / 1.6832
    return 1.2533 * sigma / math.sqrt(len(values)) / statistics.median(values)


def summarize(samples_us: Sequence[float], launches: int) -> Timing:
    """Statistics of ``samples_us``; ``launches`` is how many launches all samples hold together."""
    return Timing(
        median_us=statistics.median(samples_us),
        p20_us=percentile(samples_us, 0.2),
        p80_us=percentile(samples_us, 0.8),
        min_us=min(samples_us),
        launches=launches,
        relative_error=median_error(samples_us),
    )


class _Batch:
    """A fixed number of launches of one system that is queued as a whole, between two events."""

    def __init__(self, system: System, stream: Any, method: Method) -> None:
        import cupy

        self._system, self._stream = system, stream
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()
        self._graph: Any = None
        # One untimed pass loads code and fills caches; the second says how long a launch takes.
        self.launches = _STREAM_PROBE_LAUNCHES
        self._loop()
        self.queue()
        self.launches = batch_launches(self.sample_us(), system.copies)
        if method.launch == "graph":
            self._graph = capture(self._loop, stream)
        self.samples: list[float] = []

    def _loop(self) -> None:
        for i in range(self.launches):
            self._system.launch(i % self._system.copies, self._stream)

    def queue(self) -> None:
        """Queue the batch between its two events."""
        self._start.record(self._stream)
        if self._graph is None:
            self._loop()
        else:
            self._graph.launch(self._stream)
        self._stop.record(self._stream)

    def sample_us(self) -> float:
        """Microseconds per launch of the batch last queued; waits for it."""
        import cupy

        self._stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(self._start, self._stop)) * 1000.0 / self.launches

    def spent_s(self) -> float:
        """GPU seconds of the samples kept so far."""
        return sum(self.samples) * self.launches * 1e-6


def measure(
    systems: Sequence[System],
    method: Method,
    *,
    stream: Any,
    under_load: Callable[[], None] | None = None,
) -> list[Timing]:
    """Time every system, a batch of each in turn (A B C A B C ...), so that clock drift hits all alike.

    Stops when every median is known to ``method.relative_error`` (after at least 8 batches each) or its time
    is up. ``under_load`` is called once in the middle of the work, while the GPU is busy.
    """
    with stream:
        batches = [_Batch(system, stream, method) for system in systems]
        warm_us = 0.0
        while warm_us < method.warmup_ms * 1000.0 * len(batches):
            for batch in batches:
                batch.queue()
            warm_us += sum(batch.sample_us() * batch.launches for batch in batches)
        rounds = 0
        while not all(_finished(batch, method) for batch in batches):
            for batch in batches:
                batch.queue()
            if under_load is not None and rounds == 1:
                under_load()
            for batch in batches:
                batch.samples.append(batch.sample_us())
            rounds += 1
    return [summarize(batch.samples, batch.launches * len(batch.samples)) for batch in batches]


def _finished(batch: _Batch, method: Method) -> bool:
    if len(batch.samples) < 3:
        return False
    if len(batch.samples) >= MIN_SAMPLES and median_error(batch.samples) < method.relative_error:
        return True
    return batch.spent_s() >= method.cap_s
