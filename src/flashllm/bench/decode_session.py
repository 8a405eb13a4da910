# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of ``flashllm decode-bench``: weights once per system and sparsity, an engine per batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flashllm.bench import decode, environment
from flashllm.bench.decode import OURS, Case
from flashllm.bench.decode_hf import HfSystem
from flashllm.bench.decode_memory import check_memory, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_systems import EngineSystem, LeftOut, Subject, System, free_pool
from flashllm.bench.decode_torch_system import TorchSystem
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights
from flashllm.engine.parallel import Group, alone
from flashllm.engine.runtime import HostRuntime
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
    """Some of :data:`flashllm.bench.decode.SYSTEMS`."""
    batches: Sequence[int]
    prompt: int
    output: int
    format: str = "auto"
    dtype: DType = "fp16"
    layers: int | None = None
    backend: str | None = None
    group: Group = field(default_factory=alone)
    """The GPUs that share the model; this process has one of them."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration, with ``layers`` blocks. Raises ``ArgumentError``."""
        config = known_config(self.model)
        if self.layers is not None and self.layers > config.layers:
            raise ArgumentError("layers", expected=f"at most {config.layers}", got=str(self.layers))
        if self.prompt + self.output > config.positions:
            expected = f"at most {config.positions}, the positions of {self.model}"
            raise ArgumentError("output", expected=expected, got=f"{self.prompt} + {self.output}")
        return config if self.layers is None else replace(config, layers=self.layers)

    @property
    def cases(self) -> list[Case]:
        """One case for each batch."""
        return [Case(batch=batch, prompt=self.prompt, output=self.output) for batch in self.batches]

    @property
    def variants(self) -> list[tuple[str, float]]:
        """Pairs of a system and the sparsity of its weights."""
        found = [("sparse", sparsity) for sparsity in self.sparsities if "sparse" in self.systems]
        return found + [(name, 0.0) for name in decode.SYSTEMS if name != "sparse" and name in self.systems]

    @property
    def steps(self) -> int:
        """Number of progress steps: one for the weights of each block and one for each case."""
        return len(self.variants) * (self.config.layers + len(self.batches))

    def rows(
        self, *, advance: Advance = ignore, note: Callable[[str], None] = lambda text: None
    ) -> Iterator[DecodeRow]:
        """A row for every case that fits; ``note`` gets the memory sum of any other. Raises ``ArgumentError``."""
        from flashllm.backends import select

        config, name = self.config, select(self.backend).name
        self.group.shard.check(config)
        facts = environment.collect(name)
        if name == "cuda":
            yield from self._on_gpu(config, facts, advance, note)
            return
        if self.group.count > 1:
            raise ArgumentError("backend", expected="cuda, for several ranks", got=name)
        if others := [system for system in self.systems if system not in OURS]:
            raise ArgumentError("systems", expected=f"{' or '.join(OURS)}, without a GPU", got=others[0])
        for system, sparsity in self.variants:
            formats = self._formats(config, system, sparsity)
            fitting = self._fitting_host(config, formats, system, sparsity, note)
            if not fitting:
                advance("left out", config.layers)
                continue
            weights = random_weights(config, formats, sparsity=sparsity, xp=_numpy(), dtype=self.dtype, advance=advance)
            for case in fitting:
                runtime = HostRuntime(name)
                engine = decode.open_engine(weights, runtime, case)
                yield decode.make_row(
                    facts,
                    engine,
                    case,
                    model=self.model.lower(),
                    formats=formats,
                    sparsity=sparsity,
                    choice=self._choice,
                )
                advance(f"batch {case.batch}", 1)

    def _fitting_host(
        self, config: ModelConfig, formats: dict[str, str], system: str, sparsity: float, note: Callable[[str], None]
    ) -> list[Case]:
        """The cases that fit into this machine's memory; without the others, the system would end the process."""
        fitting, memory = [], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        sizes = {"prompt": self.prompt, "output": self.output}
        for case in self.cases:
            plan = plan_memory(config, formats, sparsity=sparsity, batch=case.batch, shard=self.group.shard, **sizes)
            if plan.needed > memory:
                what = f"{self.model}, {system}, batch {case.batch}: {plan.lines()}"
                note(f"left out: {what}; this machine has {memory / 1e9:.2f} GB")
            else:
                fitting.append(case)
        return fitting

    def _on_gpu(
        self,
        config: ModelConfig,
        facts: environment.Environment,
        advance: Advance,
        note: Callable[[str], None],
    ) -> Iterator[DecodeRow]:
        import cupy

        from flashllm.bench.bandwidth import read_gbps

        subject = Subject(
            facts=facts,
            model=self.model.lower(),
            config=config,
            dtype=self.dtype,
            read_gbps=read_gbps(cupy.cuda.Stream(non_blocking=True)),
        )
        # All systems are opened first, so that missing packages show before anything is measured.
        for system in [self._open(name, sparsity, subject) for name, sparsity in self.variants]:
            free_pool()
            yield from self._measure(system, advance, note)

    def _measure(self, system: System, advance: Advance, note: Callable[[str], None]) -> Iterator[DecodeRow]:
        """A row for every case of one system that fits."""
        from flashllm.device import free_memory

        # The ranks of a group must agree on what they leave out.
        fitting, free = [], min(self.group.rendezvous.all_gather(free_memory()))
        for case in self.cases:
            try:
                check_memory(system.plan(case), free, f"{self.model}, {system.label}, batch {case.batch}")
                fitting.append(case)
            except DeviceMemoryError as error:
                note(f"left out: {error}")
                advance("left out", 1)
        if not fitting:
            advance("left out", self.config.layers)
            return
        try:
            system.load(advance)
            for case in fitting:
                advance(f"{system.label}, batch {case.batch}", 0)
                try:
                    yield system.row(case)
                except LeftOut as error:
                    note(f"left out: {self.model}, {system.label}, batch {case.batch}: {error}")
                advance(f"{system.label}, batch {case.batch}", 1)
        except LeftOut as error:
            note(f"left out: {self.model}, {system.label}: {error}")
        finally:
            system.close()

    def _open(self, name: str, sparsity: float, subject: Subject) -> System:
        if name in OURS:
            return EngineSystem(
                subject,
                self._formats(subject.config, name, sparsity),
                sparsity=sparsity,
                choice=self._choice,
                shard=self.group.shard,
                communicator=self.group.communicator,
            )
        if self.group.count > 1:
            raise ArgumentError("systems", expected=f"{' or '.join(OURS)}, on several GPUs", got=name)
        return HfSystem(subject) if name == "hf-static" else TorchSystem(subject, pruned=name == "torch-2:4")

    @property
    def _choice(self) -> str:
        return "auto" if self.format == "auto" else "forced"

    def _formats(self, config: ModelConfig, system: str, sparsity: float) -> dict[str, str]:
        if system == "dense":
            return dict.fromkeys(PARTS, DENSE)
        batches = [case.batch for case in self.cases]
        return decode.choose_formats(
            config, sparsity, batches, dtype=self.dtype, shard=self.group.shard, format=self.format
        )


def _numpy() -> object:
    import numpy

    return numpy
