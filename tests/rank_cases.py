# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a group do in tests on GPUs: ``python rank_cases.py CASE [ARGUMENTS]`` is one rank."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine_cases
from flashllm import graphs
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.engine import Engine
from flashllm.engine.parallel import Group, open_group
from flashllm.engine.runtime import GpuRuntime
from flashllm.statuses import PEER_FAILED

SIZES = (1, 7, 4096, 100_003)
REPLAYS = 3
_FENCE = 8
_NAN = 0x7FDA  # in fp16 and bf16


def check_gathers(communicator: Any, *, rank: int, count: int) -> None:
    """Parts arrive unchanged, one by one and in a graph that is replayed while they change."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    for size, kind in ((size, kind) for size in SIZES for kind in (np.float16, np.uint16)):
        with stream:
            given = cupy.zeros(size, kind)
            fenced = cupy.empty(count * size + 2 * _FENCE, np.uint16)
            parts = fenced[_FENCE:-_FENCE].view(kind).reshape(count, size)

            def gather(given: Any = given, fenced: Any = fenced, parts: Any = parts) -> None:
                fenced.fill(_NAN)
                parts[rank] = given
                communicator.all_gather(parts)

            gather()
            graph = graphs.capture(gather, stream)
            for step in range(REPLAYS):
                given.set(_bits(rank, step, size).view(kind), stream=stream)
                graph.launch(stream)
                found = fenced.get(stream=stream)
                stream.synchronize()
                fence = np.full(_FENCE, _NAN, np.uint16)
                wanted = [fence, *(_bits(one, step, size) for one in range(count)), fence]
                np.testing.assert_array_equal(found, np.concatenate(wanted))
            del graph  # before its communicator


def _bits(rank: int, step: int, size: int) -> NDArray[np.uint16]:
    """Any bits, including those of NaNs and of subnormal numbers."""
    return np.random.default_rng((rank, step)).integers(0, 1 << 16, size, np.uint16)


def gathers(group: Group) -> None:
    """As :func:`check_gathers` says."""
    check_gathers(group.communicator, rank=group.rank, count=group.count)


def engine(group: Group, folder: str, kind: str, dtype: Any, format: str) -> None:
    """A model divided among ranks computes what the whole one does, on every rank. ``format`` may be "dense"."""
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
    """The last rank is killed while all replay a graph of gathers as fast as they can. Rank 0 says when they begin."""
    gather, stream, _parts = _captured(group)
    print("replaying", flush=True)
    if group.rank == group.count - 1:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        gather.launch(stream)
        stream.synchronize()


def raised(group: Group) -> None:
    """The last rank ends with an exception while its graph, which this frame holds, waits for the others for ever."""
    gather, stream, _parts = _captured(group)
    if group.rank == group.count - 1:
        gather.launch(stream)
        raise ValueError("rank of this test")
    group.rendezvous.barrier()


def _captured(group: Group) -> tuple[Any, Any, Any]:
    """A graph of one gather, which all ranks have, its stream and its memory."""
    import cupy

    assert group.communicator is not None
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        parts = cupy.zeros((group.count, 2**20), np.float16)
        group.communicator.all_gather(parts)
        gather = graphs.capture(partial(group.communicator.all_gather, parts), stream)
    stream.synchronize()
    group.rendezvous.barrier()
    return gather, stream, parts


CASES: dict[str, Any] = {"gathers": gathers, "engine": engine, "killed": killed, "raised": raised}

if __name__ == "__main__":
    try:
        with open_group(int(os.environ["WORLD_SIZE"])) as here:
            CASES[sys.argv[1]](here, *sys.argv[2:])
    except CommunicationError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(PEER_FAILED)
