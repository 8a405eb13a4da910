# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of launches: how one is made and how long one replay takes per launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def capture(launches: Callable[[], None], stream: Any) -> Any:
    """Capture what ``launches`` queues on ``stream`` (not the null stream) as a CUDA graph."""
    with stream:
        stream.begin_capture()
        try:
            launches()
        except BaseException:
            # A capture that fails must still be ended, or the stream stays unusable.
            with contextlib.suppress(Exception):
                stream.end_capture()
            raise
        graph = stream.end_capture()
    graph.upload(stream)
    return graph


def replay_us(graph: Any, stream: Any, launches: int) -> float:
    """Microseconds per launch of one replay of ``graph``, which holds ``launches`` of them; waits for it."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    graph.launch(stream)
    stop.record(stream)
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1000.0 / launches
