# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a group find each other and share small objects: TCP connections between rank 0 and each other rank.

A message consists of its kind (1 byte), its length (8 bytes) and that many bytes, JSON or raw, nothing executable.
However a process ends, its system closes the connection, so the other side knows at once; keep-alive probes detect a
machine that has vanished.
"""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flashllm.engine.communicator import CommunicationError
from flashllm.errors import ArgumentError

PORTS = 16
"""Rank 0 listens on the first free one of this many ports; the others try them until one accepts their key."""
SECONDS = 60.0
"""How long ranks wait for each other by default."""

_HEADER = struct.Struct("!cQ")
_HELLO, _WELCOME, _JSON, _BYTES, _FAILURE, _END = b"H", b"W", b"J", b"B", b"F", b"E"
_LARGEST = 64 * 2**20
_LARGEST_HELLO = 4096
_GREETING_SECONDS = 2.0  # for a stranger that sends nothing
_ANSWER_SECONDS = 5.0  # rank 0 may be busy with a stranger
_RETRY_SECONDS = 0.05
# A vanished machine is noticed after 6 s, whether it is idle (probes: s, s, count) or owes an acknowledgement (ms).
_PROBES = ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
_UNANSWERED = (socket.TCP_USER_TIMEOUT, 6000)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in its group, and where rank 0 is found."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Its number among the ranks of its machine."""
    host: str = "127.0.0.1"
    port: int = 0
    """The first of the ``PORTS`` ports."""
    key: str = ""
    """The same for all ranks of a group and for no other process, if whatever started the ranks provides one."""

    @property
    def ports(self) -> range:
        """Where rank 0 may listen."""
        return range(self.port, min(self.port + PORTS, 2**16))

    @property
    def address(self) -> str:
        """Host and ports, for messages."""
        return f"{self.host}, ports {self.ports[0]} to {self.ports[-1]}"


class _Link:
    """The connection to one other rank."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.connection = peer, connection
        self.inbox: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        """Messages in the order of arrival; None once no more will come."""
        self._lock = threading.Lock()

    def send(self, kind: bytes, body: bytes = b"") -> None:
        with self._lock:
            _send(self.connection, kind, body)


class Rendezvous:
    """One rank's side. All ranks call ``broadcast``, ``gather`` and ``barrier`` in the same order.

    These raise :class:`CommunicationError` if a rank has failed, has ended, or sends nothing for ``seconds``, and
    ``ArgumentError`` for a value that is too long to send.
    """

    def __init__(self, place: Place, connections: Mapping[int, socket.socket]) -> None:
        """``connections``: on rank 0 those to every other rank, on the others the one to rank 0."""
        self.rank, self.count = place.rank, place.count
        self._links = [_Link(peer, connections[peer]) for peer in sorted(connections)]
        self._failure: str | None = None
        self._listeners: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        for link in self._links:
            threading.Thread(target=self._read, args=(link,), name=f"rank {link.peer}", daemon=True).start()

    @property
    def failure(self) -> str | None:
        """Why the group has failed; None while it has not."""
        return self._failure

    def check(self) -> None:
        """Raise :class:`CommunicationError` where the group has failed."""
        if self._failure is not None:
            raise CommunicationError(self._failure)

    def on_failure(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` once, with the reason and in any thread, when the group fails or if it already has."""
        with self._lock:
            reason = self._failure
            if reason is None:
                self._listeners.append(listener)
        if reason is not None:
            listener(reason)

    def broadcast(self, value: Any = None, *, seconds: float | None = SECONDS, name: str = "value") -> Any:
        """Return rank 0's ``value`` (bytes, or anything JSON can hold) on all ranks; the others' values are ignored.

        ``name``: what messages call the value.
        """
        self.check()
        if self.rank:
            return self._take(self._links[0], seconds)
        for link in self._links:
            self._give(link, value, name)
        return value

    def gather(self, value: Any, *, seconds: float | None = SECONDS) -> list[Any] | None:
        """The values of all ranks, in rank order, on rank 0; None on the others."""
        self.check()
        if self.rank:
            self._give(self._links[0], value)
            return None
        return [value, *(self._take(link, seconds) for link in self._links)]

    def all_gather(self, value: Any, *, seconds: float | None = SECONDS) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        found: list[Any] = self.broadcast(self.gather(value, seconds=seconds), seconds=seconds)
        return found

    def agree(self, facts: Mapping[str, Any], *, called: Mapping[str, str] | None = None) -> None:
        """Make rank 0 raise :class:`CommunicationError` if another rank's ``facts`` (names and JSON values) differ.

        ``called``: for facts whose values mean nothing to a reader, by name, what the message calls this rank's value
        if it differs from rank 0's.
        """
        for rank, (theirs, words) in enumerate(self.gather((facts, called or {})) or ()):
            for name, value in facts.items():
                if theirs[name] != value:
                    ours = "" if name in words else f"rank 0 has {value}, "
                    found = f"{ours}rank {rank} has {words.get(name, theirs[name])}"
                    raise CommunicationError(f"{name}: {found}; it must be the same on all ranks")

    def barrier(self, *, seconds: float | None = SECONDS) -> None:
        """Wait until all ranks have called this."""
        self.gather(None, seconds=seconds)
        self.broadcast(seconds=seconds)

    def fail(self, reason: str) -> None:
        """Tell all ranks, and this rank's listeners, that the group has failed. Only the first reason counts."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = reason
            listeners = tuple(self._listeners)
        for link in self._links:
            with contextlib.suppress(OSError):  # it may have ended
                link.send(_FAILURE, reason.encode())
            self._shut(link)
            link.inbox.put(None)
        for listener in listeners:
            listener(reason)

    def close(self) -> None:
        """Leave the group once all other ranks do. Raises :class:`CommunicationError` if one fails instead."""
        self.check()
        with self._sending():
            if self.rank:
                self._links[0].send(_END)
        for link in self._links:
            if self._message(link, None)[0] != _END:
                raise CommunicationError(f"rank {link.peer} has sent what rank {self.rank} does not expect")
        with self._sending():
            if not self.rank:
                for link in self._links:
                    link.send(_END)
        for link in self._links:
            self._shut(link)
            link.connection.close()

    def _read(self, link: _Link) -> None:
        """Receive messages from ``link`` for as long as there are any."""
        while True:
            try:
                kind, body = _receive(link.connection, _LARGEST)
            except OSError:
                self.fail(f"rank {link.peer} has ended")
                return
            if kind == _FAILURE:
                self.fail(body.decode(errors="replace"))
                return
            link.inbox.put((kind, body))
            if kind == _END:
                return

    def _give(self, link: _Link, value: Any, name: str = "value") -> None:
        raw = isinstance(value, bytes)
        body = value if raw else json.dumps(value).encode()
        if len(body) > _LARGEST:
            expected = f"at most {_LARGEST:,} bytes, which ranks can send"
            raise ArgumentError(name, expected=expected, got=f"{len(body):,}")
        with self._sending():
            link.send(_BYTES if raw else _JSON, body)

    def _take(self, link: _Link, seconds: float | None) -> Any:
        kind, body = self._message(link, seconds)
        if kind == _END:
            raise CommunicationError(f"rank {link.peer} has left the group")
        return body if kind == _BYTES else json.loads(body)

    def _message(self, link: _Link, seconds: float | None) -> tuple[bytes, bytes]:
        try:
            message = link.inbox.get(timeout=seconds)
        except queue.Empty:
            raise CommunicationError(f"rank {link.peer} has sent nothing for {seconds:g} s") from None
        if message is None:
            raise CommunicationError(self._failure)
        return message

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CommunicationError(self._failure or f"another rank has ended ({error})") from error

    def _shut(self, link: _Link) -> None:
        """End the thread that reads; data already sent still arrives."""
        with contextlib.suppress(OSError):
            link.connection.shutdown(socket.SHUT_RDWR)


def meet(place: Place, *, seconds: float = SECONDS) -> Rendezvous:
    """Connect the ranks of a group. Raises :class:`CommunicationError` if not all have arrived after ``seconds``."""
    if place.count == 1:
        return Rendezvous(place, {})
    if place.rank:
        return Rendezvous(place, {0: _find(place, seconds)})
    return Rendezvous(place, _wait_for_others(place, seconds))


def free_port() -> int:
    """A port on the loopback address that is currently unused."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for_others(place: Place, seconds: float) -> dict[int, socket.socket]:
    """On rank 0: a connection to each other rank."""
    deadline = time.monotonic() + seconds
    found: dict[int, socket.socket] = {}
    with _server(place) as server:
        while len(found) < place.count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                for one in found.values():
                    one.close()
                missing = ", ".join(str(rank) for rank in range(1, place.count) if rank not in found)
                raise CommunicationError(
                    f"rank 0 at {place.address}: not all have come within {seconds:g} s, missing: {missing}"
                ) from None
            rank = _greet(connection, place)
            if rank is None or rank in found:
                connection.close()
            else:
                found[rank] = connection
    return found


def _server(place: Place) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        for port in place.ports:
            try:
                return socket.create_server((address[0], port, *address[2:]), family=family, backlog=place.count + 8)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
    except OSError as error:
        raise CommunicationError(f"rank 0 cannot listen at {place.address}: {error}") from error
    raise CommunicationError(f"rank 0 cannot listen at {place.address}: all are in use")


def _greet(connection: socket.socket, place: Place) -> int | None:
    """The rank at the other end; None if it does not belong to this group."""
    connection.settimeout(_GREETING_SECONDS)
    try:
        kind, body = _receive(connection, _LARGEST_HELLO)
        hello = json.loads(body) if kind == _HELLO else None
        rank = hello["rank"] if isinstance(hello, dict) else None
        if not isinstance(rank, int) or not 0 < rank < place.count or hello != _hello(place, rank):
            return None
        _send(connection, _WELCOME, b"")
    except (OSError, ValueError, KeyError, RecursionError):
        return None
    _set_up(connection)
    return rank


def _find(place: Place, seconds: float) -> socket.socket:
    """On another rank: the connection to rank 0."""
    deadline = time.monotonic() + seconds
    while True:
        for port in place.ports:
            connection = _knock(place, port)
            if connection is not None:
                return connection
        if time.monotonic() > deadline:
            raise CommunicationError(f"rank {place.rank}: no rank 0 at {place.address} within {seconds:g} s")
        time.sleep(_RETRY_SECONDS)


def _knock(place: Place, port: int) -> socket.socket | None:
    """A connection to rank 0 if rank 0 is what listens on ``port``, else None."""
    try:
        connection = socket.create_connection((place.host, port), timeout=_ANSWER_SECONDS)
    except OSError:
        return None
    try:
        _send(connection, _HELLO, json.dumps(_hello(place, place.rank)).encode())
        kind, _ = _receive(connection, 0)  # not a welcome if the socket, without a listener, reached itself
    except OSError:
        kind = b""
    if kind != _WELCOME:
        connection.close()
        return None
    _set_up(connection)
    return connection


def _hello(place: Place, rank: int) -> dict[str, Any]:
    return {"flashllm": 1, "key": place.key, "count": place.count, "rank": rank}


def _set_up(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (*_PROBES, _UNANSWERED):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(connection: socket.socket, kind: bytes, body: bytes) -> None:
    connection.sendall(_HEADER.pack(kind, len(body)) + body)


def _receive(connection: socket.socket, largest: int) -> tuple[bytes, bytes]:
    """Kind and body of the next message. Raises ``OSError`` if none comes or it is too long."""
    kind, length = _HEADER.unpack(_receive_bytes(connection, _HEADER.size))
    if length > largest:
        raise ConnectionError(f"a message of {length} bytes")
    return kind, _receive_bytes(connection, length)


def _receive_bytes(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 2**20))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        parts += part
    return bytes(parts)
