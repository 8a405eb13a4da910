# SPDX-License-Identifier: Apache-2.0
"""Measures how fast an engine decodes: time to the first token, time of a step, and where a step's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from flashllm.bench import telemetry
from flashllm.bench.decode_rows import SCHEMA, DecodeRow
from flashllm.bench.decode_weights import DENSE, PARTS, stored_share
from flashllm.bench.environment import Environment, utc_now
from flashllm.bench.rows import rounded
from flashllm.bench.telemetry import Reading
from flashllm.engine.communicator import Communicator
from flashllm.engine.engine import PREFILL_ROWS, Engine
from flashllm.engine.forward import KINDS, Kind, run
from flashllm.engine.runtime import Runtime
from flashllm.engine.sampling import SamplingOptions
from flashllm.engine.shard import Shard
from flashllm.engine.weights import Weights
from flashllm.models.config import ModelConfig

_WARM_STEPS = 3
_REPLAYS = 15
SYSTEMS = {
    "sparse": "flashllm",
    "dense": "flashllm-dense",
    "torch-compile": "torch-compile",
    "hf-static": "hf-static",
    "torch-2:4": "torch-2:4",
}
"""Names of systems in rows, by their names on the command line."""
OURS = ("sparse", "dense")
"""Those among them that are our engine."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is decoded: ``batch`` prompts of equal length, each followed by ``output`` tokens."""

    batch: int
    prompt: int = 64
    output: int = 512

    @property
    def capacity(self) -> int:
        """Positions that a sequence needs."""
        return self.prompt + self.output


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of one case, in milliseconds."""

    total: float
    first: float
    step: float | None = None
    """A step in the middle of the output; ``None`` where it is not timed separately."""
    kinds: Mapping[Kind, float] = field(default_factory=dict)
    """How much of that step its launches of each kind take."""
    reading: Reading = field(default_factory=Reading)
    """Clock, temperature and power during the run."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on one GPU."""

    matrices: int
    """Matrices of all blocks."""
    head: int
    weights: int
    """All weights, including these two."""
    cache: int
    workspace: int


def choose_formats(
    config: ModelConfig, sparsity: float, batches: Sequence[int], *, dtype: str, shard: Shard, format: str = "auto"
) -> dict[str, str]:
    """The format of each matrix of a block; ``auto`` takes the one that the time model expects to be fastest."""
    from flashllm.matmul.auto import rank_formats

    if format != "auto":
        return dict.fromkeys(PARTS, format)
    shapes = {part: shard.shape(config, part) for part in PARTS}
    return {
        part: rank_formats(shape, 1 - sparsity, tuple(batches), dtype=dtype).best.format
        for part, shape in shapes.items()
    }


def open_engine(weights: Weights, runtime: Runtime, case: Case, communicator: Communicator | None = None) -> Engine:
    """An engine for the case that has decoded a few tokens, so that kernels are loaded and the step is captured."""
    engine = Engine(
        weights,
        runtime,
        batch=case.batch,
        capacity=case.capacity,
        prefill_rows=min(PREFILL_ROWS, case.batch * case.prompt),
        communicator=communicator,
    )
    engine.start(random_prompts(weights.config.vocab, case), _options(case))
    for _ in range(min(_WARM_STEPS, case.output - 1)):
        engine.step()
    runtime.wait()
    return engine


def measure(engine: Engine, case: Case) -> Times:
    """Decode the case once from the prompts to the last token, then time each kind of launch in a middle step."""
    runtime = engine.runtime
    prompts, options = random_prompts(engine.weights.config.vocab, case), _options(case)
    runtime.wait()
    begun = time.perf_counter()
    engine.start(prompts, options)
    runtime.wait()
    first = time.perf_counter()
    for _ in range(case.output - 1):
        engine.step()
    reading = telemetry.read()  # while the last steps run
    runtime.wait()
    ended = time.perf_counter()
    step, kinds = _replayed_ms(engine, case)
    return Times(
        total=(ended - begun) * 1e3,
        first=(first - begun) * 1e3,
        step=step,
        kinds=kinds,
        reading=reading,
    )


def bound_ms(weights: Weights, case: Case, read_gbps: float) -> float:
    """Milliseconds that a step in the middle of the output needs merely to read what it must."""
    read = weights.matrix_bytes + int(weights.head.nbytes)
    return _bound_ms(weights.config, weights.shard, read, case, read_gbps)


def make_row(
    environment: Environment,
    engine: Engine,
    case: Case,
    *,
    model: str,
    formats: Mapping[str, str],
    sparsity: float,
    choice: str,
    times: Times | None = None,
    read_gbps: float | None = None,
    reading: Reading | None = None,
    peak_bytes: int | None = None,
) -> DecodeRow:
    """The row of a case; without ``times`` (no GPU) every time is ``None``."""
    weights, products = engine.weights, engine.runtime.products
    dense = all(name == DENSE for name in formats.values())
    return fill_row(
        environment,
        case,
        Sizes(
            matrices=weights.matrix_bytes,
            head=int(weights.head.nbytes),
            weights=weights.nbytes,
            cache=engine.cache.nbytes,
            workspace=engine.workspace_bytes,
        ),
        model=model,
        config=weights.config,
        dtype=weights.dtype,
        shard=weights.shard,
        system=SYSTEMS["dense" if dense else "sparse"],
        format=",".join(sorted(set(formats.values()))),
        choice=choice,
        sparsity=0.0 if dense else sparsity,
        sparsity_real=1 - stored_share(weights),
        kernels="; ".join(products.label(w, case.batch) for w in weights.blocks[0].matrices),
        launch=("graph-pdl" if getattr(engine.runtime, "overlap", False) else "graph") if times else None,
        launches=len(engine.decode_operations()),
        times=times,
        read_gbps=read_gbps,
        reading=reading,
        peak_bytes=peak_bytes,
    )


def fill_row(
    environment: Environment,
    case: Case,
    sizes: Sizes,
    *,
    model: str,
    config: ModelConfig,
    dtype: str,
    shard: Shard,
    system: str,
    format: str,
    choice: str,
    sparsity: float,
    sparsity_real: float,
    kernels: str,
    launch: str | None,
    launches: int | None = None,
    times: Times | None = None,
    read_gbps: float | None = None,
    reading: Reading | None = None,
    peak_bytes: int | None = None,
) -> DecodeRow:
    """The row of a case decoded by any system; everything that follows from its times and sizes is computed here."""
    gpus = shard.count
    per_s = case.batch * case.output / times.total * 1e3 if times else None
    bound = _bound_ms(config, shard, sizes.matrices + sizes.head, case, read_gbps) if read_gbps else None
    step = times.step if times else None
    kinds: Mapping[Kind, float] = times.kinds if times else {}
    reading = reading or Reading()
    return DecodeRow(
        schema=SCHEMA,
        kind="e2e",
        time_utc=utc_now(),
        **asdict(environment),
        sm_mhz=reading.sm_mhz,
        temp_c=reading.temp_c,
        power_w=reading.power_w,
        model=model,
        layers=config.layers,
        dtype=dtype,
        system=system,
        format=format,
        choice=choice,
        sparsity=sparsity,
        sparsity_real=round(sparsity_real, 6),
        gpus=gpus,
        tp=gpus,
        batch=case.batch,
        prompt=case.prompt,
        output=case.output,
        seconds=rounded(times.total / 1e3 if times else None, 4),
        tokens_per_s=rounded(per_s, 2),
        tokens_per_gpu_s=rounded(per_s / gpus if per_s else None, 2),
        ttft_ms=rounded(times.first if times else None, 3),
        tpot_ms=rounded((times.total - times.first) / max(1, case.output - 1) if times else None, 4),
        linear_ms=rounded(kinds.get("linear"), 4),
        attention_ms=rounded(kinds.get("attention"), 4),
        comm_ms=rounded(kinds.get("communication"), 4),
        other_ms=rounded(kinds.get("other"), 4),
        step_ms=rounded(step, 4),
        bound_ms=rounded(bound, 4),
        bound_fraction=rounded(bound / step if bound and step else None, 4),
        read_gbps=rounded(read_gbps, 1),
        matrices_gb=round(sizes.matrices / 1e9, 4),
        weights_gb=round(sizes.weights / 1e9, 4),
        kv_gb=round(sizes.cache / 1e9, 4),
        workspace_gb=round(sizes.workspace / 1e9, 4),
        peak_gb=rounded(None if peak_bytes is None else peak_bytes / 1e9, 4),
        kernels=kernels,
        launch=launch,
        launches=launches,
    )


def random_prompts(vocab: int, case: Case) -> list[list[int]]:
    """The prompts of a case, the same for every system."""
    prompts: list[list[int]] = np.random.default_rng(0).integers(0, vocab, (case.batch, case.prompt)).tolist()
    return prompts


def _bound_ms(config: ModelConfig, shard: Shard, weight_bytes: int, case: Case, read_gbps: float) -> float:
    context = case.batch * (case.prompt + case.output // 2 + 1)
    cached = context * config.layers * 2 * shard.kv_heads(config) * config.head_dim * 2
    return (weight_bytes + cached) / read_gbps * 1e-6


def _options(case: Case) -> list[SamplingOptions]:
    return [SamplingOptions(max_new_tokens=case.output)] * case.batch


def _replayed_ms(engine: Engine, case: Case) -> tuple[float, dict[Kind, float]]:
    """Milliseconds of one replay of a step in the middle of the output, and how much of it each kind of launch takes.

    Launches of one kind alone overlap each other more than they do in a step. The time that a step saves without them
    includes the time that other launches spend waiting for them. A kind's part is the mean of the two. Replays of the
    graphs alternate, because a GPU at its power limit changes its clock from one moment to the next.
    """
    from flashllm import graphs

    runtime: Any = engine.runtime
    launched = [kind for kind in KINDS if engine.decode_operations([kind])]
    step = frozenset(launched)
    alone: dict[Kind, frozenset[Kind]] = {kind: frozenset([kind]) for kind in launched}
    with runtime.active():
        captured = {
            kinds: graphs.capture(partial(run, engine.decode_operations(list(kinds))), runtime.stream)
            for kinds in dict.fromkeys([step, *alone.values(), *(step - one for one in alone.values())])
        }
        meeting = captured[alone["communication"]] if "communication" in alone else None
        times: dict[frozenset[Kind], list[float]] = {kinds: [] for kinds in captured}
        for _ in range(1 + _REPLAYS):
            for kinds, graph in captured.items():
                # A step advances the state: each replay has to begin where the others did.
                engine.state.positions.fill(case.prompt + case.output // 2)
                engine.state.counts.fill(case.output // 2)
                engine.state.finished.fill(0)
                # Ranks of a group drift apart where none waits for the others; timing begins once all have met.
                if meeting is not None:
                    meeting.launch(runtime.stream)
                times[kinds].append(graphs.replay_us(graph, runtime.stream, 1))
    found = {kinds: statistics.median(each[1:]) / 1e3 for kinds, each in times.items()}
    parts = {kind: (found[one] + found[step] - found[step - one]) / 2 for kind, one in alone.items()}
    return found[step], {kind: parts.get(kind, 0.0) for kind in KINDS}
