# SPDX-License-Identifier: Apache-2.0
"""``spmm`` on a GPU, with every format: exact on integers, within the bound on random values, safe at its edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import ArgumentError, SparseWeight, TiledCSL, plan, registry, spmm
from flashllm.bench.check import error_over_bound, make_reference
from flashllm.device import device_facts
from flashllm.matmul.kernel import KernelChoice
from products import (
    NUMPY_DTYPE,
    assert_exact,
    assert_special,
    choice_of,
    exact,
    integers,
    packed,
    packed_for,
    special,
    weight,
)
from weight_cases import PATTERNS

N_VALUES = (1, 5, 7, 8, 12, 16, 17, 24, 32, 48, 64, 96, 100, 128, 200)
SHAPES = ((1, 1), (7, 9), (127, 65), (128, 64), (129, 63), (130, 520), (256, 1000), (384, 2048), (1000, 777))
every_format = pytest.mark.parametrize("name", registry.FORMATS)
SPECS = tuple(dict.fromkeys(spec for name in registry.FORMATS for spec in registry.kernel(name).specs()))
ENCODINGS = [(name, encoding) for name in registry.FORMATS for encoding in registry.weight_class(name).ENCODINGS]
CANARY = 512
"""Elements of guard on each side of an output."""


class Fenced:
    """An output [N, M] full of NaN between two canaries, as bits."""

    def __init__(self, cp: Any, n: int, m: int) -> None:
        self.buffer = cp.full(n * m + 2 * CANARY, 0x7E5A, np.uint16)
        self.bits = self.buffer[CANARY : CANARY + n * m].reshape(n, m)

    def read(self, dtype: str) -> NDArray[Any]:
        host = self.buffer.get()
        assert (host[:CANARY] == 0x7E5A).all(), "written before the output"
        assert (host[-CANARY:] == 0x7E5A).all(), "written past the output"
        return host[CANARY:-CANARY].reshape(self.bits.shape).view(NUMPY_DTYPE[dtype])


def multiply(
    cp: Any, x: NDArray[Any], w: SparseWeight, choice: KernelChoice | None = None, **split: int
) -> NDArray[Any]:
    """The product, in a poisoned and fenced output; ``split`` replaces fields of the plan's split."""
    fenced = Fenced(cp, x.shape[0], w.shape[0])
    x_bits = cp.asarray(np.ascontiguousarray(x).view(np.uint16))
    out = fenced.bits.view(np.float16) if w.dtype == "fp16" else fenced.bits
    x_device = x_bits.view(np.float16) if w.dtype == "fp16" else x_bits
    chosen = plan(w, x.shape[0], choice=choice)
    chosen = replace(chosen, split=replace(chosen.split, **split)) if split else chosen
    workspace = cp.zeros(max(chosen.workspace_bytes, 16), np.uint8)
    scratch = cp.full(chosen.scratch_bytes + 2 * CANARY, 0xA5, np.uint8)
    for _ in range(2):  # the second call finds the workspace as the first left it
        fenced.buffer[CANARY:-CANARY] = 0x7E5A
        scratch[CANARY:-CANARY] = 0xFF
        spmm(x_device, w, out=out, workspace=workspace, scratch=scratch[CANARY:-CANARY], plan=chosen)
        assert not workspace.any(), "the workspace must be zero after a call"
        for beside in (scratch[:CANARY], scratch[-CANARY:]):
            assert (beside == 0xA5).all(), "written beside the scratch"
    return fenced.read(w.dtype)


@every_format
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("n", N_VALUES)
def test_exact_for_every_n(cp: Any, n: int, dtype: str, name: str) -> None:
    rng = np.random.default_rng(n)
    for shape, density in (((300, 456), 0.2), ((129, 333), 0.3), ((512, 1024), 0.1)):
        w = weight("uniform", shape, density, dtype, seed=n)
        x = integers(rng, (n, shape[1]), dtype)
        assert_exact(multiply(cp, x, packed(name, w).to_device()), exact(x, w, dtype))


@every_format
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_for_odd_shapes(cp: Any, shape: tuple[int, int], name: str) -> None:
    rng = np.random.default_rng(1)
    for n in (1, 16, 33, 65):
        w = weight("uniform", shape, 0.25, "fp16")
        x = integers(rng, (n, shape[1]), "fp16")
        assert_exact(multiply(cp, x, packed(name, w).to_device()), exact(x, w, "fp16"))


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "encoding"), ENCODINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_for_every_pattern(cp: Any, pattern: str, name: str, encoding: str) -> None:
    options = registry.weight_class(name).ENCODINGS[encoding]
    rng = np.random.default_rng(2)
    for n, density in ((8, 0.1), (16, 0.3), (64, 0.5)):
        w = weight(pattern, (384, 456), density, "fp16", seed=n)
        x = integers(rng, (n, 456), "fp16")
        assert_exact(multiply(cp, x, packed(name, w, **options).to_device()), exact(x, w, "fp16"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_exact_for_every_instance(cp: Any, spec: Any) -> None:
    """Each compiled instance, at densities below, at and above what the registers of the Tiled-CSL kernel hold."""
    facts = device_facts()
    if not spec.supports(facts.arch):
        pytest.skip(f"no path for {facts.arch} on this gpu")
    choice = choice_of(spec)
    shape = (400, 1032) if choice.aligned else (400, 1031)
    masks = (("uniform", 0.02), ("uniform", 0.15), ("skewed", 0.3), ("full", 1.0), ("empty-tiles", 0.9))
    for pattern, density in masks:
        w = weight(pattern, shape, density, choice.dtype)
        x = integers(np.random.default_rng(3), (choice.n_block - 1, shape[1]), choice.dtype)
        w, sparse = packed_for(spec, w)
        assert_exact(multiply(cp, x, sparse.to_device(), choice), exact(x, w, choice.dtype))


@every_format
@pytest.mark.parametrize("blocks_per_sm", [1, 2, 3, 6])
def test_exact_for_every_split(cp: Any, blocks_per_sm: int, name: str) -> None:
    """Rows of tiles shared by many blocks, by two, and blocks that span many rows."""
    rng = np.random.default_rng(4)
    for shape in ((128, 64 * 700), (128 * 90, 64), (128 * 30, 64 * 30), (128 * 200, 192)):
        w = weight("uniform", shape, 0.1, "fp16")
        sparse = packed(name, w).to_device()
        x = integers(rng, (9, shape[1]), "fp16")
        base = registry.kernel(name).default_choice(sparse, 9, arch=device_facts().arch)
        forced = replace(base, blocks_per_sm=blocks_per_sm)
        assert_exact(multiply(cp, x, sparse, forced), exact(x, w, "fp16"))


@every_format
@pytest.mark.parametrize("n", [8, 12, 32, 64])
def test_exact_where_ends_of_rows_are_weighed(cp: Any, n: int, name: str) -> None:
    shape = (128 * 41, 64 * 160)  # long runs that no number of blocks cuts at the ends of rows
    w = weight("uniform", shape, 0.05, "fp16")
    sparse = packed(name, w).to_device()
    x = integers(np.random.default_rng(14), (n, shape[1]), "fp16")
    assert plan(sparse, n).split.row_cost > 0
    assert_exact(multiply(cp, x, sparse), exact(x, w, "fp16"))


@every_format
@pytest.mark.parametrize("n", [9, 33, 64])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_exact_for_few_blocks(cp: Any, blocks: int, n: int, name: str) -> None:
    """Blocks that compute rows alone, in several chains of accumulation, before and between shared rows."""
    rng = np.random.default_rng(12)
    shape = (128 * 4, 64 * 410)
    w = weight("uniform", shape, 0.01, "fp16")
    sparse = packed(name, w).to_device()
    chosen = plan(sparse, n)
    assert chosen.split.max_chain <= 410 // 2
    chosen = replace(chosen, split=replace(chosen.split, blocks=blocks, row_cost=0))
    x = integers(rng, (n, shape[1]), "fp16")
    workspace = cp.zeros(chosen.workspace_bytes, np.uint8)
    out = spmm(cp.asarray(x), sparse, workspace=workspace, plan=chosen)
    assert_exact(out.get(), exact(x, w, "fp16"))


@every_format
def test_drift_of_long_sums_stays_within_the_bound(cp: Any, name: str) -> None:
    """One block, the K of OPT-175B, few nonzeros: the longest chains, and the least slack in the bound."""
    rng = np.random.default_rng(13)
    w = rng.standard_normal((1024, 12288)).astype(np.float16)
    w[rng.random(w.shape) >= 0.1] = 0
    sparse = packed(name, w).to_device()
    x = rng.standard_normal((64, w.shape[1])).astype(np.float16)
    chosen = plan(sparse, 64)
    chosen = replace(chosen, split=replace(chosen.split, blocks=1, row_cost=0))
    workspace = cp.zeros(chosen.workspace_bytes, np.uint8)
    got = spmm(cp.asarray(x), sparse, workspace=workspace, plan=chosen).get()
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(1024), "fp16")
    assert error_over_bound(got.astype(np.float64), reference) <= 1.0


@every_format
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_random_values_stay_within_the_bound(cp: Any, n: int, dtype: str, name: str) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((1024, 8192)).astype(NUMPY_DTYPE[dtype])
    w[rng.random(w.shape) >= 0.2] = 0
    x = rng.standard_normal((n, 8192)).astype(NUMPY_DTYPE[dtype])
    got = multiply(cp, x, packed(name, w).to_device())
    reference = make_reference(x.astype(np.float64), w.astype(np.float64), np.arange(1024), dtype)
    assert error_over_bound(got.astype(np.float64), reference) <= 1.0


@every_format
def test_overflow_rounds_to_infinity(cp: Any, name: str) -> None:
    w = np.full((128, 64), 60000, np.float16)
    x = np.ones((1, 64), np.float16)
    assert np.isposinf(multiply(cp, x, packed(name, w).to_device())).all()


@every_format
def test_nan_and_infinity_multiply_as_in_dense_arithmetic(cp: Any, name: str) -> None:
    """Except for zeros of W that the format leaves out: see ``SparseWeight.MULTIPLIES_ZEROS``."""
    w, x = special(weight("uniform", (256, 328), 0.25, "fp16"), 40)
    for n in (8, 40):
        assert_special(name, multiply(cp, x[:n], packed(name, w).to_device()), x[:n], w)


@every_format
def test_hundred_runs_and_two_streams_give_the_same_bits(cp: Any, name: str) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((2048, 4096)).astype(np.float16)
    w[rng.random(w.shape) >= 0.3] = 0
    sparse = packed(name, w).to_device()
    x = cp.asarray(rng.standard_normal((16, 4096)).astype(np.float16))
    first = spmm(x, sparse)
    chosen = plan(sparse, 16)
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    workspaces = [cp.zeros(chosen.workspace_bytes, np.uint8) for _ in streams]
    scratches = [cp.empty(chosen.scratch_bytes, np.uint8) for _ in streams]
    outs = [cp.empty_like(first) for _ in range(100)]
    cp.cuda.Device().synchronize()
    for i, out in enumerate(outs):
        memory = {"workspace": workspaces[i % 2], "scratch": scratches[i % 2]}
        spmm(x, sparse, out=out, **memory, stream=streams[i % 2], plan=chosen)
    cp.cuda.Device().synchronize()
    for out in outs:
        assert (out.view(np.uint16) == first.view(np.uint16)).all()


@every_format
def test_captures_in_a_graph_without_allocating(cp: Any, name: str) -> None:
    w = weight("uniform", (512, 512), 0.2, "fp16")
    sparse = packed(name, w).to_device()
    x_host = integers(np.random.default_rng(8), (16, 512), "fp16")
    x, chosen = cp.asarray(x_host), plan(sparse, 16)
    out = cp.zeros((16, 512), np.float16)
    workspace = cp.zeros(max(chosen.workspace_bytes, 16), np.uint8)
    scratch = cp.empty(max(chosen.scratch_bytes, 16), np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)
    spmm(x, sparse, out=out, workspace=workspace, scratch=scratch, plan=chosen)
    cp.cuda.Device().synchronize()
    pool = cp.get_default_memory_pool()
    before = pool.total_bytes(), pool.used_bytes()
    with stream:
        stream.begin_capture()
        spmm(x, sparse, out=out, workspace=workspace, scratch=scratch, stream=stream, plan=chosen)
        graph = stream.end_capture()
    assert (pool.total_bytes(), pool.used_bytes()) == before
    out.fill(cp.nan)
    cp.cuda.Device().synchronize()
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert_exact(out.get(), exact(x_host, w, "fp16"))


@every_format
def test_takes_dlpack_input(cp: Any, name: str) -> None:
    torch = pytest.importorskip("torch")
    w = weight("uniform", (256, 320), 0.2, "fp16")
    x = integers(np.random.default_rng(9), (4, 320), "fp16")
    got = spmm(torch.from_numpy(x).cuda(), packed(name, w).to_device())
    assert_exact(got.get(), exact(x, w, "fp16"))


@every_format
def test_more_than_2_to_the_31_elements(cp: Any, name: str) -> None:
    rows, columns = 65536, 33024
    assert rows * columns > 2**31
    if cp.cuda.runtime.memGetInfo()[0] < 8 << 30:
        pytest.skip("needs 8 GiB on the gpu")
    dense = cp.zeros((rows, columns), np.float16)
    rng = np.random.default_rng(10)
    r = cp.asarray(rng.integers(0, rows, 200_000))
    c = cp.asarray(rng.integers(0, columns, 200_000))
    dense[r, c] = 1
    dense[rows - 1, columns - 1] = 2
    sparse = packed(name, dense)
    x = cp.asarray(rng.integers(-4, 5, (8, columns)).astype(np.float16))
    got = spmm(x, sparse)
    for first in range(0, rows, 8192):
        part = dense[first : first + 8192].astype(np.float32) @ x.astype(np.float32).T
        assert (got[:, first : first + 8192] == part.T.astype(np.float16)).all()


def test_bad_operands_are_named(cp: Any) -> None:
    host = TiledCSL.from_dense(weight("uniform", (256, 512), 0.2, "fp16"))
    w = host.to_device()  # 8 tiles in a row: several blocks share it, and need a workspace
    x = cp.ones((16, 512), np.float16)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("x", {"x": cp.ones((16, 511), np.float16)}),
        ("x", {"x": cp.ones((16, 512), np.float32)}),
        ("x", {"x": cp.ones(512, np.float16)}),
        ("x", {"x": cp.ones((512, 16), np.float16).T}),
        ("x", {"x": cp.ones(16 * 512 + 1, np.float16)[1:].reshape(16, 512)}),
        ("x", {"x": np.ones((16, 512), np.float16)}),
        ("out", {"out": cp.ones((16, 255), np.float16)}),
        ("out", {"out": cp.ones((16, 256), np.float32)}),
        ("out", {"out": cp.ones((256, 16), np.float16).T}),
        ("out", {"out": cp.ones(16 * 256 + 1, np.float16)[1:].reshape(16, 256)}),
        ("workspace", {"workspace": cp.zeros(8, np.uint8)}),
        ("w", {"w": host}),
        ("plan", {"plan": plan(w, 8)}),
        ("backend", {"backend": "tpu"}),
    ]
    for name, change in bad:
        arguments: dict[str, Any] = {"x": x, "w": w, "backend": "cuda", **change}
        with pytest.raises(ArgumentError, match="expected") as caught:
            spmm(arguments.pop("x"), arguments.pop("w"), **arguments)
        assert caught.value.argument == name


def test_bf16_arrays_and_their_bits_agree(cp: Any) -> None:
    w = TiledCSL.from_dense(weight("uniform", (256, 128), 0.2, "bf16")).to_device()
    x = integers(np.random.default_rng(11), (8, 128), "bf16")
    bits = spmm(cp.asarray(x.view(np.uint16)), w)
    assert bits.dtype == np.uint16
    assert_exact(bits.get().view(ml_dtypes.bfloat16), exact(x, w.to_host().to_dense(), "bf16"))


@every_format
def test_tune_stores_what_plan_then_takes(cp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from flashllm.matmul.tune import tune

    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w = packed(name, weight("uniform", (512, 1024), 0.1, "fp16")).to_device()
    assert plan(w, 16).source == "auto"
    (result,) = tune(w, [16])
    assert result.measured > 1
    assert result.median_us <= result.heuristic_us
    tuned = plan(w, 16)
    assert tuned.source == "tuned"
    assert tuned.choice == result.plan.choice
