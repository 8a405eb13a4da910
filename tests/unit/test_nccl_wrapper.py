# SPDX-License-Identifier: Apache-2.0
"""What is asked of NCCL, in which order, by a pretended CuPy."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from typing import Any

import numpy as np
import pytest

from flashllm.engine import nccl as wrapper
from flashllm.engine import parallel
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.nccl import NcclCommunicator, without_multicast
from flashllm.engine.rendezvous import Place, Rendezvous, meet
from flashllm.errors import ArgumentError, MissingDependencyError

FLOAT16, BFLOAT16, SUM, NAME = 6, 9, 0, bytes(range(128))


class Array(np.ndarray[Any, Any]):
    """Has its address where CuPy has it."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)


def array(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype).view(Array)


class Nccl(types.ModuleType):
    """The module ``cupy.cuda.nccl``; also notes what is called."""

    NCCL_FLOAT16, NCCL_BFLOAT16, NCCL_SUM = FLOAT16, BFLOAT16, SUM

    def __init__(self) -> None:
        super().__init__("cupy.cuda.nccl")
        self.calls: list[Any] = []
        self.available, self.version, self.stream = True, 22809, 4711
        self.error: Exception | None = None
        self.stuck = threading.Event()
        self.NcclCommunicator = self.connect

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> bytes:
        self.calls.append("name")
        return NAME

    def connect(self, count: int, name: bytes, rank: int) -> Any:
        self.calls.append(("connect", count, name, rank, os.environ["NCCL_NVLS_ENABLE"]))
        return types.SimpleNamespace(
            allReduce=lambda *arguments: self.calls.append(("sum", *arguments)),
            check_async_error=self.check,
            destroy=lambda: self.calls.append("destroy"),
            abort=self.abort,
        )

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def abort(self) -> None:
        self.calls.append("abort")
        self.stuck.wait(20)

    def use(self, device: int) -> None:
        self.calls.append(("use", device))


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = Nccl()
    cuda = types.SimpleNamespace(
        nccl=fake,
        get_current_stream=lambda: types.SimpleNamespace(ptr=fake.stream),
        Device=lambda index: types.SimpleNamespace(use=lambda: fake.use(index)),
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda = cuda  # type: ignore[attr-defined]
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nccl", fake)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # so that it is put back
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    monkeypatch.setattr(wrapper, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr("flashllm.device.device_count", lambda: (2, None))
    return fake


class Second:
    """The rendezvous of a rank 1 that is told NCCL's name for the group."""

    rank, count = 1, 2

    def broadcast(self, value: Any) -> bytes:
        assert value is None
        return NAME


def test_calls_of_a_rank(nccl: Any) -> None:
    communicator = NcclCommunicator(meet(Place()))
    halves, brains = array(3, 5), array(7, dtype=np.uint16)
    communicator.all_reduce(halves)
    communicator.all_reduce(halves[1:])
    communicator.all_reduce(brains)
    communicator.close()
    communicator.close()
    communicator.abort()
    at, next_row = halves.data.ptr, halves.data.ptr + 10
    assert nccl.calls == [
        "name",
        ("connect", 1, NAME, 0, "0"),
        ("sum", at, at, 15, FLOAT16, SUM, 4711),
        ("sum", next_row, next_row, 10, FLOAT16, SUM, 4711),
        ("sum", brains.data.ptr, brains.data.ptr, 7, BFLOAT16, SUM, 4711),
        "destroy",
    ]


def test_other_ranks_take_the_name_of_rank_0(nccl: Any) -> None:
    NcclCommunicator(Second()).close()  # type: ignore[arg-type]
    assert nccl.calls == [("connect", 2, NAME, 1, "0"), "destroy"]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (array(4, dtype=np.float32), "got float32"),
        (array(4, dtype=np.int16), "got int16"),
        (array(4, 4)[:, :2], "got float16 with gaps"),
        (array(4, 4).T, "got float16 with gaps"),
    ],
)
def test_arrays_that_cannot_be_summed(nccl: Any, wrong: Any, got: str) -> None:
    communicator = NcclCommunicator(meet(Place()))
    with pytest.raises(ArgumentError, match=got):
        communicator.all_reduce(wrong)
    communicator.close()
    assert not [call for call in nccl.calls if call[0] == "sum"]


def test_the_null_stream_is_refused(nccl: Any) -> None:
    communicator = NcclCommunicator(meet(Place()))
    nccl.stream = 0
    with pytest.raises(ArgumentError, match="the null stream"):
        communicator.all_reduce(array(4))
    communicator.close()


def test_a_failed_group_sums_no_more(nccl: Any) -> None:
    rendezvous = meet(Place())
    communicator = NcclCommunicator(rendezvous)
    rendezvous.fail("rank 1 has ended")
    with pytest.raises(CommunicationError, match="rank 1 has ended"):
        communicator.all_reduce(array(4))
    communicator.close()


def test_an_error_behind_a_call_fails_the_group(nccl: Any) -> None:
    rendezvous = meet(Place())
    communicator = NcclCommunicator(rendezvous)
    heard = threading.Event()
    rendezvous.on_failure(lambda _: heard.set())
    assert not heard.wait(0.1)
    nccl.error = RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error")
    assert heard.wait(5)
    assert rendezvous.failure == f"rank 0: NCCL has failed: {nccl.error}"
    communicator.close()


def test_nothing_is_asked_of_a_communicator_that_was_closed(nccl: Any) -> None:
    rendezvous = meet(Place())
    NcclCommunicator(rendezvous).close()
    nccl.error = RuntimeError("of memory that was freed")
    time.sleep(0.1)
    assert rendezvous.failure is None


def test_an_abort_that_waits_for_others_is_left(nccl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "_ABORT_SECONDS", 0.05)
    communicator = NcclCommunicator(meet(Place()))
    start = time.monotonic()
    communicator.abort()
    assert 0.04 < time.monotonic() - start < 2
    communicator.close()
    assert nccl.calls[2:] == ["abort"]
    nccl.stuck.set()


def test_multicast_stays_off(nccl: Any) -> None:
    unset: dict[str, str] = {}
    without_multicast(unset)
    assert unset == {"NCCL_NVLS_ENABLE": "0"}
    without_multicast({"NCCL_NVLS_ENABLE": "0"})
    for value in ("1", "2", ""):
        with pytest.raises(ArgumentError, match="NVLink multicast stays off"):
            without_multicast({"NCCL_NVLS_ENABLE": value})
    os.environ["NCCL_NVLS_ENABLE"] = "1"
    with pytest.raises(ArgumentError, match="NVLink multicast stays off"):
        NcclCommunicator(meet(Place()))
    assert nccl.calls == []


def test_no_nccl(nccl: Any) -> None:
    nccl.version = 20806
    with pytest.raises(MissingDependencyError, match=r"NCCL: expected 2\.10 or newer, got version code 20806"):
        NcclCommunicator(meet(Place()))
    nccl.available = False
    with pytest.raises(MissingDependencyError, match="pip install nvidia-nccl"):
        NcclCommunicator(meet(Place()))


def test_a_rank_uses_its_own_gpu(nccl: Any) -> None:
    rendezvous: Rendezvous = Second()  # type: ignore[assignment]
    nccl.stuck.set()
    parallel.connect_nccl(Place(rank=1, count=2, local_rank=1), rendezvous).abort()
    assert nccl.calls[0] == ("use", 1)
    assert nccl.calls[1][0] == "connect"
    with pytest.raises(ArgumentError, match="tp: expected at most 2, the GPUs of this machine, got 3"):
        parallel.connect_nccl(Place(rank=2, count=3, local_rank=2), rendezvous)
