# SPDX-License-Identifier: Apache-2.0
"""Starts the processes of a group on this machine, and ends them together."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashllm.engine.parallel import GROUP_KEY, PARENT_PIPE
from flashllm.engine.rendezvous import free_port
from flashllm.statuses import INTERRUPTED, PEER_FAILED

_POLL_SECONDS = 0.05
_PEERS_SECONDS = 4.0  # for ranks that leave by themselves once another has failed: they take 1 s, and 2 s for NCCL
_TERMINATED_SECONDS = 2.0
_KEPT_BYTES = 16 * 1024


@dataclass(eq=False)
class _Rank:
    index: int
    process: subprocess.Popen[bytes]
    errors: bytes = b""
    """The end of its standard error, except for rank 0, whose output is shown."""
    reader: threading.Thread | None = None

    def read(self) -> None:
        pipe = self.process.stderr
        assert pipe is not None
        while part := os.read(pipe.fileno(), 4096):
            self.errors = (self.errors + part)[-_KEPT_BYTES:]


def launch_ranks(count: int, command: Sequence[str]) -> int:
    """Run ``command`` ``count`` times, each with the environment of one rank, and return an exit status.

    Rank 0's output is shown; of another rank, the end of its standard error is shown if it was the first to fail. If a
    rank ends with a nonzero status, the others end within seconds. That status is returned, or 128 plus the number of
    the signal that ended the rank, and a line on standard error names the rank unless rank 0 has already said why.
    Ctrl-C ends all ranks.
    """
    theirs, ours = os.pipe()
    try:
        with _started(count, command, pipe=theirs) as ranks:
            first = _wait(ranks)
        return 0 if first is None else _report(first, ranks)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        os.close(ours)
        os.close(theirs)


@contextlib.contextmanager
def _started(count: int, command: Sequence[str], *, pipe: int) -> Iterator[list[_Rank]]:
    """Start all ranks; none is left running at the end of the block."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), GROUP_KEY: secrets.token_hex(16), PARENT_PIPE: str(pipe)}
    ranks: list[_Rank] = []
    try:
        for index in range(count):
            shown = index == 0
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **common, "RANK": str(index), "LOCAL_RANK": str(index)},
                stdin=None if shown else subprocess.DEVNULL,
                stdout=None if shown else subprocess.DEVNULL,
                stderr=None if shown else subprocess.PIPE,
                pass_fds=(pipe,),
            )
            rank = _Rank(index=index, process=process)
            ranks.append(rank)
            if not shown:
                rank.reader = threading.Thread(target=rank.read, daemon=True)
                rank.reader.start()
        yield ranks
    except KeyboardInterrupt:
        # A terminal has sent it to the ranks as well; another process may have sent it only here.
        if not _all_end(ranks, 1.0):
            _send(ranks, signal.SIGINT)
            _all_end(ranks, _PEERS_SECONDS)
        raise
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            _send(ranks, stop)
            if _all_end(ranks, _TERMINATED_SECONDS):
                break
        for rank in ranks:
            if rank.reader is not None:
                rank.reader.join(1.0)  # would take longer if a child of the rank survives and holds the pipe


def _wait(ranks: Sequence[_Rank]) -> _Rank | None:
    """Wait until all succeed, or one fails and the others have had time to end; return the rank that failed first."""
    order: list[_Rank] = []

    def failed() -> bool:
        order.extend(rank for rank in ranks if rank not in order and rank.process.poll())
        return bool(order)

    _until(lambda: failed() or all(rank.process.poll() == 0 for rank in ranks))
    if not order:
        return None
    _until(lambda: failed() and all(rank.process.poll() is not None for rank in ranks), _PEERS_SECONDS)
    return next((rank for rank in order if rank.process.returncode != PEER_FAILED), order[0])


def _report(first: _Rank, ranks: Sequence[_Rank]) -> int:
    """Report which rank failed and why; return its exit status."""
    status = first.process.returncode
    # Rank 0 has already said why if all ranks failed alike, or if the others ended only because it did.
    said_by_rank_0 = {status, PEER_FAILED} if first.index == 0 else {status}
    if status > 0 and said_by_rank_0.issuperset(rank.process.returncode for rank in ranks):
        return status
    if first.errors:
        text = first.errors.decode(errors="replace").rstrip()
        print("\n".join(f"rank {first.index}: {line}" for line in text.splitlines()), file=sys.stderr)
    ending = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}, {_name(-status)}"
    print(f"Error: rank {first.index} of {len(ranks)} {ending}", file=sys.stderr)
    return status if status > 0 else 128 - status


def _name(number: int) -> str:
    return (signal.strsignal(number) or "which has no name").lower()


def _send(ranks: Sequence[_Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _all_end(ranks: Sequence[_Rank], seconds: float) -> bool:
    return _until(lambda: all(rank.process.poll() is not None for rank in ranks), seconds)


def _until(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Wait for ``condition``, for at most ``seconds``; return whether it has come true."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
