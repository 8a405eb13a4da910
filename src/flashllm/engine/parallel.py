# SPDX-License-Identifier: Apache-2.0
"""A group of processes that share a model, as one of them sees it: how it joins, connects to the others and ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from flashllm.engine.communicator import CommunicationError, Communicator
from flashllm.engine.rendezvous import SECONDS, Place, Rendezvous, meet
from flashllm.engine.shard import Shard
from flashllm.errors import USAGE_ERRORS, ArgumentError, FlashLLMError
from flashllm.statuses import BAD_USAGE, INTERRUPTED, PEER_FAILED

GROUP_KEY, PARENT_PIPE = "FLASHLLM_GROUP", "FLASHLLM_PARENT"
"""Environment variables that ``launch_ranks`` sets in addition to those of torchrun."""

_DEFAULT_PORT = 29611  # for ranks started by mpirun, which names no port
_GRACE_SECONDS = 1.0

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPIRUN = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_KEYS = (GROUP_KEY, "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE")


class GroupCommunicator(Communicator, Protocol):
    """A communicator between processes."""

    def leave(self) -> None:
        """Make no further library calls, from any thread."""

    def abort(self) -> None:
        """Leave, and end the waits for other ranks."""

    @property
    def is_aborting(self) -> bool:
        """Whether a library is still busy with :meth:`abort`."""


Connect = Callable[[Place, Rendezvous], GroupCommunicator | None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a rank needs to take part: ``Engine`` takes the communicator, ``weights.load`` the shard."""

    rank: int
    count: int
    communicator: GroupCommunicator | None
    """None for a group of one."""
    rendezvous: Rendezvous

    @property
    def shard(self) -> Shard:
        """This rank's part of a model."""
        return Shard(index=self.rank, count=self.count)

    def of_rank_0(self, make: Callable[[], Any], *, name: str = "value") -> Any:
        """Call ``make`` on rank 0 alone and return its result (JSON values) on every rank.

        Raises ``ArgumentError``, about ``name``, on rank 0 if the result is too long to send.
        """
        return self.rendezvous.broadcast(make() if self.rank == 0 else None, seconds=None, name=name)


def alone() -> Group:
    """The group of this process alone, which has the whole model."""
    return Group(rank=0, count=1, communicator=None, rendezvous=meet(Place()))


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun, Open MPI's mpirun or ``launch_ranks`` assigns; None if none of them started this.

    Raises ``ArgumentError`` for variables with invalid values.
    """
    names = next((names for names in (_TORCHRUN, _MPIRUN) if all(name in environment for name in names[:2])), None)
    if names is None:
        return None
    rank, count = (_number(environment, name) for name in names[:2])
    local_rank = _number(environment, names[2], default=rank)
    if not 0 <= rank < count:
        raise ArgumentError(names[0], expected=f"0..{count - 1}", got=str(rank))
    if names is _MPIRUN and "MASTER_ADDR" not in environment:
        local = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", default=count)
        if local != count:
            expected = f"the address of rank 0, as only {local} of {count} ranks are on this machine"
            raise ArgumentError("MASTER_ADDR", expected=expected, got="nothing")
    port = _number(environment, "MASTER_PORT", default=_DEFAULT_PORT)
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += 1  # torchrun itself listens at MASTER_PORT
    if not 0 < port < 2**16:
        raise ArgumentError("MASTER_PORT", expected="a port", got=str(port))
    return Place(
        rank=rank,
        count=count,
        local_rank=local_rank,
        host=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=port,
        key=next((environment[name] for name in _KEYS if name in environment), ""),
    )


def check_gpus(count: int) -> None:
    """Raise ``ArgumentError`` where this machine has fewer than ``count`` GPUs."""
    from flashllm.device import device_count

    found, problem = device_count()
    if count > found:
        expected = f"at most {found}, the GPUs of this machine" + (f" ({problem})" if problem else "")
        raise ArgumentError("tp", expected=expected, got=str(count))


def connect_nccl(place: Place, rendezvous: Rendezvous) -> GroupCommunicator:
    """Make the GPU of this rank the current one and connect it to those of the others, which must be of the same model.

    All ranks of a group compute all logits and must choose the same tokens; a different GPU or cuBLAS may round
    differently. Raises ``CommunicationError`` that names what differs, and what ``NcclCommunicator`` raises.
    """
    check_gpus(place.local_rank + 1)
    import cupy

    from flashllm import __version__
    from flashllm.baselines import cublas_api
    from flashllm.device import device_facts
    from flashllm.engine.nccl import NcclCommunicator

    cupy.cuda.Device(place.local_rank).use()
    rendezvous.agree({"flashllm": __version__, "GPU": device_facts().name, "cuBLAS": cublas_api.version()})
    return NcclCommunicator(rendezvous)


@contextlib.contextmanager
def open_group(
    count: int,
    *,
    connect: Connect = connect_nccl,
    environment: Mapping[str, str] = os.environ,
    seconds: float = SECONDS,
) -> Iterator[Group]:
    """The group of ``count`` ranks in which ``environment`` places this process, or this process alone.

    At the end of the block each rank waits for the others. An exception in one rank ends the group: in the others the
    next operation that needs another rank raises ``CommunicationError``, and a process that does not leave the block
    within a second, because it waits for its GPU, ends with status ``PEER_FAILED``. After the block the libraries that
    connect the ranks are not called any more; if one is still busy ending a failed group when Python exits, the process
    ends without waiting for it. Raises ``ArgumentError`` if ``count`` is not the number of ranks or a rank has no GPU,
    and ``CommunicationError`` if not all ranks have arrived after ``seconds`` or they differ.
    """
    place = place_of(environment) or Place()
    if place.count != count:
        raise ArgumentError("tp", expected=f"{place.count}, the number of ranks that were started", got=str(count))
    if count == 1:
        yield alone()
        return
    left = threading.Event()
    parent = environment.get(PARENT_PIPE)
    if parent is not None:
        _in_thread(_watch_parent, int(parent))
    communicator: GroupCommunicator | None = None
    rendezvous = meet(place, seconds=seconds)
    rendezvous.on_failure(lambda reason: _in_thread(_leave_soon, left, f"Error: {reason}"))
    try:
        communicator = connect(place, rendezvous)
        yield Group(rank=place.rank, count=count, communicator=communicator, rendezvous=rendezvous)
        rendezvous.close()
        left.set()
        if communicator is not None:
            communicator.leave()
    except BaseException as error:
        left.set()
        rendezvous.fail(f"rank {place.rank} has failed: {_said(error)}")
        if communicator is not None:
            # The exception's frames keep a captured step alive, and NCCL waits until it is gone, as it usually is by
            # the time Python exits.
            atexit.register(_end_beside, communicator, _status(error))
            with contextlib.suppress(KeyboardInterrupt):  # a second one, from a user who finds the first slow
                communicator.abort()
        raise


def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _watch_parent(pipe: int) -> None:
    """End when the process that started the ranks ends: it holds the other end of ``pipe`` for as long as it lives."""
    os.read(pipe, 1)
    _end("Error: the process that started the ranks has ended")


def _leave_soon(left: threading.Event, message: str) -> None:
    """End the process unless it leaves its group in time: a thread that waits for its GPU cannot be told anything.

    NCCL's abort would wake the thread, but only to continue with unfinished sums.
    """
    if not left.wait(_GRACE_SECONDS):
        _end(message)


def _end_beside(communicator: GroupCommunicator, status: int) -> None:
    """At Python's exit, end at once if an abort is under way: libraries must not be unloaded under a running thread."""
    if communicator.is_aborting:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                stream.flush()
        os._exit(status)


def _end(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())  # sys.stderr may be locked by a thread that waits
    os._exit(PEER_FAILED)


def _said(error: BaseException) -> str:
    if isinstance(error, FlashLLMError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _status(error: BaseException) -> int:
    """The exit status of a command after ``error``."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, CommunicationError):
        return PEER_FAILED
    own = getattr(error, "exit_code", None)  # errors of the command line have one
    if isinstance(own, int):
        return own
    return BAD_USAGE if isinstance(error, USAGE_ERRORS) else 1


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ArgumentError(name, expected="a number", got=repr(text)) from None
