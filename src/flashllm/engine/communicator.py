# SPDX-License-Identifier: Apache-2.0
"""How the GPUs of a tensor-parallel group exchange the parts of a sum, of which each GPU computes one."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FlashLLMError


class Communicator(Protocol):
    """One member of a group."""

    def all_gather(self, parts: Any) -> object:
        """Fill C-contiguous ``parts`` [members, ...]: each member has written its own part and receives the others'.

        May be captured in a graph. Raises ``ArgumentError`` for any other array, and ``CommunicationError``.
        """

    def check(self) -> None:
        """Raise :class:`CommunicationError` if the group has failed: anything computed since then is invalid."""


class CommunicationError(FlashLLMError, RuntimeError):
    """Another member of the group has failed, or the network between them."""


def check_parts(parts: Any, count: int) -> None:
    """Raise ``ArgumentError`` unless ``parts`` is a C-contiguous array of ``count`` parts."""
    if not parts.flags.c_contiguous or parts.shape[:1] != (count,):
        layout = "" if parts.flags.c_contiguous else " with gaps"
        raise ArgumentError("parts", expected=f"contiguous [{count}, ...]", got=f"{list(parts.shape)}{layout}")


class ThreadGroup:
    """A group of threads in one process that exchange NumPy arrays, for models that are divided on the CPU."""

    def __init__(self, count: int, *, seconds: float = 60.0) -> None:
        """``seconds``: how long a member waits for the others."""
        self.members = tuple(_Thread(self, index) for index in range(count))
        self._barrier = threading.Barrier(count, timeout=seconds)
        self._given: list[NDArray[Any]] = [np.empty(0)] * count

    def fail(self) -> None:
        """Make the current and later waits of all members end with :class:`CommunicationError`."""
        self._barrier.abort()

    def gather(self, index: int, parts: NDArray[Any]) -> None:
        """Exchange parts on behalf of member ``index``."""
        check_parts(parts, len(self.members))
        self._given[index] = parts[index]
        try:
            self._barrier.wait()
            for member, given in enumerate(self._given):
                if member != index:
                    parts[member] = given
            self._barrier.wait()  # no member writes before all have read
        except threading.BrokenBarrierError as error:
            raise self._failure(index) from error

    def check(self, index: int) -> None:
        """As :class:`Communicator` says, for member ``index``."""
        if self._barrier.broken:
            raise self._failure(index)

    def _failure(self, index: int) -> CommunicationError:
        return CommunicationError(f"member {index}: another member of the group has ended")


class _Thread:
    def __init__(self, group: ThreadGroup, index: int) -> None:
        self._group, self._index = group, index

    def all_gather(self, parts: Any) -> None:
        """As :class:`Communicator` says."""
        self._group.gather(self._index, parts)

    def check(self) -> None:
        """As :class:`Communicator` says."""
        self._group.check(self._index)
