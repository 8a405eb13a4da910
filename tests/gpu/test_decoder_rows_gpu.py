# SPDX-License-Identifier: Apache-2.0
"""The row-wise kernels of a decoder on a GPU: the cases of the emulator, and all in a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder_cases import CASES, Machine
from flashllm.backends import cuda, dependent
from flashllm.decoder import activate, append, embed, norm
from flashllm.device import device_facts
from flashllm.errors import UnsupportedDeviceError
from flashllm.graphs import capture
from flashllm.jit.spec import KernelSpec

REPLAYS = 4


@pytest.mark.sanitize
@pytest.mark.parametrize("name", CASES)
def test_against_float64(cp: Any, name: str) -> None:
    def start(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any], dependent: Sequence[Any]) -> None:
        cuda.launch(spec, grid, args)

    CASES[name](Machine(cp, start))


class Chain:
    """Every kind of kernel, each on the result of the previous one, in the chain's own buffers."""

    def __init__(self, cp: Any, *, rows: int, hidden: int) -> None:
        rng = np.random.default_rng(hidden)

        def halves(*shape: int) -> Any:
            return cp.asarray(rng.standard_normal(shape).astype(np.float16))

        self.tokens, self.positions = cp.zeros(rows, np.int32), cp.zeros(rows, np.int32)
        self._slots = cp.arange(rows, dtype=np.int32)
        self._table, self._weight, self._bias, self._qkv_bias = (halves(*s) for s in ((9, hidden), *[(hidden,)] * 3))
        self._head_norm, self._gate_bias = halves(64), halves(hidden // 2)
        self._turns = cp.asarray(rng.standard_normal((8, 32, 2)).astype(np.float32))
        heads = hidden // 128  # of q; as many of k and of v together
        self._residual = cp.zeros((rows, hidden), np.float32)
        self._x = halves(rows, hidden)
        self._q, self._keys, self._values = halves(rows, heads, 64), *(halves(rows, heads // 2, 8, 64) for _ in "kv")
        self._gated = halves(rows, hidden // 4)

    def run(self, launch: Any) -> None:
        half = {"launch": launch, "dtype": "fp16"}
        embed.embed(
            **half, tokens=self.tokens, positions=self.positions, table=self._table, residual=self._residual,
            position_table=self._table[:8],
        )  # fmt: skip
        for kind in norm.KINDS:
            norm.add_norm(
                **half, kind=kind, residual=self._residual, x=self._x, weight=self._weight, eps=1e-5, bias=self._bias,
                y=self._x[None] if kind == "layer" else None,
            )  # fmt: skip
        append.append(
            **half, qkv=self._x, slots=self._slots, positions=self.positions, q=self._q, keys=self._keys,
            values=self._values, bias=self._qkv_bias, rotation=self._turns, q_norm=self._head_norm,
            k_norm=self._head_norm,
        )  # fmt: skip
        flat = self._q.reshape(len(self.tokens), -1)
        activate.relu(**half, y=flat, x=flat, bias=self._gate_bias)
        activate.silu_mul(**half, y=flat, x=self._gated)

    def results(self) -> list[NDArray[Any]]:
        return [a.get() for a in (self._residual, self._x, self._q, self._keys, self._values, self._gated)]


@pytest.mark.parametrize("overlap", [False, True], ids=["ordinary", "overlapping"])
@pytest.mark.parametrize("hidden", [256, 4096, 12288])
def test_one_graph_serves_every_step(cp: Any, hidden: int, overlap: bool) -> None:
    """The same bits as launches one by one, for tokens and positions that change between replays."""
    if overlap:
        try:
            dependent.check(device_facts())
        except UnsupportedDeviceError as error:
            pytest.skip(str(error))
    captured, plain = (Chain(cp, rows=5, hidden=hidden) for _ in range(2))
    stream = cp.cuda.Stream(non_blocking=True)
    plain.run(cuda.launch)  # compiled and loaded before the capture
    captured.run(cuda.launch)
    cp.cuda.Device().synchronize()
    launch = partial(cuda.launch, stream=stream, overlap_previous=overlap)
    graph = capture(lambda: captured.run(launch), stream)
    for step in range(REPLAYS):
        for chain in (captured, plain):
            chain.tokens[:] = (cp.arange(5) + 3 * step) % 9
            chain.positions[:] = (cp.arange(5) + step) % 8
        plain.run(cuda.launch)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for got, want in zip(captured.results(), plain.results(), strict=True):
            np.testing.assert_array_equal(got, want)
