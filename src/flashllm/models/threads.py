# SPDX-License-Identifier: Apache-2.0
"""Processes the parts of a batch in separate threads, in each of which products are single-threaded.

NumPy's BLAS spreads a large product over all cores. It also splits the many small products of attention, and its
threads then wait for one another, the longer the more of the machine another process uses: a forward pass of a small
model took ten times as long beside one busy process. Sequences do not depend on each other, so each core gets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np

from flashllm.cpus import cores

Part = TypeVar("Part")
Result = TypeVar("Result")


def threads_of(xp: Any) -> int:
    """Number of threads that work on arrays of ``xp``: one for each core with NumPy, one with CuPy.

    Also one without the package ``threadpoolctl``, which is needed to limit BLAS to one thread.
    """
    if xp is not np:
        return 1
    try:
        import threadpoolctl  # noqa: F401
    except ImportError:
        return 1
    return cores()


def for_each(work: Callable[[Part], Result], parts: Sequence[Part], *, threads: int) -> list[Result]:
    """Apply ``work`` to every part in ``threads`` threads; results keep the order. Raises what ``work`` raises."""
    if threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(threads, len(parts))) as pool:
        # In the context of the caller, where NumPy keeps its settings for overflow.
        contexts = [copy_context() for _ in parts]
        return list(pool.map(lambda context, part: context.run(work, part), contexts, parts))
