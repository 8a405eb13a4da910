# SPDX-License-Identifier: Apache-2.0
"""Which NCCL calls are made, and in which order, seen by a fake CuPy."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import types
import weakref
from typing import Any

import numpy as np
import pytest

from flashllm import __version__
from flashllm.engine import nccl as wrapper
from flashllm.engine import parallel
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.nccl import NcclCommunicator, without_multicast
from flashllm.engine.rendezvous import Place, meet
from flashllm.errors import ArgumentError, MissingDependencyError

UINT8, NAME = 1, bytes(range(128))


class Array(np.ndarray[Any, Any]):
    """Has its address where CuPy has it."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)


def array(*shape: int, dtype: Any = np.float16) -> Any:
    return np.zeros(shape, dtype).view(Array)


class Connected(types.SimpleNamespace):
    """A communicator of CuPy."""


class Nccl(types.ModuleType):
    """The module ``cupy.cuda.nccl``; also notes what is called."""

    NCCL_UINT8 = UINT8

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
        return Connected(
            allGather=lambda *arguments: self.calls.append(("gather", *arguments)),
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
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # so that it is restored
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    monkeypatch.setattr(wrapper, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr("flashllm.device.device_count", lambda: (2, None))
    return fake


class Second:
    """The rendezvous of a rank 1, which receives NCCL's name for the group."""

    rank, count = 1, 2

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def broadcast(self, value: Any) -> bytes:
        assert value is None
        return NAME

    def agree(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def check(self) -> None:
        """Nothing has failed."""


def test_calls_of_a_rank(nccl: Any) -> None:
    """A rank contributes its own part, which is already in its place, as bytes, whatever they are."""
    communicator = NcclCommunicator(Second())  # type: ignore[arg-type]
    halves, brains = array(2, 3, 5), array(2, 7, dtype=np.uint16)
    communicator.all_gather(halves)
    communicator.all_gather(brains)
    communicator.leave()
    communicator.leave()
    assert nccl.calls == [
        ("connect", 2, NAME, 1, "0"),
        ("gather", halves.data.ptr + 30, halves.data.ptr, 30, UINT8, 4711),
        ("gather", brains.data.ptr + 14, brains.data.ptr, 14, UINT8, 4711),
    ]


def test_rank_0_names_the_group(nccl: Any) -> None:
    communicator = NcclCommunicator(meet(Place()))
    halves = array(1, 3)
    communicator.all_gather(halves)
    communicator.leave()
    at = halves.data.ptr
    assert nccl.calls == ["name", ("connect", 1, NAME, 0, "0"), ("gather", at, at, 6, UINT8, 4711)]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (array(3, 4), r"got \[3, 4\]$"),
        (array(), r"got \[\]$"),
        (array(2, 4)[:, :2], r"got \[2, 2\] with gaps"),
        (array(4, 2).T, r"got \[2, 4\] with gaps"),
    ],
)
def test_arrays_that_cannot_be_gathered(nccl: Any, wrong: Any, got: str) -> None:
    communicator = NcclCommunicator(Second())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=rf"^parts: expected contiguous \[2, \.\.\.\], {got}"):
        communicator.all_gather(wrong)
    communicator.leave()
    assert not [call for call in nccl.calls if call[0] == "gather"]


def test_the_null_stream_is_refused(nccl: Any) -> None:
    communicator = NcclCommunicator(meet(Place()))
    nccl.stream = 0
    with pytest.raises(ArgumentError, match="the null stream"):
        communicator.all_gather(array(1, 4))
    communicator.leave()


def test_a_failed_group_gathers_no_more(nccl: Any) -> None:
    rendezvous = meet(Place())
    communicator = NcclCommunicator(rendezvous)
    communicator.check()
    rendezvous.fail("rank 1 has ended")
    for use in (communicator.check, lambda: communicator.all_gather(array(1, 4))):
        with pytest.raises(CommunicationError, match="rank 1 has ended"):
            use()
    communicator.leave()


def test_an_error_behind_a_call_fails_the_group(nccl: Any) -> None:
    rendezvous = meet(Place())
    communicator = NcclCommunicator(rendezvous)
    heard = threading.Event()
    rendezvous.on_failure(lambda _: heard.set())
    assert not heard.wait(0.1)
    nccl.error = RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error")
    assert heard.wait(5)
    assert rendezvous.failure == f"rank 0: NCCL has failed: {nccl.error}"
    communicator.leave()


@pytest.mark.parametrize("end", ["leave", "abort"])
def test_nothing_is_asked_of_a_communicator_that_was_left(nccl: Any, end: str) -> None:
    """The thread that asks for errors has ended before NCCL releases anything."""
    nccl.stuck.set()
    rendezvous = meet(Place())
    communicator = NcclCommunicator(rendezvous)
    getattr(communicator, end)()
    assert not communicator._watcher.is_alive()
    nccl.error = RuntimeError("of memory that was freed")
    with pytest.raises(CommunicationError, match="the group was left"):
        communicator.all_gather(array(1, 4))
    communicator.check()
    assert nccl.calls[2:] == {"leave": [], "abort": ["abort"]}[end]


def test_nobody_destroys_a_communicator_that_graphs_have_captured(nccl: Any) -> None:
    communicator = NcclCommunicator(meet(Place()))
    held = weakref.ref(communicator._comm)
    communicator.leave()
    del communicator
    gc.collect()
    assert held() is not None


def test_an_abort_that_waits_for_others_is_left(nccl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "_ABORT_SECONDS", 0.05)
    communicator = NcclCommunicator(meet(Place()))
    start = time.monotonic()
    assert not communicator.is_aborting
    communicator.abort()
    assert 0.04 < time.monotonic() - start < 2
    assert communicator.is_aborting
    communicator.abort()
    assert nccl.calls[2:] == ["abort"]
    nccl.stuck.set()
    assert communicator._aborting is not None
    communicator._aborting.join()
    assert not communicator.is_aborting


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
    with pytest.raises(MissingDependencyError, match=r"NCCL: expected 2\.9 or newer, got version code 20806"):
        NcclCommunicator(meet(Place()))
    nccl.available = False
    with pytest.raises(MissingDependencyError, match="pip install nvidia-nccl"):
        NcclCommunicator(meet(Place()))


def test_a_rank_uses_its_own_gpu(nccl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which one it is before NCCL connects it."""
    monkeypatch.setattr("flashllm.device.device_facts", lambda: types.SimpleNamespace(name=f"after {nccl.calls}"))
    monkeypatch.setattr("flashllm.baselines.cublas_api.version", lambda: "13.1.0")
    rendezvous: Any = Second()
    nccl.stuck.set()
    parallel.connect_nccl(Place(rank=1, count=2, local_rank=1), rendezvous).abort()
    assert rendezvous.facts == {"flashllm": __version__, "GPU": "after [('use', 1)]", "cuBLAS": "13.1.0"}
    assert nccl.calls[0] == ("use", 1)
    assert nccl.calls[1][0] == "connect"
    with pytest.raises(ArgumentError, match="tp: expected at most 2, the GPUs of this machine, got 3"):
        parallel.connect_nccl(Place(rank=2, count=3, local_rank=2), rendezvous)
