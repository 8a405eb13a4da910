# SPDX-License-Identifier: Apache-2.0
"""The systems that decode the cases of a sweep on the current GPU: our engine; others have modules of their own."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flashllm.bench import decode
from flashllm.bench.decode import Case
from flashllm.bench.decode_memory import MemoryPlan, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_weights import DENSE, random_weights
from flashllm.bench.environment import Environment
from flashllm.engine.communicator import Communicator
from flashllm.engine.runtime import GpuRuntime
from flashllm.engine.shard import Shard
from flashllm.engine.weights import Weights
from flashllm.errors import DeviceMemoryError, FlashLLMError
from flashllm.formats.base import DType
from flashllm.models.config import ModelConfig
from flashllm.progress import Advance


class LeftOut(FlashLLMError):
    """A system cannot decode a case; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all systems of a sweep decode, and what all of their rows have in common."""

    facts: Environment
    model: str
    """Name of the model."""
    config: ModelConfig
    dtype: DType
    read_gbps: float
    """Read bandwidth of the GPU's memory."""


class System(Protocol):
    """One system, with weights of one sparsity. ``load`` is called before ``row``, and ``close`` last, in any event."""

    label: str
    """Name shown to people."""

    def plan(self, case: Case) -> MemoryPlan:
        """The memory that the case takes."""

    def load(self, advance: Advance) -> None:
        """Make the weights, with a step of progress for each block. Raises ``LeftOut``."""

    def row(self, case: Case) -> DecodeRow:
        """Decode a case, and free what only this case needed. Raises ``LeftOut``."""

    def close(self) -> None:
        """Return all memory to the driver."""


class EngineSystem:
    """Our engine, with sparse or with dense weights, or with a shard of them."""

    def __init__(
        self,
        subject: Subject,
        formats: Mapping[str, str],
        *,
        sparsity: float,
        choice: str,
        shard: Shard,
        communicator: Communicator | None,
    ) -> None:
        self.label = "dense" if formats["qkv"] == DENSE else f"{sparsity:.0%} zeros"
        self._subject, self._formats, self._sparsity, self._choice = subject, formats, sparsity, choice
        self._shard, self._communicator = shard, communicator
        self._weights: Weights | None = None
        self._runtime: GpuRuntime | None = None
        self._free = 0

    def plan(self, case: Case) -> MemoryPlan:
        """As :class:`System` says."""
        return plan_memory(
            self._subject.config,
            self._formats,
            sparsity=self._sparsity,
            batch=case.batch,
            prompt=case.prompt,
            output=case.output,
            shard=self._shard,
        )

    def load(self, advance: Advance) -> None:
        """As :class:`System` says."""
        import cupy

        from flashllm.device import free_memory

        self._free = free_memory()
        self._runtime = GpuRuntime()
        self._weights = random_weights(
            self._subject.config,
            self._formats,
            sparsity=self._sparsity,
            xp=cupy,
            dtype=self._subject.dtype,
            shard=self._shard,
            advance=advance,
        )

    def row(self, case: Case) -> DecodeRow:
        """As :class:`System` says."""
        import cupy

        assert self._weights is not None
        assert self._runtime is not None
        try:
            engine = decode.open_engine(self._weights, self._runtime, case, self._communicator)
            times = decode.measure(engine, case)
        # The plan fell short by memory that the pool could not use; not every allocation says what it was for.
        except (DeviceMemoryError, cupy.cuda.memory.OutOfMemoryError) as error:
            if self._communicator is not None:
                raise  # the other ranks go on
            raise LeftOut(str(error)) from error
        row = decode.make_row(
            self._subject.facts,
            engine,
            case,
            model=self._subject.model,
            formats=self._formats,
            sparsity=self._sparsity,
            choice=self._choice,
            times=times,
            read_gbps=self._subject.read_gbps,
            reading=times.reading,
            peak_bytes=taken_since(self._free),
        )
        del engine
        free_pool()
        return row

    def close(self) -> None:
        """As :class:`System` says."""
        if self._runtime is not None:
            self._runtime.close()
        self._weights = self._runtime = None
        free_pool()


def taken_since(free: int) -> int:
    """Bytes that the driver has handed out since ``free`` bytes were free."""
    import cupy

    from flashllm.device import free_memory

    return free - free_memory() + int(cupy.get_default_memory_pool().free_bytes())


def free_pool() -> None:
    """Return unused memory in CuPy's pool to the driver, since other libraries do not allocate from that pool."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
