# SPDX-License-Identifier: Apache-2.0
"""Mistakes in kernels that the emulator has to catch, by its own report or by a wrong result for some seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions, EmulationError
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec

BUILD = BuildOptions(source_root=Path(__file__).parent)
SEEDS = range(12)


def spec(function: str, mistake: int, shared_bytes: int) -> KernelSpec:
    return KernelSpec(
        name=function,
        source="broken.cu",
        function=f"broken::{function}",
        template=(("kMistake", str(mistake)),),
        threads=128,
        shared_bytes=shared_bytes,
    )


ROTATE = [spec("rotate", mistake, 512) for mistake in range(5)]
COPY = [spec("copy", mistake, 3 * 2048) for mistake in range(6)]
MEET = [spec("meet", mistake, 0) for mistake in range(5)]
REACH = [spec("reach", mistake, 2048) for mistake in range(7)]
RING = [spec("ring", mistake, 128 + 4 * 3 * 512) for mistake in range(11)]
SHARE = [spec("share", mistake, 128 + 2 * 512) for mistake in range(4)]
MULTIPLY = [spec("multiply", mistake, 72 * 128) for mistake in range(9)]
RELAY = [spec("relay", mistake, 128 + 2 * 512) for mistake in range(7)]
REGISTERS = [spec("multiply_registers", mistake, 8 * 128) for mistake in range(8)]
CHAIN = [spec("chain", mistake, 0) for mistake in range(4)]
COUNT = [spec("count", mistake, 0) for mistake in range(5)]
FOLLOW = [spec("follow", mistake, 8) for mistake in range(6)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    copies = [*COPY, *RING, *SHARE, *RELAY]
    emulator.preload([*ROTATE, *MEET, *REACH, *CHAIN, *COUNT, *FOLLOW, *copies, *MULTIPLY, *REGISTERS], build=BUILD)


def rotate(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(128, dtype=np.int32), np.zeros(256, np.int32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD)
    want = (np.arange(128) + 1) % 128
    return bool((y == np.concatenate((want, want + 1))).all())


def copy(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(1, 384 * 4 + 1, dtype=np.uint32), np.zeros(512 * 4, np.uint32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD)
    return bool((y[: 384 * 4] == x).all() and (y[384 * 4 :] == 0).all())


def meet(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD)
    return bool((y == (np.arange(128) ^ 1)).all())


def reach(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    x.flags.writeable = False
    emulator.launch(kernel, (2,), (x, y, np.int32(128)), seed=seed, build=BUILD)
    return bool((y == np.repeat(np.arange(128).reshape(4, 32).sum(1), 32)).all())


def ring(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(1, 4 * 8 * 32 * 4 + 1, dtype=np.uint32), np.zeros(4 * 8 * 32 * 4, np.uint32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD)
    return bool((y.reshape(-1, 2, 4) == x.reshape(-1, 2, 4)[:, ::-1]).all())


def share(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(1, 4 * 32 * 4 + 1, dtype=np.uint32), np.zeros(4 * 32 * 4, np.uint32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD)
    return bool((y == x).all())


def test_bulk_copies_are_counted() -> None:
    x, y = np.ones(4 * 8 * 32 * 4, np.uint32), np.zeros(4 * 8 * 32 * 4, np.uint32)
    counts = emulator.launch(RING[0], (1,), (x, y), build=BUILD)
    assert counts.bulk_copy_bytes == counts.global_read_bytes == x.nbytes


def multiply(kernel: KernelSpec, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-4, 5, (rows, 64)).astype(np.float16) for rows in (64, 8))
    y = np.zeros((64, 8), np.float32)
    emulator.launch(kernel, (1,), (a, b, y), seed=seed, build=BUILD)
    return bool((y == a.astype(np.float32) @ b.astype(np.float32).T).all())


def chain(kernel: KernelSpec, seed: int) -> bool:
    x = np.random.default_rng(seed).integers(1, 9, (7, 128, 4)).astype(np.float32)
    y = np.zeros_like(x)
    emulator.launch(kernel, (7,), (x, y), seed=seed, build=BUILD)
    return bool((y == x.cumsum(axis=0)).all())


def count(kernel: KernelSpec, seed: int) -> bool:
    x = np.random.default_rng(seed).integers(1, 100, 7).astype(np.int32)
    y, counted = np.zeros(8, np.int32), np.zeros(1, np.uint32)
    emulator.launch(kernel, (7,), (x, y, counted), seed=seed, build=BUILD)
    assert counted[0] == 6
    return bool((y == [*x, x.sum()]).all())


def follow(kernel: KernelSpec, seed: int) -> bool:
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    emulator.launch(kernel, (1,), (x, y), seed=seed, build=BUILD, dependent=[x])
    return bool((y == x).all())


def right_in_every_order(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec) -> bool:
    return all(run(kernel, seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        (rotate, ROTATE),
        (copy, COPY),
        (meet, MEET),
        (reach, REACH),
        (ring, RING),
        (share, SHARE),
        (multiply, MULTIPLY),
        (chain, CHAIN),
        (count, COUNT),
        (follow, FOLLOW),
        (share, RELAY),
        (multiply, REGISTERS),
    ],
    ids=lambda value: value[0].name if isinstance(value, list) else "",
)
def test_no_report_without_a_mistake(run: Callable[[KernelSpec, int], bool], kernels: list[KernelSpec]) -> None:
    assert right_in_every_order(run, kernels[0])


@pytest.mark.parametrize("mistake", [1, 2, 4])
def test_missing_barrier_gives_a_wrong_result(mistake: int) -> None:
    assert not right_in_every_order(rotate, ROTATE[mistake])


@pytest.mark.parametrize("mistake", [1, 2, 3, 4, 5])
def test_asynchronous_copies_not_waited_for(mistake: int) -> None:
    assert not right_in_every_order(copy, COPY[mistake])


@pytest.mark.parametrize(
    ("run", "kernel"),
    [
        (ring, RING[2]),
        (ring, RING[3]),
        (ring, RING[10]),
        (share, SHARE[1]),
        (share, SHARE[3]),
        (share, RELAY[1]),
        (share, RELAY[4]),
        (share, RELAY[6]),
    ],
    ids=lambda value: value.label if isinstance(value, KernelSpec) else "",
)
def test_rings_out_of_step(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec) -> None:
    """A wrong result or a report, in some order."""

    def right(seed: int) -> bool:
        try:
            return run(kernel, seed)
        except EmulationError as error:
            return not any(word in str(error) for word in ("mbarrier", "bulk copies"))

    assert not all(right(seed) for seed in SEEDS)


def test_a_block_that_does_not_wait_for_another_is_wrong() -> None:
    assert not right_in_every_order(chain, CHAIN[2])
    assert not right_in_every_order(count, COUNT[3])


def test_static_shared_memory_is_a_blocks_own() -> None:
    kernel = KernelSpec(name="stamp", source="static_shared.cu", function="static_shared::stamp", threads=128)
    for seed in SEEDS:
        y = np.full((6, 128), -1, np.int32)
        emulator.launch(kernel, (6,), (y,), seed=seed, build=BUILD)
        assert (y == np.arange(6)[:, None]).all()


def test_missing_wait_shows_in_every_order() -> None:
    assert not any(copy(COPY[1], seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("run", "kernel", "message"),
    [
        (rotate, ROTATE[3], r"deadlock: .*warp 1 lanes 0000ffff wait at __syncthreads.* warp 1 lanes ffff0000 wait at "
         r"__syncwarp for lanes 0000ffff"),
        (meet, MEET[1], r"divergent collective: .*(shuffle.*vote|vote.*shuffle)"),
        (meet, MEET[2], r"shuffle.*(have ended|the thread ends)|the thread ends.*shuffle"),
        (meet, MEET[3], r"divergent barrier"),
        (meet, MEET[4], r"shuffle: mask 7fffffff lacks the calling lane|divergent|deadlock"),
        (reach, REACH[1], r"16-byte store: 16 bytes at shared address \d+ \(offset 2048\) of 2048 bytes"),
        (reach, REACH[2], r"wrote past the end of its 2048 bytes of shared memory"),
        (reach, REACH[3], r"read of 4 bytes at byte 512 of argument 0, which has 512"),
        (reach, REACH[4], r"write of 4 bytes .*read-only"),
        (reach, REACH[5], r"16-byte store: shared address \d+ is not a multiple of 16"),
        (ring, RING[1], r"the block ends with \d bulk copies not waited for|more than its 1 arrivals"),
        (ring, RING[4], r"deadlock: .* wait for 0 arrivals and -16 bytes at the mbarrier at offset \d+"),
        (ring, RING[5], r"deadlock: .* wait for 0 arrivals and 16 bytes at the mbarrier"),
        (ring, RING[6], r"deadlock: .* wait for 1 arrivals and -512 bytes at the mbarrier"),
        (ring, RING[7], r"no mbarrier has been initialised at shared offset \d+"),
        (ring, RING[8], r"the block ends with 1 bulk copies not waited for"),
        (ring, RING[9], r"cp.async.bulk: 16 bytes at shared address \d+ \(offset 6272\) of 6272 bytes"),
        (share, SHARE[2], r"deadlock: warp 0 lanes 00000001 wait for 1 arrivals and 0 bytes"),
        (multiply, MULTIPLY[1], r"missing proxy fence: wgmma.mma_async reads operand a at shared offset \d+, which"),
        (multiply, MULTIPLY[2], r"missing proxy fence"),
        (multiply, MULTIPLY[3], r"missing proxy fence|race"),
        (multiply, MULTIPLY[5], r"ends with 4 wgmma.mma_async not waited for"),
        (multiply, MULTIPLY[6], r"missing wgmma.fence"),
        (multiply, MULTIPLY[7], r"race: operand a of wgmma.mma_async changed|missing proxy fence"),
        (multiply, MULTIPLY[8], r"divergent warpgroup: warp 0 has issued 4 wgmma.mma_async, warp 2 3"),
        (chain, CHAIN[1], r"waits for global memory that no earlier block will write"),
        (chain, CHAIN[3], r"waits for global memory that no earlier block will write"),
        (count, COUNT[1], r"waits for global memory that no earlier block will write"),
        (count, COUNT[2], r"waits for global memory that no earlier block will write"),
        (count, COUNT[4], r"read of 4 bytes at byte 4 of argument 2, which has 4"),
        (share, RELAY[2], r"deadlock: .* wait for 1 arrivals and 0 bytes at the mbarrier"),
        (share, RELAY[3], r"more than its 32 arrivals|deadlock"),
        (share, RELAY[5], r"the block ends with \d+ bulk copies not waited for"),
        (multiply, REGISTERS[1], r"missing proxy fence: wgmma.mma_async reads operand b"),
        (multiply, REGISTERS[3], r"ends with 4 wgmma.mma_async not waited for"),
        (multiply, REGISTERS[4], r"missing wgmma.fence"),
        (multiply, REGISTERS[5], r"race: operand b of wgmma.mma_async changed"),
        (multiply, REGISTERS[6], r"divergent warpgroup: warp 0 has issued 4 wgmma.mma_async, warp 2 3"),
        (multiply, REGISTERS[7], r"wgmma.mma_async: lanes 0 and 16 give different descriptors or shapes"),
    ],
    ids=lambda value: value.label if isinstance(value, KernelSpec) else "",
)  # fmt: skip
def test_reports(run: Callable[[KernelSpec, int], bool], kernel: KernelSpec, message: str) -> None:
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message) as caught:
            run(kernel, seed)
        assert f"{kernel.label} (seed {seed}): block (" in str(caught.value)


def test_accumulators_read_before_the_wait_are_nan() -> None:
    a, b = np.ones((64, 64), np.float16), np.ones((8, 64), np.float16)
    y: NDArray[Any] = np.zeros((64, 8), np.float32)
    for kernel in (MULTIPLY[4], REGISTERS[2]):
        y[:] = 0
        emulator.launch(kernel, (1,), (a, b, y), build=BUILD)
        assert np.isnan(y).all()


def test_shared_memory_that_nobody_wrote_is_poisoned() -> None:
    x, y = np.zeros(128, np.int32), np.zeros(128, np.int32)
    emulator.launch(REACH[6], (2,), (x, y, np.int32(128)), workers=1, build=BUILD)
    assert (y[64:96] == 0x7FFF7FFF).all()
    assert (y[:64] == 0).all()


def test_parts_that_the_launch_before_may_be_using() -> None:
    """Element 100 is read, and nobody waits."""
    x, y = np.zeros(128, np.int32), np.zeros(128, np.int32)

    def reads(dependent: NDArray[Any]) -> None:
        emulator.launch(REACH[3], (1,), (x, y, np.int32(100)), build=BUILD, dependent=[dependent])

    for part in (x[:100], x[101:]):
        reads(part)
    for part in (x, x[100:101]):
        with pytest.raises(EmulationError, match="read of argument 0, which the launch before may be using"):
            reads(part)
    for part in (x[::2], x.copy(), np.zeros(1, np.int32)):
        with pytest.raises(ArgumentError, match=r"^dependent: expected"):
            reads(part)


@pytest.mark.parametrize(("mistake", "warps"), [(1, "012"), (2, "12"), (3, "12"), (4, "2"), (5, "3")])
def test_threads_not_ordered_behind_the_launch_before(mistake: int, warps: str) -> None:
    """Reported in every order, for a warp that has neither waited nor synchronised with one that had."""
    for seed in SEEDS:
        with pytest.raises(
            EmulationError, match=rf"warp [{warps}], .*read of argument 0, which the launch before may be"
        ):
            follow(FOLLOW[mistake], seed)
