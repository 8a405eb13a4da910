# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a group do in tests on GPUs: ``python rank_cases.py CASE [ARGUMENTS]`` is one rank."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine_cases
from flashllm import graphs
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.engine import Engine
from flashllm.engine.parallel import PEER_FAILED, Group, open_group
from flashllm.engine.runtime import GpuRuntime
from flashllm.formats.bits import bfloat16

SIZES = (1, 7, 4096, 100_003)
REPLAYS = 3
_FENCE = 8
_NAN = 0x7FFF  # in fp16 and bf16


def check_sums(communicator: Any, *, rank: int, count: int) -> None:
    """Sums of small integers are exact, one by one and in a graph that is replayed while its input changes."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    for size, kind in ((size, kind) for size in SIZES for kind in (np.float16, np.uint16)):
        with stream:
            given = cupy.zeros(size, kind)
            fenced = cupy.full(size + 2 * _FENCE, _NAN, np.uint16)
            summed = fenced[_FENCE:-_FENCE].view(kind)

            def add(given: Any = given, summed: Any = summed) -> None:
                summed[...] = given
                communicator.all_reduce(summed)

            add()
            graph = graphs.capture(add, stream)
            for step in range(REPLAYS):
                given.set(_values(rank, step, size, kind), stream=stream)
                graph.launch(stream)
                found = fenced.get(stream=stream)
                stream.synchronize()
                exact = sum(_wide(_values(one, step, size, kind)) for one in range(count))
                np.testing.assert_array_equal(_wide(found[_FENCE:-_FENCE].view(kind)), exact)
                np.testing.assert_array_equal(np.r_[found[:_FENCE], found[-_FENCE:]], np.uint16(_NAN))
            del graph  # before its communicator


def _values(rank: int, step: int, size: int, kind: Any) -> NDArray[Any]:
    numbers = (np.arange(size) + 3 * rank + step) % 17 - 8
    return numbers.astype(np.float16) if kind == np.float16 else numbers.astype(bfloat16()).view(kind)


def _wide(array: NDArray[Any]) -> NDArray[np.float32]:
    return (array.view(bfloat16()) if array.dtype == np.uint16 else array).astype(np.float32)


def sums(group: Group) -> None:
    """As :func:`check_sums` says."""
    check_sums(group.communicator, rank=group.rank, count=group.count)


def engine(group: Group, folder: str, kind: str, dtype: Any, format: str) -> None:
    """A model in parts computes what the whole one does, on every rank. ``format`` may be "dense"."""
    import cupy

    folder = f"{folder}/rank{group.rank}"
    model = engine_cases.make_model(Path(folder), kind, dtype, **engine_cases.DIVISIBLE[kind])
    weights = model.load(cupy, None if format == "dense" else format, shard=group.shard)
    prompts = engine_cases.random_prompts()
    made = Engine(
        weights,
        GpuRuntime(),
        batch=len(prompts),
        capacity=engine_cases.CAPACITY,
        prefill_rows=engine_cases.PREFILL_ROWS,
        communicator=group.communicator,
    )
    engine_cases.check(made, model, prompts, engine_cases.greedy())
    tokens = group.rendezvous.gather(made.tokens())
    assert tokens is None or all(one == tokens[0] for one in tokens)


def killed(group: Group) -> None:
    """The last rank is killed while all replay a graph of sums as fast as they can. Rank 0 says when."""
    import cupy

    assert group.communicator is not None
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.zeros(2**20, np.float16)
        group.communicator.all_reduce(array)
        communicator = group.communicator

        def add() -> None:
            communicator.all_reduce(array)

        graph = graphs.capture(add, stream)
        group.rendezvous.barrier()
        print("replaying", flush=True)
        if group.rank == group.count - 1:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            graph.launch(stream)
            stream.synchronize()


CASES: dict[str, Any] = {"sums": sums, "engine": engine, "killed": killed}

if __name__ == "__main__":
    try:
        with open_group(int(os.environ["WORLD_SIZE"])) as here:
            CASES[sys.argv[1]](here, *sys.argv[2:])
    except CommunicationError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(PEER_FAILED)
