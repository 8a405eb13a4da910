# SPDX-License-Identifier: Apache-2.0
"""Rows of decoding a whole model: their fields, and files of them (JSON Lines)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashllm.bench import flat_rows
from flashllm.bench.flat_rows import FlatRow, append

__all__ = ["SCHEMA", "DecodeRow", "append", "read"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class DecodeRow(FlatRow):
    """One measurement of prefill and decoding. ``None``: does not apply. Sizes are 10^9 bytes of one GPU."""

    schema: int
    kind: str
    """``e2e``."""
    run_id: str
    sweep_id: str
    time_utc: str
    commit: str | None
    dirty: bool | None
    command: str
    backend: str
    gpu: str | None
    arch: str | None
    sm_count: int | None
    driver: str | None
    cuda: str | None
    cupy: str | None
    cublas: str | None
    sm_mhz: int | None
    temp_c: int | None
    power_w: float | None
    model: str
    layers: int
    """Blocks that were run: fewer than the model's are a test."""
    dtype: str
    system: str
    """``flashllm``: sparse matrices; ``flashllm-dense``: the same engine with cuBLAS. ``torch-compile``, ``torch-2:4``
    and ``hf-static``: decoders of others, whose steps are not timed in parts."""
    format: str
    """Of the matrices, with commas where they differ; of others ``dense`` or ``2:4``."""
    choice: str
    """``auto``, or ``forced``."""
    sparsity: float
    """Fraction of zeros asked for; 0 where matrices are dense."""
    sparsity_real: float
    gpus: int
    tp: int
    batch: int
    prompt: int
    """Tokens of each prompt."""
    output: int
    """Tokens that each sequence gets."""
    seconds: float | None
    """From the prompts to the last token, prefill included."""
    tokens_per_s: float | None
    """batch * output / seconds."""
    tokens_per_gpu_s: float | None
    ttft_ms: float | None
    """To the first token of every sequence."""
    tpot_ms: float | None
    """Mean of the steps behind it."""
    linear_ms: float | None
    """Of a step in the middle of the output, by graphs of some of its launches: products with matrices, head too."""
    attention_ms: float | None
    comm_ms: float | None
    other_ms: float | None
    step_ms: float | None
    """The whole step there."""
    bound_ms: float | None
    """Reading all matrices, the head and the keys and values of that step at ``read_gbps``."""
    bound_fraction: float | None
    """``bound_ms / step_ms``."""
    read_gbps: float | None
    matrices_gb: float
    weights_gb: float
    """Matrices, embeddings, head, norms, biases."""
    kv_gb: float
    workspace_gb: float
    """Activations, logits, memory of products; of PyTorch all that its pool has, beside weights and cache."""
    peak_gb: float | None
    """All memory of the process on the GPU at the end, as the driver counts it, less what was used before."""
    kernels: str
    """What computes the matrices of a block, in the order of a pass; of others what computes a step."""
    launch: str | None
    """``graph-pdl`` where kernels may start before the one in front of them ends, else ``graph``; ``stream`` without
    a CUDA graph."""
    launches: int | None
    """Operations of a step, where it is known."""


def read(path: Path) -> list[DecodeRow]:
    """Rows of a file, as :func:`flashllm.bench.flat_rows.read` does."""
    return flat_rows.read(path, DecodeRow, schema=SCHEMA, kind="e2e")
