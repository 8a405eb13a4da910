# SPDX-License-Identifier: Apache-2.0
"""Measures the decoder in PyTorch: with dense matrices, or with 2:4 matrices that sparse tensor cores multiply."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from flashllm.bench import decode, telemetry
from flashllm.bench.decode import Case, Sizes, Times
from flashllm.bench.decode_memory import MemoryPlan, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_systems import LeftOut, Subject, free_pool, taken_since
from flashllm.bench.decode_torch import MODE, TorchDecoder, aligned_capacity, import_torch, prefill_rows, to_torch
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights
from flashllm.engine.engine import PREFILL_ROWS
from flashllm.engine.shard import WHOLE
from flashllm.engine.weights import Weights
from flashllm.errors import MissingDependencyError
from flashllm.formats.base import DType
from flashllm.models.config import ModelConfig
from flashllm.progress import Advance

_WARM_STEPS = 5  # the first ones compile, run and record the graph
_COPIES = 2
"""Multiple of what our engine takes for activations: operations that are not compiled make new tensors."""
_POOL_BYTES = 1 << 30
"""PyTorch's libraries, workspaces of its products, and unusable remainders of blocks in its pool."""
_DENSE_FORMATS = dict.fromkeys(PARTS, DENSE)


class TorchSystem:
    """Implements :class:`flashllm.bench.decode_systems.System` with :class:`~flashllm.bench.decode_torch.TorchDecoder`.

    ``pruned``: matrices of blocks keep the two largest of every four values and are packed by
    ``to_sparse_semi_structured``; PyTorch's own products for such matrices multiply them, with its default algorithm.
    """

    def __init__(self, subject: Subject, *, pruned: bool) -> None:
        """Raises ``MissingDependencyError`` without PyTorch, or where it sees no GPU."""
        self._torch = torch_on_gpu()
        self.label = "torch-2:4" if pruned else "torch-compile"
        self._subject, self._pruned = subject, pruned
        self._weights: Weights | None = None
        self._matrix_bytes = self._free = 0

    def plan(self, case: Case) -> MemoryPlan:
        """As :class:`System` says."""
        plan = torch_plan(self._subject.config, case, rows=prefill_rows(case.batch, case.prompt))
        if not self._pruned:
            return plan
        # Half of the values, and 2 bits for the position of each. While a block is made, it is there twice, dense.
        making = 2 * plan.matrices // self._subject.config.layers
        return replace(plan, matrices=plan.matrices * 9 // 16, making=making)

    def load(self, advance: Advance) -> None:
        """As :class:`System` says."""
        from flashllm.device import free_memory

        subject, self._free = self._subject, free_memory()
        if self._pruned:
            if subject.dtype != "fp16":
                raise LeftOut("2:4 matrices are made of fp16 alone")
            with leaving_out():
                self._weights = two_of_four_weights(subject.config, subject.dtype, advance)
            packed = [w for block in self._weights.blocks for w in block.matrices]
            self._matrix_bytes = sum(int(one.nbytes) for w in packed for one in (w.packed, w.meta) if one is not None)
            return
        import cupy

        made = random_weights(
            subject.config, _DENSE_FORMATS, sparsity=0.0, xp=cupy, dtype=subject.dtype, advance=advance
        )
        self._weights, self._matrix_bytes = to_torch(made), made.matrix_bytes

    def row(self, case: Case) -> DecodeRow:
        """As :class:`System` says."""
        assert self._weights is not None
        try:
            with leaving_out():
                return self._measured(self._weights, case)
        finally:
            self._forget()

    def close(self) -> None:
        """As :class:`System` says."""
        self._weights = None
        self._forget()
        free_pool()

    def _measured(self, weights: Weights, case: Case) -> DecodeRow:
        torch, skipped = self._torch, skipped_graphs()
        decoder = TorchDecoder(weights, batch=case.batch, capacity=case.capacity)
        prompts = decode.random_prompts(weights.config.vocab, case)
        decoder.start(prompts)
        for _ in range(min(_WARM_STEPS, case.output - 1)):
            decoder.step()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        decoder.start(prompts)
        torch.cuda.synchronize()
        first = time.perf_counter()
        for _ in range(case.output - 1):
            decoder.step()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        backend = f", {type(weights.blocks[0].qkv).__name__}" if self._pruned else ""
        others = weights.nbytes - weights.matrix_bytes  # for packed matrices PyTorch reports their dense size
        return row_of_torch(
            self._subject,
            case,
            Sizes(
                matrices=self._matrix_bytes,
                head=int(weights.head.nbytes),
                weights=self._matrix_bytes + others,
                cache=decoder.cache_bytes,
                workspace=torch.cuda.memory_reserved()
                - decoder.cache_bytes
                - (self._matrix_bytes if self._pruned else 0),  # dense ones are in CuPy's pool
            ),
            Times(total=(ended - begun) * 1e3, first=(first - begun) * 1e3),
            system=self.label,
            format="2:4" if self._pruned else DENSE,
            kernels=f"torch {torch.__version__}, torch.compile {MODE}{backend}",
            captured=skipped_graphs() == skipped,
            peak_bytes=taken_since(self._free),
        )

    def _forget(self) -> None:
        """Drop compiled steps, whose graphs hold memory, and return memory that is no longer used to the driver."""
        self._torch.compiler.reset()
        gc.collect()
        self._torch.cuda.empty_cache()


def torch_on_gpu() -> Any:
    """PyTorch. Raises ``MissingDependencyError`` without it, or where it sees no GPU."""
    torch = import_torch()
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"PyTorch {torch.__version__} sees no GPU; install a build for CUDA")
    return torch


def torch_plan(config: ModelConfig, case: Case, *, rows: int) -> MemoryPlan:
    """The memory of a dense decoder in PyTorch that reads ``rows`` prompt tokens at a time."""
    plan = plan_memory(
        config,
        _DENSE_FORMATS,
        sparsity=0.0,
        batch=case.batch,
        prompt=case.prompt,
        output=aligned_capacity(case.capacity) - case.prompt,
        shard=WHOLE,
    )
    ours = max(case.batch, min(PREFILL_ROWS, case.batch * case.prompt))
    activations = _COPIES * plan.activations * max(1.0, rows / ours)
    return replace(plan, activations=int(activations), workspace=plan.workspace + _POOL_BYTES)


def two_of_four_weights(config: ModelConfig, dtype: DType, advance: Advance) -> Weights:
    """Random weights as tensors, the matrices of blocks pruned and packed; only one block is dense at a time.

    Raises ``RuntimeError`` where PyTorch cannot pack them.
    """
    import cupy

    from flashllm.baselines.pattern_24 import keep_two_of_four

    make = partial(random_weights, formats=_DENSE_FORMATS, sparsity=0.0, xp=cupy, dtype=dtype)
    pack = import_torch().sparse.to_sparse_semi_structured
    bare = replace(config, vocab=1, positions=1, layers=1)
    blocks = []
    for layer in range(config.layers):
        block = make(bare, seed=layer * len(PARTS)).blocks[0]
        block = replace(block, **{part: keep_two_of_four(getattr(block, part)) for part in PARTS})
        found = to_torch(Weights(config=bare, dtype=dtype, blocks=(block,), embedding=None, head=None, norm=None))
        blocks.append(replace(found.blocks[0], **{part: pack(getattr(found.blocks[0], part)) for part in PARTS}))
        del block, found
        free_pool()
        advance(f"block {layer}", 1)
    outside = to_torch(make(replace(config, layers=0)))
    return replace(outside, config=config, blocks=tuple(blocks))


def row_of_torch(
    subject: Subject,
    case: Case,
    sizes: Sizes,
    times: Times,
    *,
    system: str,
    format: str,
    kernels: str,
    captured: bool,
    peak_bytes: int,
) -> DecodeRow:
    """The row of a case that PyTorch has decoded; ``captured``: every step was a CUDA graph."""
    return decode.fill_row(
        subject.facts,
        case,
        sizes,
        model=subject.model,
        config=subject.config,
        dtype=subject.dtype,
        shard=WHOLE,
        system=decode.SYSTEMS[system],
        format=format,
        choice="forced",
        sparsity=0.0 if format == DENSE else 0.5,
        sparsity_real=0.0 if format == DENSE else 0.5,
        kernels=kernels,
        launch="graph" if captured else "stream",
        times=times,
        read_gbps=subject.read_gbps,
        reading=telemetry.read(),
        peak_bytes=peak_bytes,
    )


def skipped_graphs() -> int:
    """How often ``torch.compile`` has found that it cannot make a CUDA graph."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


@contextmanager
def leaving_out() -> Iterator[None]:
    """Turns errors of PyTorch into :class:`LeftOut`, with their first line."""
    try:
        yield
    except RuntimeError as error:  # also what torch.compile, kernels and PyTorch's memory pool raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LeftOut(f"{type(error).__name__}: {lines[0].strip() if lines else 'no more is said'}") from error
