# SPDX-License-Identifier: Apache-2.0
"""Sums over GPUs by NCCL, one process a GPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import MutableMapping
from typing import Any

import numpy as np

from flashllm.engine.rendezvous import Rendezvous
from flashllm.errors import ArgumentError, MissingDependencyError

MULTICAST = "NCCL_NVLS_ENABLE"
_OLDEST = 21000  # 2.10: the first that adds bf16, and 2.9 the first that is captured in graphs
_POLL_SECONDS = 0.5
_ABORT_SECONDS = 2.0


def without_multicast(environment: MutableMapping[str, str]) -> None:
    """Have NCCL leave NVLink multicast off. Raises ``ArgumentError`` where ``environment`` asks for it."""
    if environment.setdefault(MULTICAST, "0") != "0":
        raise ArgumentError(MULTICAST, expected="0 or nothing: NVLink multicast stays off", got=environment[MULTICAST])


class NcclCommunicator:
    """One rank of a group, on the current GPU. What it queues may be captured in CUDA graphs.

    As long as nobody calls :meth:`close`, the communicator lives until the process ends.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        """Waits for all ranks. Raises ``MissingDependencyError`` without NCCL, ``CommunicationError``."""
        without_multicast(os.environ)  # before NCCL reads it
        from cupy.cuda import nccl

        if not nccl.available:
            raise MissingDependencyError("NCCL does not load: pip install nvidia-nccl-cu13 (or -cu12)")
        version = int(nccl.get_version())
        if version < _OLDEST:
            raise MissingDependencyError(f"NCCL: expected 2.10 or newer, got version code {version}")
        self._rendezvous = rendezvous
        self._types = {np.dtype(np.float16): nccl.NCCL_FLOAT16, np.dtype(np.uint16): nccl.NCCL_BFLOAT16}
        self._sum = nccl.NCCL_SUM
        name = rendezvous.broadcast(None if rendezvous.rank else bytes(nccl.get_unique_id()))
        self._comm: Any = nccl.NcclCommunicator(rendezvous.count, name, rendezvous.rank)
        self._closed = False
        self._lock = threading.Lock()
        # The thread also holds the communicator: CuPy destroys one that nobody holds, and since NCCL 2.26 that waits
        # until no graph is left that has captured it, which at the end of a process may be for ever.
        threading.Thread(target=self._watch, name="NCCL", daemon=True).start()

    def all_reduce(self, array: Any) -> None:
        """Replace ``array`` (fp16, or bf16 as uint16; C-contiguous) by the sum over all ranks; the same bits for all.

        On the current stream, which must not be the null stream: an engine's does not wait for that one. Raises
        ``CommunicationError`` where the group has failed.
        """
        import cupy

        self._rendezvous.check()
        kind = self._types.get(array.dtype)
        if kind is None or not array.flags.c_contiguous:
            got = f"{array.dtype}{'' if array.flags.c_contiguous else ' with gaps'}"
            raise ArgumentError("array", expected="contiguous fp16, or bf16 as uint16", got=got)
        stream = cupy.cuda.get_current_stream().ptr
        if not stream:
            raise ArgumentError(
                "stream", expected="the stream of a runtime: `with runtime.active()`", got="the null stream"
            )
        self._comm.allReduce(array.data.ptr, array.data.ptr, array.size, kind, self._sum, stream)

    def close(self) -> None:
        """Give up NCCL's memory. All ranks do, and no graph is left that has captured a sum: NCCL waits for that."""
        if self._leave():
            self._comm.destroy()

    def abort(self) -> None:
        """Give up at once: kernels that wait for other ranks end, what they leave is of no use.

        NCCL may wait for other ranks in this (its issue 1013): after 2 s that is left to a thread.
        """
        if self._leave():
            thread = threading.Thread(target=self._comm.abort, name="NCCL abort", daemon=True)
            thread.start()
            thread.join(_ABORT_SECONDS)

    def _leave(self) -> bool:
        """From now on nobody looks for errors; whether this is the first call."""
        with self._lock:
            first, self._closed = not self._closed, True
        return first

    def _watch(self) -> None:
        """Tell all ranks of an error that NCCL meets after a call has returned."""
        failed = False
        while True:
            time.sleep(_POLL_SECONDS)
            with self._lock:  # nobody destroys what is asked
                if self._closed:
                    return
                try:
                    if not failed:
                        self._comm.check_async_error()
                except Exception as error:  # NcclError, or a KeyError for a status that CuPy has no name for
                    failed = True
                    self._rendezvous.fail(f"rank {self._rendezvous.rank}: NCCL has failed: {error}")
