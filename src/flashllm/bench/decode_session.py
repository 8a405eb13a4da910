# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of ``flashllm decode-bench``: weights once for each system and sparsity, an engine for each batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flashllm.bench import decode, environment, telemetry
from flashllm.bench.decode import Case
from flashllm.bench.decode_memory import check_memory, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights
from flashllm.engine.communicator import Communicator
from flashllm.engine.runtime import GpuRuntime, HostRuntime, Runtime
from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import ArgumentError, DeviceMemoryError
from flashllm.formats.base import DType
from flashllm.models.config import ModelConfig
from flashllm.models.known import known_config
from flashllm.progress import Advance, ignore


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Systems x sparsities x batches of one model."""

    model: str
    sparsities: Sequence[float]
    systems: Sequence[str]
    """``sparse``, ``dense``."""
    batches: Sequence[float]
    prompt: int
    output: int
    format: str = "auto"
    dtype: DType = "fp16"
    layers: int | None = None
    backend: str | None = None
    shard: Shard = WHOLE
    communicator: Communicator | None = None

    @property
    def config(self) -> ModelConfig:
        """Of the model, with ``layers`` blocks. Raises ``ArgumentError``."""
        config = known_config(self.model)
        if self.layers is not None and self.layers > config.layers:
            raise ArgumentError("layers", expected=f"at most {config.layers}", got=str(self.layers))
        if self.prompt + self.output > config.positions:
            expected = f"at most {config.positions}, the positions of {self.model}"
            raise ArgumentError("output", expected=expected, got=f"{self.prompt} + {self.output}")
        return config if self.layers is None else replace(config, layers=self.layers)

    @property
    def cases(self) -> list[Case]:
        """By batch."""
        return [Case(batch=int(batch), prompt=self.prompt, output=self.output) for batch in self.batches]

    @property
    def variants(self) -> list[tuple[str, float]]:
        """Systems with the sparsity of their weights."""
        found = [("sparse", sparsity) for sparsity in self.sparsities if "sparse" in self.systems]
        return found + [("dense", 0.0)] * ("dense" in self.systems)

    @property
    def steps(self) -> int:
        """Of progress: weights of a block are one, a case is one."""
        return len(self.variants) * (self.config.layers + len(self.batches))

    def rows(
        self, *, advance: Advance = ignore, note: Callable[[str], None] = lambda text: None
    ) -> Iterator[DecodeRow]:
        """A row for every case that fits; ``note`` gets the sum of one that does not. Raises ``ArgumentError``."""
        from flashllm.backends import select

        config, name = self.config, select(self.backend).name
        self.shard.check(config)
        facts = environment.collect(name)
        if name == "cuda":
            yield from self._on_gpu(config, facts, advance, note)
            return
        for system, sparsity in self.variants:
            formats = self._formats(config, system, sparsity)
            weights = random_weights(config, formats, sparsity=sparsity, xp=_numpy(), dtype=self.dtype, advance=advance)
            for case in self.cases:
                runtime = HostRuntime(name)
                engine = decode.open_engine(weights, runtime, case)
                yield self._row_of(facts, formats, sparsity)(engine, case)
                advance(f"batch {case.batch}", 1)

    def _on_gpu(
        self,
        config: ModelConfig,
        facts: environment.Environment,
        advance: Advance,
        note: Callable[[str], None],
    ) -> Iterator[DecodeRow]:
        import cupy

        from flashllm.bench.bandwidth import read_gbps
        from flashllm.device import free_memory

        pool = cupy.get_default_memory_pool()
        runtime: Runtime = GpuRuntime()
        try:
            gbps = read_gbps(cupy.cuda.Stream(non_blocking=True))
            pool.free_all_blocks()
            for system, sparsity in self.variants:
                formats = self._formats(config, system, sparsity)
                fitting = []
                free = free_memory()
                for case in self.cases:
                    try:
                        self._check(config, formats, sparsity, case, free)
                        fitting.append(case)
                    except DeviceMemoryError as error:
                        note(f"left out: {error}")
                        advance("left out", 1)
                if not fitting:
                    advance("left out", config.layers)
                    continue
                weights = random_weights(
                    config, formats, sparsity=sparsity, xp=cupy, dtype=self.dtype, shard=self.shard, advance=advance
                )
                for case in fitting:
                    advance(f"{system}, batch {case.batch}", 0)
                    engine = decode.open_engine(weights, runtime, case, self.communicator)
                    times = decode.measure(engine, case)
                    peak = free - free_memory() + int(pool.free_bytes())
                    measured = {"times": times, "read_gbps": gbps, "reading": telemetry.read(), "peak_bytes": peak}
                    yield self._row_of(facts, formats, sparsity)(engine, case, **measured)
                    advance(f"{system}, batch {case.batch}", 1)
                    del engine
                    gc.collect()
                    pool.free_all_blocks()
                del weights
                runtime.close()
                runtime = GpuRuntime()  # whose plans hold no weights
                gc.collect()
                pool.free_all_blocks()
        finally:
            runtime.close()

    def _row_of(
        self, facts: environment.Environment, formats: Mapping[str, str], sparsity: float
    ) -> Callable[..., DecodeRow]:
        """Makes rows of one system: takes the engine, the case and what was measured."""
        return partial(
            decode.make_row,
            facts,
            model=self.model.lower(),
            formats=formats,
            sparsity=sparsity,
            choice="auto" if self.format == "auto" else "forced",
        )

    def _formats(self, config: ModelConfig, system: str, sparsity: float) -> dict[str, str]:
        if system == "dense":
            return dict.fromkeys(PARTS, DENSE)
        batches = [case.batch for case in self.cases]
        return decode.choose_formats(config, sparsity, batches, dtype=self.dtype, shard=self.shard, format=self.format)

    def _check(self, config: ModelConfig, formats: dict[str, str], sparsity: float, case: Case, free: int) -> None:
        plan = plan_memory(
            config,
            formats,
            sparsity=sparsity,
            batch=case.batch,
            prompt=case.prompt,
            output=case.output,
            shard=self.shard,
        )
        kind = "dense" if formats["qkv"] == DENSE else f"{sparsity:.0%} zeros"
        check_memory(plan, free, f"{self.model}, {kind}, batch {case.batch}")


def _numpy() -> object:
    import numpy

    return numpy
