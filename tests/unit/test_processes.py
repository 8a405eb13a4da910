# SPDX-License-Identifier: Apache-2.0
"""Processes of a group: how they are started, what they learn about each other, and that they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flashllm.engine import processes
from flashllm.engine.processes import launch_ranks

SOON = 8.0
"""Seconds within which all ranks end once one has, even on a busy machine."""


# What a rank runs: WORK is a statement for inside the block, BUSY whether a library does not end.
RANK = """
import os, signal, sys, time
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.parallel import open_group
from flashllm.statuses import PEER_FAILED
rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

class Fake:
    is_aborting = BUSY
    def leave(self): print("left", file=sys.stderr)
    def abort(self): print("aborted", file=sys.stderr, flush=True)

try:
    with open_group(count, connect=lambda place, rendezvous: Fake()) as group:
        group.rendezvous.barrier()
        WORK
except CommunicationError as error:
    print(f"heard: {error}", flush=True)
    sys.exit(PEER_FAILED)
"""


def command(work: str, *, busy: bool = False) -> list[str]:
    return [sys.executable, "-c", RANK.replace("WORK", work).replace("BUSY", str(busy))]


def run(count: int, work: str) -> tuple[int, float]:
    """Exit status, and how long the run took."""
    start = time.monotonic()
    return launch_ranks(count, command(work)), time.monotonic() - start


def test_ranks_meet_and_only_rank_0_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    names = "('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')"
    work = (
        f"print(group.rendezvous.gather([os.environ[name] for name in {names}]), flush=True); "
        "print('note of', rank, file=sys.stderr)"
    )
    status, _ = run(3, work)
    output, errors = capfd.readouterr()
    assert status == 0
    assert output == f"{[[str(rank), '3', str(rank), '3', '127.0.0.1'] for rank in range(3)]}\n"
    assert errors == "note of 0\nleft\n"


def test_groups_run_at_the_same_time() -> None:
    code = f"from flashllm.engine.processes import launch_ranks; raise SystemExit(launch_ranks(2, {command('pass')}))"
    launchers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [one.wait(60) for one in launchers] == [0, 0]


def test_a_rank_that_is_killed_ends_one_that_cannot_hear(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 sleeps where a real one waits for its GPU: it runs none of our code. The others wait for a message."""
    status, seconds = run(
        3,
        "rank == 1 and os.kill(os.getpid(), signal.SIGKILL); rank == 0 and time.sleep(60); group.rendezvous.barrier()",
    )
    output, errors = capfd.readouterr()
    assert seconds < SOON
    assert status == 128 + signal.SIGKILL
    assert errors == "Error: rank 1 has ended\nError: rank 1 of 3 was ended by signal 9, killed\n"
    assert output == ""


def test_a_rank_that_waits_for_a_message_hears_of_it_and_leaves(capfd: pytest.CaptureFixture[str]) -> None:
    status, seconds = run(2, "rank and sys.exit(3); group.rendezvous.barrier(seconds=50)")
    output, errors = capfd.readouterr()
    assert seconds < SOON
    assert status == 3
    assert output == "heard: rank 1 has failed: SystemExit: 3\n"
    assert errors == "aborted\nrank 1: aborted\nError: rank 1 of 2 ended with status 3\n"


def test_an_error_of_one_rank_is_shown_with_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    status, seconds = run(2, "rank and [][1]; time.sleep(60)")
    _, errors = capfd.readouterr()
    assert seconds < SOON
    assert status == 1
    assert errors.startswith("Error: rank 1 has failed: IndexError: list index out of range\n")
    assert "\nrank 1: IndexError: list index out of range\n" in errors
    assert errors.endswith("\nError: rank 1 of 2 ended with status 1\n")


CTRL_C_TWICE = (
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "Fake.abort = lambda self: (signal.raise_signal(signal.SIGINT), time.sleep(0.1)); "
    "signal.raise_signal(signal.SIGINT)"
)


@pytest.mark.parametrize(
    ("busy", "ending", "status"),
    [
        (False, "sys.exit(3)", 3),
        (True, "sys.exit(3)", 3),
        (True, "[][1]", 1),
        (True, "raise FileNotFoundError", 2),
        (True, "raise KeyboardInterrupt", 130),
        (True, CTRL_C_TWICE, 130),
    ],
    ids=["left", "exit", "error", "bad usage", "Ctrl-C", "Ctrl-C twice"],
)
def test_libraries_are_not_taken_down_beside_one_that_is_busy(
    busy: bool, ending: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message is shown first, and the exit status is that of the error."""
    *python, code = command(f"print('said', end=' '); {ending}", busy=busy)
    assert launch_ranks(2, [*python, f"import atexit; atexit.register(print, 'taken down')\n{code}"]) == status
    assert capfd.readouterr().out == ("said " if busy else "said taken down\n")


def test_an_error_of_all_ranks_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    status, _ = run(3, "print('no such file', file=sys.stderr); sys.exit(2)")
    assert status == 2
    assert capfd.readouterr().err.splitlines().count("no such file") == 1


def test_an_error_of_rank_0_alone_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    work = "group.of_rank_0(lambda: print('no such file', file=sys.stderr, flush=True) or sys.exit(2))"
    status, _ = run(3, work)
    assert status == 2
    assert capfd.readouterr().err == "no such file\naborted\n"


def test_a_rank_that_never_comes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not learn of it; it is terminated."""
    monkeypatch.setattr(processes, "_PEERS_SECONDS", 0.2)
    start = time.monotonic()
    code = "import os, sys; int(os.environ['RANK']) and sys.exit(4); import time; time.sleep(60)"
    assert launch_ranks(2, [sys.executable, "-c", code]) == 4
    assert time.monotonic() - start < SOON
    assert capfd.readouterr().err == "Error: rank 1 of 2 ended with status 4\n"


def test_nothing_is_left_of_a_rank_that_ignores_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_PEERS_SECONDS", 0.2)
    monkeypatch.setattr(processes, "_TERMINATED_SECONDS", 0.2)
    file = tmp_path / "pid"
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    file.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    file.with_suffix('.new').rename(file)\n"
        "    time.sleep(60)\n"
        "while not file.exists(): time.sleep(0.01)\n"
        "sys.exit(5)\n"
    )
    assert launch_ranks(2, [sys.executable, "-c", code]) == 5
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("stop", ["terminal", "launcher", "killed"])
def test_all_end_with_the_launcher(stop: str) -> None:
    """Ctrl-C in a terminal reaches all processes; a signal from another process reaches only the launcher."""
    work = command("print(group.rendezvous.gather(os.getpid()), flush=True); time.sleep(60)")
    code = (
        # A shell that runs the tests in the background with & makes them ignore it.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from flashllm.engine.processes import launch_ranks; sys.exit(launch_ranks(2, {work!r}))"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    ranks = [int(text) for text in launcher.stdout.readline().strip("[]\n").split(",")]
    start = time.monotonic()
    if stop == "terminal":
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.send_signal(signal.SIGINT if stop == "launcher" else signal.SIGKILL)
    _, errors = launcher.communicate(timeout=30)  # ends only once rank 0 has closed its output, too
    assert launcher.returncode == (-signal.SIGKILL if stop == "killed" else 130)
    assert ("the process that started the ranks has ended" in errors) == (stop == "killed")
    _eventually(lambda: not any(map(_is_running, ranks)))
    assert time.monotonic() - start < SOON


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody may have asked for its status yet


def _eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
