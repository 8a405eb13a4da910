# SPDX-License-Identifier: Apache-2.0
"""Gathers parts of sums across GPUs with NCCL, one process per GPU."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import MutableMapping
from typing import Any

from flashllm.engine.communicator import CommunicationError, check_parts
from flashllm.engine.rendezvous import Rendezvous
from flashllm.errors import ArgumentError, MissingDependencyError

MULTICAST = "NCCL_NVLS_ENABLE"
_OLDEST = 20900  # 2.9: the first that can be captured in graphs
_POLL_SECONDS = 0.5
_ABORT_SECONDS = 2.0


def without_multicast(environment: MutableMapping[str, str]) -> None:
    """Make NCCL leave NVLink multicast off. Raises ``ArgumentError`` if ``environment`` says otherwise."""
    if environment.setdefault(MULTICAST, "0") != "0":
        raise ArgumentError(MULTICAST, expected="0 or nothing: NVLink multicast stays off", got=environment[MULTICAST])


class NcclCommunicator:
    """One rank of a group, on the current GPU. What it queues may be captured in CUDA graphs.

    Unless :meth:`abort` is called, the underlying NCCL communicator lives until the process ends.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        """Wait for all ranks. Raises ``MissingDependencyError`` without NCCL 2.9 or newer, ``CommunicationError``."""
        without_multicast(os.environ)  # before NCCL reads it
        from cupy.cuda import nccl

        if not nccl.available:
            raise MissingDependencyError("NCCL does not load: pip install nvidia-nccl-cu13 (or -cu12)")
        version = int(nccl.get_version())
        if version < _OLDEST:
            raise MissingDependencyError(f"NCCL: expected 2.9 or newer, got version code {version}")
        self._rendezvous = rendezvous
        self._byte = nccl.NCCL_UINT8
        name = rendezvous.broadcast(None if rendezvous.rank else bytes(nccl.get_unique_id()))
        self._comm: Any = nccl.NcclCommunicator(rendezvous.count, name, rendezvous.rank)
        # CuPy destroys a communicator that is no longer referenced, and NCCL then waits until no graph that captured it
        # is left, which at the end of a process may be for ever. So the reference to this one is never released.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._comm))
        self._aborting: threading.Thread | None = None
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="NCCL", daemon=True)
        self._watcher.start()

    def all_gather(self, parts: Any) -> None:
        """Fill C-contiguous ``parts`` [ranks, ...]: each rank has written its own part and receives the others'.

        Runs on the current stream, which must not be the null stream: an engine's stream does not wait for that one.
        Raises ``ArgumentError``, and ``CommunicationError`` if the group has failed or this rank has left it.
        """
        import cupy

        self.check()
        if self._left.is_set():
            raise CommunicationError("the group was left")
        check_parts(parts, self._rendezvous.count)
        stream = cupy.cuda.get_current_stream().ptr
        if not stream:
            raise ArgumentError(
                "stream", expected="the stream of a runtime: `with runtime.active()`", got="the null stream"
            )
        size = parts.nbytes // self._rendezvous.count
        own = parts.data.ptr + self._rendezvous.rank * size
        self._comm.allGather(own, parts.data.ptr, size, self._byte, stream)

    def check(self) -> None:
        """Raise ``CommunicationError`` if the group has failed. Queries neither NCCL nor the GPU."""
        self._rendezvous.check()

    def leave(self) -> None:
        """Make no further calls to NCCL. Graphs that have captured it keep what they need."""
        self._left.set()
        self._watcher.join()

    def abort(self) -> None:
        """Leave, and abort NCCL: kernels that wait for other ranks end, and their results are invalid.

        NCCL then waits until no graph that captured it is left, and may wait for other ranks (its issue 1013): after
        2 s a background thread is left to do that waiting.
        """
        self.leave()
        if self._aborting is None:
            self._aborting = threading.Thread(target=self._comm.abort, name="NCCL abort", daemon=True)
            self._aborting.start()
            self._aborting.join(_ABORT_SECONDS)

    @property
    def is_aborting(self) -> bool:
        """Whether NCCL is still busy with :meth:`abort`; until then the process must not unload its libraries."""
        return self._aborting is not None and self._aborting.is_alive()

    def _watch(self) -> None:
        """Tell all ranks of an error that NCCL encounters after a call has returned."""
        while not self._left.wait(_POLL_SECONDS):
            try:
                self._comm.check_async_error()
            except Exception as error:  # NcclError, or a KeyError for a status that CuPy has no name for
                self._rendezvous.fail(f"rank {self._rendezvous.rank}: NCCL has failed: {error}")
                return
