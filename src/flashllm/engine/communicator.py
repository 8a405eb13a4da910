# SPDX-License-Identifier: Apache-2.0
"""Sums over the GPUs of a tensor-parallel group."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashllm.engine.arrays import rounded, widened
from flashllm.errors import FlashLLMError


class Communicator(Protocol):
    """One member of a group."""

    def all_reduce(self, array: Any) -> object:
        """Replace ``array`` (fp16, or bf16 as uint16) by the sum of what all members give; the same bits for all."""


class CommunicationError(FlashLLMError, RuntimeError):
    """Another member of the group has failed, or the network between them."""


class ThreadGroup:
    """A group of threads of one process with NumPy arrays: for models that are divided on the CPU."""

    def __init__(self, count: int, *, seconds: float = 60.0) -> None:
        """``seconds``: how long a member waits for the others."""
        self.members = tuple(_Thread(self, index) for index in range(count))
        self._barrier = threading.Barrier(count, timeout=seconds)
        self._given: list[NDArray[Any]] = [np.empty(0)] * count

    def fail(self) -> None:
        """End the wait of the others, now and later, with :class:`CommunicationError`."""
        self._barrier.abort()

    def sum(self, index: int, array: NDArray[Any]) -> None:
        """The part of member ``index`` in a sum."""
        self._given[index] = array
        try:
            self._barrier.wait()
            with np.errstate(over="ignore", invalid="ignore"):  # rows that fill up a pass may hold anything
                total = sum((widened(one) for one in self._given[1:]), start=widened(self._given[0]))
                result = rounded(total, array.dtype)
            self._barrier.wait()  # nobody writes before everybody has read
        except threading.BrokenBarrierError as error:
            raise CommunicationError(f"member {index}: another member of the group has ended") from error
        array[...] = result


class _Thread:
    def __init__(self, group: ThreadGroup, index: int) -> None:
        self._group, self._index = group, index

    def all_reduce(self, array: Any) -> None:
        """As :class:`Communicator` says."""
        self._group.sum(self._index, array)
