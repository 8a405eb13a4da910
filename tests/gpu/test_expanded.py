# SPDX-License-Identifier: Apache-2.0
"""Products of weights that are expanded for cuBLAS: exact on integers, in the memory they request, in a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flashllm import SparseWeight, plan, registry, spmm
from flashllm.bench import results
from flashllm.bench.check import BASELINE_LIMIT, error_over_bound, make_reference
from flashllm.cli import bench
from flashllm.matmul import expand
from products import NUMPY_DTYPE, assert_exact, exact, integers, packed, weight

pytestmark = pytest.mark.gpu
every_format = pytest.mark.parametrize("name", registry.FORMATS)
SHAPES = ((300, 456), (129, 333), (1, 1), (128, 64), (1000, 777), (512, 4096))
TAIL = 4096
"""Bytes after a workspace that nothing may write."""


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path / "cache"))


def multiply(cp: Any, x: Any, w: SparseWeight) -> Any:
    """The product by way of the dense matrix, written over NaN, in a workspace that is just large enough."""
    dtype = NUMPY_DTYPE[w.dtype]
    bits = cp.asarray(np.ascontiguousarray(x).view(np.uint16))
    out = cp.full((x.shape[0], w.shape[0]), 0x7E5A, np.uint16)
    chosen = plan(w, x.shape[0], expand=True)
    buffer = cp.full(chosen.workspace_bytes + TAIL, 0xA5, np.uint8)
    halves = [a.view(np.float16) if w.dtype == "fp16" else a for a in (bits, out)]
    spmm(halves[0], w, out=halves[1], workspace=buffer[:-TAIL], plan=chosen)
    assert (buffer[-TAIL:] == 0xA5).all(), "written past the workspace"
    return out.get().view(dtype)


@every_format
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("n", [1, 16, 65, 100, 200])
def test_exact(cp: Any, n: int, dtype: str, name: str) -> None:
    rng = np.random.default_rng(n)
    for shape in SHAPES:
        w = weight("uniform", shape, 0.2, dtype, seed=n)
        x = integers(rng, (n, shape[1]), dtype)
        assert_exact(multiply(cp, x, packed(name, w).to_device()), exact(x, w, dtype))


@every_format
@pytest.mark.parametrize("pattern", ["full", "empty-tiles", "skewed"])
def test_exact_for_uneven_matrices(cp: Any, pattern: str, name: str) -> None:
    w = weight(pattern, (384, 520), 0.3, "fp16")
    x = integers(np.random.default_rng(1), (70, 520), "fp16")
    assert_exact(multiply(cp, x, packed(name, w).to_device()), exact(x, w, "fp16"))


@every_format
def test_a_plan_for_wide_x_expands_by_itself(cp: Any, name: str) -> None:
    w = weight("uniform", (4096, 2048), 0.1, "fp16")
    sparse = packed(name, w).to_device()
    x = integers(np.random.default_rng(2), (2048, 2048), "fp16")
    assert plan(sparse, 2048).expansion is not None
    got = spmm(cp.asarray(x), sparse)
    assert_exact(got.get(), exact(x, w, "fp16"))
    by_kernel = spmm(cp.asarray(x), sparse, plan=plan(sparse, 2048, expand=False))
    assert_exact(by_kernel.get(), exact(x, w, "fp16"))


@every_format
def test_captures_in_a_graph_without_allocating(cp: Any, name: str) -> None:
    w = weight("uniform", (512, 1024), 0.2, "fp16")
    sparse = packed(name, w).to_device()
    x_host = integers(np.random.default_rng(3), (96, 1024), "fp16")
    x, chosen = cp.asarray(x_host), plan(sparse, 96, expand=True)
    out = cp.zeros((96, 512), np.float16)
    workspace = cp.zeros(chosen.workspace_bytes, np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    spmm(x, sparse, out=out, workspace=workspace, stream=stream, plan=chosen)
    stream.synchronize()
    pool = cp.get_default_memory_pool()
    before = pool.total_bytes(), pool.used_bytes()
    with stream:
        stream.begin_capture()
        spmm(x, sparse, out=out, workspace=workspace, stream=stream, plan=chosen)
        graph = stream.end_capture()
    assert (pool.total_bytes(), pool.used_bytes()) == before
    out.fill(cp.nan)
    workspace.fill(0xFF)
    cp.cuda.Device().synchronize()
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert_exact(out.get(), exact(x_host, w, "fp16"))
    expand.release()


def test_two_streams_at_once_give_the_same_bits(cp: Any) -> None:
    rng = np.random.default_rng(4)
    w = rng.standard_normal((1024, 4096)).astype(np.float16)
    w[rng.random(w.shape) >= 0.2] = 0
    sparse = packed("bitmap", w).to_device()
    x = cp.asarray(rng.standard_normal((128, 4096)).astype(np.float16))
    chosen = plan(sparse, 128, expand=True)
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    workspaces = [cp.zeros(chosen.workspace_bytes, np.uint8) for _ in streams]
    outs = [cp.empty((128, 1024), np.float16) for _ in range(40)]
    cp.cuda.Device().synchronize()
    for i, out in enumerate(outs):
        spmm(x, sparse, out=out, workspace=workspaces[i % 2], stream=streams[i % 2], plan=chosen)
    cp.cuda.Device().synchronize()
    for out in outs:
        assert (out.view(np.uint16) == outs[0].view(np.uint16)).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_random_values_stay_within_the_bound_of_a_baseline(cp: Any, dtype: str) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((512, 8192)).astype(NUMPY_DTYPE[dtype])
    w[rng.random(w.shape) >= 0.2] = 0
    x = rng.standard_normal((128, 8192)).astype(NUMPY_DTYPE[dtype])
    got = multiply(cp, x, packed("bitmap", w).to_device())
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(512), dtype)
    assert error_over_bound(got.astype(np.float64), reference) <= BASELINE_LIMIT


@every_format
@pytest.mark.parametrize("columns", [1000, 1001])
def test_decoders_write_every_element_and_allocate_nothing(cp: Any, columns: int, name: str) -> None:
    """They write over NaN, at an address that is a multiple of 16 bytes and at one that is not."""
    w = packed(name, weight("uniform", (300, columns), 0.2, "fp16"))
    want = w.to_dense().view(np.uint16)
    device, decoder = w.to_device(), registry.encoder(name)
    assert decoder is not None
    for offset in (64, 65):
        buffer = cp.full(128 + want.size, 0x7E5A, np.uint16)
        out = buffer[offset : offset + want.size].view(np.float16).reshape(want.shape)
        pool = cp.get_default_memory_pool()
        before = pool.used_bytes()
        assert decoder.decode(device, out=out) is out
        assert pool.used_bytes() == before
        np.testing.assert_array_equal(out.view(np.uint16).get(), want)
        assert bool((buffer[:offset] == 0x7E5A).all())
        assert bool((buffer[offset + want.size :] == 0x7E5A).all())


def test_tuning_compares_the_expansion_with_the_kernels(cp: Any) -> None:
    from flashllm.matmul.tune import tune

    w = packed("bitmap", weight("uniform", (8192, 4096), 0.1, "fp16")).to_device()
    (result,) = tune(w, [2048])
    made = plan(w, 2048)
    assert made.source == "tuned"
    assert (made.expansion is None) == (result.plan.expansion is None)
    assert result.plan.expansion is not None, "32 passes over the weight against one dense product"


def test_bench_names_the_expansion(cp: Any) -> None:
    case = ("--shape", "4096x2048", "--sparsity", "0.9", "--n", "2048", "--time-cap", "0.02", "--json")
    result = CliRunner().invoke(bench.command, case)
    assert result.exit_code == 0, result.output
    rows = [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]
    (ours,) = [row for row in rows if row.system == "flashllm"]
    assert (ours.kernel, ours.check, ours.choice) == (expand.LABEL, "pass", "auto-format")
