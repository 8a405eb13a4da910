# SPDX-License-Identifier: Apache-2.0
"""Launches that may overlap the previous one: the same bits as launches one after the other, whatever they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm import SparseWeight, plan, registry, spmm
from flashllm.backends import dependent
from flashllm.device import device_facts
from flashllm.errors import UnsupportedDeviceError
from products import assert_exact, exact, integers, packed, weight

CANARY = 512
"""Elements of guard on each side of an activation."""
STEPS, REPLAYS = 24, 12
MIXED = ("bitmap", "tiled-csl", "slot24")


@pytest.fixture(autouse=True)
def _dependent_launches(cp: Any) -> None:
    try:
        dependent.check(device_facts())
    except UnsupportedDeviceError as error:
        pytest.skip(str(error))


def layers(names: tuple[str, ...], sizes: tuple[int, ...], density: float = 0.3) -> list[SparseWeight]:
    """A ring of weights, each for the output of the previous one; outputs are about as large as inputs."""
    rng = np.random.default_rng(len(names) + sum(sizes))
    found = []
    for name, k, m in zip(names, sizes, (*sizes[1:], sizes[0]), strict=True):
        dense = rng.standard_normal((m, k)) / np.sqrt(density * k)
        dense[rng.random((m, k)) >= density] = 0
        found.append(packed(name, dense.astype(np.float16)).to_device())
    return found


def go_round(cp: Any, weights: list[SparseWeight], n: int, *, overlap: bool, graph: bool) -> list[NDArray[Any]]:
    """The activations, as bits, after many steps from weight to weight; all products share one workspace."""
    rng = np.random.default_rng(n)
    buffers = [cp.full(n * w.shape[1] + 2 * CANARY, 0x7E5A, np.uint16) for w in weights]
    x = [b[CANARY:-CANARY].view(np.float16).reshape(n, w.shape[1]) for b, w in zip(buffers, weights, strict=True)]
    start = cp.asarray(rng.standard_normal(x[0].shape).astype(np.float16))
    plans = [plan(w, n, expand=False) for w in weights]
    workspace = cp.zeros(max(16, *(p.workspace_bytes for p in plans)), np.uint8)
    scratch = cp.empty(max(16, *(p.scratch_bytes for p in plans)), np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()

    def steps() -> None:
        for step in range(STEPS * len(weights)):
            i, to = step % len(weights), (step + 1) % len(weights)
            memory = {"workspace": workspace, "scratch": scratch}
            spmm(x[i], weights[i], out=x[to], **memory, stream=stream, plan=plans[i], overlap_previous=overlap)

    if graph:
        for w, p in zip(weights, plans, strict=True):  # compiled and loaded before the capture
            spmm(cp.zeros((n, w.shape[1]), np.float16), w, plan=p, overlap_previous=overlap)
        cp.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            steps()
            captured = stream.end_capture()
    for _ in range(REPLAYS):
        with stream:
            cp.copyto(x[0], start)  # otherwise the activations would in time be all zero, or too large
        if graph:
            captured.launch(stream)
        else:
            steps()
    stream.synchronize()
    assert not workspace.any(), "the workspace must be zero after all calls"
    found = [b.get() for b in buffers]
    for bits in found:
        assert (bits[:CANARY] == 0x7E5A).all()
        assert (bits[-CANARY:] == 0x7E5A).all()
    return [bits[CANARY:-CANARY] for bits in found]


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("n", [1, 8, 16, 32, 64, 100])
@pytest.mark.parametrize("names", [*((name, name) for name in registry.FORMATS), MIXED], ids="-".join)
@pytest.mark.parametrize("sizes", [(640, 1152, 896), (333, 457, 201), (4096, 4096, 2048)], ids=str)
def test_a_ring_of_products_keeps_its_bits(
    cp: Any, sizes: tuple[int, ...], names: tuple[str, ...], n: int, graph: bool
) -> None:
    weights = layers(names, sizes[: len(names)])
    want = go_round(cp, weights, n, overlap=False, graph=False)
    got = go_round(cp, weights, n, overlap=True, graph=graph)
    for bits, wanted in zip(got, want, strict=True):
        assert np.isfinite(wanted.view(np.float16)).all()
        assert wanted.any(), "the test says nothing of zeros"
        np.testing.assert_array_equal(bits, wanted)


@pytest.mark.parametrize("name", registry.FORMATS)
def test_x_may_come_from_the_kernel_before(cp: Any, name: str) -> None:
    w = weight("uniform", (768, 1000), 0.2, "fp16")
    sparse, x_host = packed(name, w).to_device(), integers(np.random.default_rng(3), (16, 1000), "fp16")
    source, x = cp.asarray(x_host), cp.zeros((16, 1000), np.float16)
    chosen = plan(sparse, 16)
    memory = {
        "workspace": cp.zeros(max(16, chosen.workspace_bytes), np.uint8),
        "scratch": cp.empty(max(16, chosen.scratch_bytes), np.uint8),
    }
    outs = [cp.full((16, 768), cp.nan, np.float16) for _ in range(64)]
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for i, out in enumerate(outs):
            cp.multiply(source, np.float16(1 - i % 3), out=x)
            spmm(x, sparse, out=out, **memory, stream=stream, plan=chosen, overlap_previous=True)
    stream.synchronize()
    for i, out in enumerate(outs):
        assert_exact(out.get(), exact(x_host * np.float16(1 - i % 3), w, "fp16"))


def test_an_expanded_weight_overlaps_nothing_and_is_right(cp: Any) -> None:
    w = weight("uniform", (512, 256), 0.2, "fp16")
    sparse, x = packed("bitmap", w).to_device(), integers(np.random.default_rng(4), (80, 256), "fp16")
    got = spmm(cp.asarray(x), sparse, plan=plan(sparse, 80, expand=True), overlap_previous=True)
    assert_exact(got.get(), exact(x, w, "fp16"))
