# SPDX-License-Identifier: Apache-2.0
"""Result rows of decoding a whole model: their fields, and files of them (JSON Lines)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashllm.bench import flat_rows
from flashllm.bench.flat_rows import FlatRow, append

__all__ = ["SCHEMA", "DecodeRow", "append", "read"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class DecodeRow(FlatRow):
    """One measurement of prefill and decoding. ``None``: does not apply. Sizes are in 10^9 bytes on one GPU."""

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
    """Number of blocks that were run; a run of fewer than the model has is a test."""
    dtype: str
    system: str
    """``flashllm``: sparse matrices; ``flashllm-dense``: the same engine with cuBLAS. ``torch-compile``, ``torch-2:4``
    and ``hf-static``: other decoders, whose steps are not timed in parts."""
    format: str
    """Formats of the matrices, comma-separated where they differ; ``dense`` or ``2:4`` for the other decoders."""
    choice: str
    """``auto``, or ``forced``."""
    sparsity: float
    """Requested fraction of zeros; 0 where matrices are dense."""
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
    """Time to the first token of every sequence."""
    tpot_ms: float | None
    """Mean time of the steps after it."""
    linear_ms: float | None
    """Products with matrices, including the head, in a step in the middle of the output. This and the next three are
    measured with graphs of some of the step's launches."""
    attention_ms: float | None
    comm_ms: float | None
    other_ms: float | None
    step_ms: float | None
    """That whole step."""
    bound_ms: float | None
    """Time to read all matrices, the head and the keys and values of that step at ``read_gbps``."""
    bound_fraction: float | None
    """``bound_ms / step_ms``."""
    read_gbps: float | None
    matrices_gb: float
    weights_gb: float
    """Matrices, embeddings, head, norms, biases."""
    kv_gb: float
    workspace_gb: float
    """Activations, logits, workspaces of products; for PyTorch everything in its pool except weights and cache."""
    peak_gb: float | None
    """All memory of the process on the GPU at the end, as the driver counts it, minus what was in use before."""
    kernels: str
    """What multiplies the matrices of a block, in the order of a pass; for the other decoders, what computes a step."""
    launch: str | None
    """``graph-pdl`` where kernels may start before the preceding one ends, else ``graph``; ``stream`` without a CUDA
    graph."""
    launches: int | None
    """Number of operations in a step, where it is known."""


def read(path: Path) -> list[DecodeRow]:
    """Rows of a file, read as by :func:`flashllm.bench.flat_rows.read`."""
    return flat_rows.read(path, DecodeRow, schema=SCHEMA, kind="e2e")
