# SPDX-License-Identifier: Apache-2.0
"""How ranks find each other, what they exchange, and what they learn about one that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flashllm.engine import rendezvous
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.rendezvous import PORTS, Place, Rendezvous, free_port, meet
from flashllm.errors import ArgumentError

AT_ONCE = 2.0
"""Seconds: far below every default limit on how long ranks wait."""


def together(count: int, work: Callable[[Rendezvous], Any], *, port: int | None = None, key: str = "") -> list[Any]:
    """What ``work`` returns in each rank, or the exception it ends with; ranks are threads."""
    port = port or free_port()
    key = key or f"{os.getpid()}-{time.monotonic_ns()}"

    def run(rank: int) -> Any:
        try:
            return work(meet(Place(rank=rank, count=count, port=port, key=key), seconds=20))
        except CommunicationError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < AT_ONCE


def test_one_rank_needs_nobody() -> None:
    alone = meet(Place())
    assert alone.broadcast([1]) == [1]
    assert alone.gather("x") == ["x"]
    alone.barrier()
    alone.close()
    assert alone.failure is None


@pytest.mark.parametrize("count", [2, 5])
def test_values_come_as_they_were(count: int) -> None:
    big = os.urandom(3 * 2**20 + 1)

    def work(here: Rendezvous) -> Any:
        others = "of no interest" if here.rank else None
        values = [here.broadcast(others or one) for one in (big, b"", {"a": [1, None, "\u00e9"]}, 7)]
        gathered = [here.gather(one) for one in (here.rank, bytes([here.rank]))]
        assert here.all_gather(10 * here.rank) == [10 * rank for rank in range(count)]
        here.barrier()
        here.close()
        return values, gathered

    results = together(count, work)
    assert all(values == [big, b"", {"a": [1, None, "\u00e9"]}, 7] for values, _ in results)
    assert results[0][1] == [list(range(count)), [bytes([rank]) for rank in range(count)]]
    assert all(gathered == [None, None] for _, gathered in results[1:])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"GPU": "B"}, "GPU: rank 0 has A, rank 2 has B; it must be the same on all ranks"),
        ({"--layers": 2}, "--layers: rank 0 has None, rank 2 has 2; it must be the same on all ranks"),
        ({"model": "7d"}, "model: rank 2 has another one at /2; it must be the same on all ranks"),
        ({}, None),
    ],
)
def test_ranks_that_must_be_equal(other: dict[str, Any], message: str | None) -> None:
    """Rank 0 notices the difference, and the others learn of it from rank 0."""

    def work(here: Rendezvous) -> str | None:
        facts: dict[str, Any] = {"GPU": "A", "--layers": None, "model": "a3"}
        try:
            here.agree(facts | (other if here.rank == 2 else {}), called={"model": f"another one at /{here.rank}"})
        except CommunicationError as error:
            assert here.rank == 0
            here.fail(str(error))
        try:
            here.barrier()
        except CommunicationError as error:
            return str(error)
        return None

    assert together(3, work) == [message] * 3


def test_a_value_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LARGEST", 8)
    alone = meet(Place())
    assert alone.broadcast("seven..") == "seven.."

    def work(here: Rendezvous) -> Any:
        if here.rank == 0:
            with pytest.raises(ArgumentError, match=r"^list: expected at most 8 bytes, which ranks can send, got 9$"):
                here.broadcast("seven..", name="list")
        return here.broadcast("six...")

    assert together(2, work) == ["six..."] * 2


@pytest.mark.parametrize("late", range(3))
@pytest.mark.parametrize("wait", [Rendezvous.barrier, Rendezvous.close], ids=["barrier", "close"])
def test_nobody_goes_on_before_all_have_come(late: int, wait: Callable[[Rendezvous], None]) -> None:
    come: list[float] = []

    def work(here: Rendezvous) -> float:
        if here.rank == late:
            time.sleep(0.2)
            come.append(time.monotonic())
        wait(here)
        return time.monotonic()

    assert min(together(3, work)) >= come[0]


@pytest.mark.parametrize("culprit", range(3))
def test_a_failure_ends_the_waits_of_all_with_its_reason(culprit: int) -> None:
    def work(here: Rendezvous) -> str:
        heard: list[str] = []
        here.on_failure(heard.append)
        if here.rank == culprit:
            time.sleep(0.1)
            here.fail("no memory")
            here.fail("what comes later does not count")
        with at_once(), pytest.raises(CommunicationError, match=r"^no memory$"):
            here.barrier()
        for use in (here.check, here.close, here.barrier):
            with pytest.raises(CommunicationError, match=r"^no memory$"):
                use()
        here.on_failure(heard.append)  # has nothing to wait for
        deadline = time.monotonic() + AT_ONCE
        while len(heard) < 2 and time.monotonic() < deadline:  # the first is called by another thread
            time.sleep(0.01)
        assert heard == ["no memory"] * 2
        return here.failure or ""

    assert together(3, work) == ["no memory"] * 3


RANK = """
import sys, time
from flashllm.engine.rendezvous import Place, meet
here = meet(Place(rank=int(sys.argv[1]), count=3, port=int(sys.argv[2]), key=sys.argv[3]))
here.barrier()
print("ready", flush=True)
try:
    here.gather(1) if here.rank else here.gather(1, seconds=30)
    here.barrier()
except Exception as error:
    print(error, flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_is_missed_at_once(dead: int) -> None:
    port, key = free_port(), f"{os.getpid()}-{time.monotonic_ns()}"
    ours = 2
    processes = {
        rank: subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), key], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    }
    try:
        here = meet(Place(rank=ours, count=3, port=port, key=key), seconds=20)
        here.barrier()
        outputs = {rank: process.stdout for rank, process in processes.items()}
        assert [output.readline() for output in outputs.values() if output] == ["ready\n"] * 2
        with at_once():
            processes[dead].send_signal(signal.SIGKILL)
            with pytest.raises(CommunicationError, match=f"rank {dead} has ended"):
                here.barrier()
            left = outputs[1 - dead]
            assert left is not None
            assert left.readline() == f"rank {dead} has ended\n"
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_a_rank_that_says_nothing_is_named() -> None:
    def work(here: Rendezvous) -> None:
        if here.rank == 0:
            with pytest.raises(CommunicationError, match=r"rank 2 has sent nothing for 0\.2 s"):
                here.gather(None, seconds=0.2)
            here.fail("too slow")
        elif here.rank == 1:
            here.gather(None)
        else:
            with pytest.raises(CommunicationError, match="too slow"):
                here.broadcast()

    assert together(3, work) == [None] * 3


def test_a_rank_that_has_left_is_not_waited_for() -> None:
    def work(here: Rendezvous) -> None:
        if here.rank:
            with pytest.raises(CommunicationError, match="left early"):
                here.close()
        else:
            with at_once(), pytest.raises(CommunicationError, match="rank 1 has left the group"):
                here.gather(None)
            here.fail("left early")

    assert together(2, work) == [None] * 2


def test_a_value_where_the_end_was_expected() -> None:
    def work(here: Rendezvous) -> None:
        if here.rank:
            here.gather(5)
            with pytest.raises(CommunicationError, match="not so"):
                here.close()
        else:
            with pytest.raises(CommunicationError, match="rank 1 has sent what rank 0 does not expect"):
                here.close()
            here.fail("not so")

    assert together(2, work) == [None] * 2


def test_ranks_that_do_not_come_are_named() -> None:
    port = free_port()
    with pytest.raises(CommunicationError, match=r"not all have come within 0\.1 s, missing: 1, 2"):
        meet(Place(rank=0, count=3, port=port), seconds=0.1)
    with pytest.raises(CommunicationError, match=rf"rank 1: no rank 0 at 127\.0\.0\.1, ports {port} to .* 0\.1 s"):
        meet(Place(rank=1, count=3, port=port), seconds=0.1)
    with pytest.raises(CommunicationError, match=r"rank 0 cannot listen at 192\.0\.2\.1"):
        meet(Place(rank=0, count=2, port=port, host="192.0.2.1"), seconds=0.1)  # an address that is assigned to nobody


def test_groups_that_were_given_the_same_port_do_not_mix() -> None:
    port = free_port()

    def group(key: str) -> list[Any]:
        def work(here: Rendezvous) -> Any:
            heard = here.broadcast(None if here.rank else key)
            here.close()
            return heard

        return together(3, work, key=key, port=port)

    keys = ["a", "b", "c"]
    with ThreadPoolExecutor(len(keys)) as pool:
        assert list(pool.map(group, keys)) == [[key] * 3 for key in keys]


def test_all_ports_in_use() -> None:
    with contextlib.ExitStack() as stack:
        first = 61100  # above those that systems assign
        for port in range(first, first + PORTS):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        with pytest.raises(CommunicationError, match="all are in use"):
            meet(Place(rank=0, count=2, port=first), seconds=0.1)


def _message(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("!cQ", kind, len(body) if length is None else length) + body


HELLO: dict[str, Any] = {"flashllm": 1, "key": "ours", "count": 2, "rank": 1}
STRANGERS = {
    "silent": b"",  # until it is turned away
    "other words": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another key": _message(b"H", json.dumps(HELLO | {"key": "theirs"}).encode()),
    "another count": _message(b"H", json.dumps(HELLO | {"count": 3}).encode()),
    "rank 0": _message(b"H", json.dumps(HELLO | {"rank": 0}).encode()),
    "no such rank": _message(b"H", json.dumps(HELLO | {"rank": 2}).encode()),
    "no rank": _message(b"H", json.dumps({"key": "ours"}).encode()),
    "no object": _message(b"H", b"[1]"),
    "no JSON": _message(b"H", b"{"),
    "deep": _message(b"H", b"[" * 4096),
    "no hello": _message(b"J", json.dumps(HELLO).encode()),
    "long": _message(b"H", b"", length=2**62),
}


def test_strangers_are_turned_away() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        rank0 = pool.submit(meet, Place(rank=0, count=2, port=port, key="ours"), seconds=20)
        for said in STRANGERS.values():
            while True:
                try:
                    stranger = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:  # rank 0 does not listen yet
                    time.sleep(0.01)
            with stranger, contextlib.suppress(ConnectionResetError, BrokenPipeError):
                stranger.sendall(said)
                stranger.settimeout(5)
                assert stranger.recv(1) == b""
        rank1 = meet(Place(rank=1, count=2, port=port, key="ours"), seconds=20)
        rank1.gather("it is me")
        assert rank0.result().gather(None) == [None, "it is me"]
        with pytest.raises(ConnectionRefusedError):  # all have come
            socket.create_connection(("127.0.0.1", port))
        rank1.fail("done")


@pytest.mark.parametrize("answer", [b"", b"220 mail\r\n", _message(b"H", b""), _message(b"W", b"", length=9)])
def test_what_listens_before_rank_0_does_not_confuse(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer)
                        connection.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        results = together(2, lambda here: here.broadcast("well"), port=server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    assert results == ["well"] * 2
