# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch in threads of their own, each with products of one thread.

NumPy's BLAS gives a large product to all cores. The many small ones of attention it splits too, and its threads then
wait for one another, the longer the more another process has of the machine: a forward pass of a small model took ten
times as long beside one busy process. Sequences need nothing of each other, so each core gets its own.
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
    """Threads that work on arrays of ``xp``: one for each core with NumPy, one with CuPy.

    One, too, without the package ``threadpoolctl``, which keeps BLAS to one thread.
    """
    if xp is not np:
        return 1
    try:
        import threadpoolctl  # noqa: F401
    except ImportError:
        return 1
    return cores()


def for_each(work: Callable[[Part], Result], parts: Sequence[Part], *, threads: int) -> list[Result]:
    """``work`` of every part, in so many threads; results in the order of ``parts``. Raises what ``work`` raises."""
    if threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(threads, len(parts))) as pool:
        # In the context of the caller, where NumPy keeps what to do about overflow.
        contexts = [copy_context() for _ in parts]
        return list(pool.map(lambda context, part: context.run(work, part), contexts, parts))
