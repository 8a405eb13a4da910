# SPDX-License-Identifier: Apache-2.0
"""Processes of a group: their places, how they are started, and that they end together. No GPU is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from flashllm.cli import _parallel
from flashllm.engine import launch
from flashllm.engine.launch import launch_ranks
from flashllm.engine.parallel import PEER_FAILED, Group, check_gpus, open_group, place_of
from flashllm.engine.rendezvous import Place
from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import ArgumentError

SOON = 8.0
"""Seconds in which all ranks end once one has, on a busy machine too."""

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "job",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prte-7",
}  # fmt: skip
OURS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "4000", "FLASHLLM_GROUP": "abc"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (TORCHRUN, Place(rank=5, count=8, local_rank=1, host="node0", port=29501, key="job")),
        (MPIRUN, Place(rank=1, count=2, local_rank=1, port=29611, key="prte-7")),
        (
            MPIRUN | {"MASTER_PORT": "7", "MASTER_ADDR": "b"},
            Place(rank=1, count=2, local_rank=1, host="b", port=7, key="prte-7"),
        ),
        (OURS | MPIRUN, Place(rank=0, count=2, port=4000, key="abc")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(rank=1, count=2, local_rank=1, port=29611)),
    ],
    ids=["none", "rank", "size", "torchrun", "mpirun", "mpirun at a place", "ours in mpirun", "bare"],
)  # fmt: skip
def test_the_place_that_the_environment_gives(environment: Mapping[str, str], place: Place | None) -> None:
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (OURS | {"RANK": "one"}, "RANK: expected a number, got 'one'"),
        (OURS | {"RANK": "2"}, "RANK: expected 0..1, got 2"),
        (OURS | {"WORLD_SIZE": "0"}, "RANK: expected 0..-1, got 0"),
        (OURS | {"LOCAL_RANK": ""}, "LOCAL_RANK: expected a number, got ''"),
        (OURS | {"MASTER_PORT": "65536"}, "MASTER_PORT: expected a port, got 65536"),
        (
            MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "MASTER_ADDR: expected the address of rank 0, as only 1 of 2 ranks are on this machine, got nothing",
        ),
    ],
)
def test_an_environment_that_makes_no_sense(wrong: Mapping[str, str], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        place_of(wrong)
    assert str(caught.value) == message


def test_a_group_of_one_needs_nothing() -> None:
    def no_gpu(*_: object) -> None:
        raise AssertionError("NCCL is started")

    with open_group(1, connect=no_gpu, environment={}) as group:
        assert group.communicator is None
        assert group.shard == WHOLE
        assert group.rendezvous.gather(3) == [3]


def test_a_group_of_another_size_than_was_started() -> None:
    with pytest.raises(ArgumentError, match="tp: expected 8, the number of ranks that were started, got 2"):
        open_group(2, environment=TORCHRUN).__enter__()


def test_the_shard_of_a_rank() -> None:
    group = Group(rank=1, count=4, communicator=None, rendezvous=None)  # type: ignore[arg-type]
    assert group.shard == Shard(index=1, count=4)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.device_count", lambda: (2, None))
    check_gpus(2)
    with pytest.raises(ArgumentError, match="tp: expected at most 2, the GPUs of this machine, got 3"):
        check_gpus(3)
    monkeypatch.setattr("flashllm.device.device_count", lambda: (0, "no driver"))
    with pytest.raises(ArgumentError, match=r"tp: expected at most 0, the GPUs of this machine \(no driver\), got 1"):
        check_gpus(1)


# What a rank runs: WORK is a statement for inside the block.
RANK = """
import os, signal, sys, time
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.parallel import PEER_FAILED, open_group
rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

class Aborted:
    def all_reduce(self, array): pass
    def abort(self): print("aborted", file=sys.stderr, flush=True)

try:
    with open_group(count, connect=lambda place, rendezvous: Aborted()) as group:
        group.rendezvous.barrier()
        WORK
except CommunicationError as error:
    print(f"heard: {error}", flush=True)
    sys.exit(PEER_FAILED)
"""


def command(work: str) -> list[str]:
    return [sys.executable, "-c", RANK.replace("WORK", work)]


def run(count: int, work: str) -> tuple[int, float]:
    """Exit status and how long it took."""
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
    assert errors == "note of 0\n"


def test_groups_run_at_the_same_time() -> None:
    code = (
        f"import sys; from flashllm.engine.launch import launch_ranks; sys.exit(launch_ranks(2, {command('pass')!r}))"
    )
    launchers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [one.wait(60) for one in launchers] == [0, 0]


def test_a_rank_that_is_killed_ends_one_that_cannot_hear(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 sleeps where another waits for its GPU: it runs nothing of ours. The others wait for a message."""
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


def test_an_error_of_all_ranks_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    status, _ = run(3, "print('no such file', file=sys.stderr); sys.exit(2)")
    assert status == 2
    assert capfd.readouterr().err.splitlines().count("no such file") == 1


def test_a_rank_that_never_comes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not hear of it: it is ended."""
    monkeypatch.setattr(launch, "_PEERS_SECONDS", 0.2)
    start = time.monotonic()
    code = "import os, sys; int(os.environ['RANK']) and sys.exit(4); import time; time.sleep(60)"
    assert launch_ranks(2, [sys.executable, "-c", code]) == 4
    assert time.monotonic() - start < SOON
    assert capfd.readouterr().err == "Error: rank 1 of 2 ended with status 4\n"


def test_nothing_is_left_of_a_rank_that_ignores_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "_PEERS_SECONDS", 0.2)
    monkeypatch.setattr(launch, "_TERMINATED_SECONDS", 0.2)
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
    """Ctrl-C of a terminal reaches all processes, a signal of another process the launcher alone."""
    work = command("print(group.rendezvous.gather(os.getpid()), flush=True); time.sleep(60)")
    code = (
        # A shell that runs the tests behind & has them ignore it.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from flashllm.engine.launch import launch_ranks; sys.exit(launch_ranks(2, {work!r}))"
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
    _, errors = launcher.communicate(timeout=30)  # ends once rank 0 has closed its output, too
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


@click.command()
@_parallel.tensor_parallel_option
def program(tp: int) -> None:
    with _parallel.tensor_parallel(tp) as group:
        click.echo(f"rank {group.rank} of {group.count}")
        click.echo("statistics", err=True)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Not in a rank, with two GPUs and without any NCCL."""
    for name in (*TORCHRUN, *MPIRUN, *OURS, "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("flashllm.device.device_count", lambda: (2, None))
    return monkeypatch


def test_a_command_for_one_gpu_runs_here(outside: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(program, [])
    assert (done.exit_code, done.output) == (0, "rank 0 of 1\nstatistics\n")


def test_a_command_for_two_gpus_runs_in_ranks(outside: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def launched(count: int, command: list[str]) -> int:
        started.append((count, command, os.environ["NCCL_NVLS_ENABLE"]))
        return 7

    outside.setattr("flashllm.engine.launch.launch_ranks", launched)
    outside.setattr(sys, "argv", ["flashllm", "generate", "model", "--tp", "2"])
    outside.setenv("NCCL_NVLS_ENABLE", "0")
    done = CliRunner().invoke(program, ["--tp", "2"])
    assert (done.exit_code, done.output) == (7, "")
    assert started == [(2, [sys.executable, "-m", "flashllm", "generate", "model", "--tp", "2"], "0")]


@pytest.mark.parametrize(
    ("arguments", "multicast", "message"),
    [(["--tp", "3"], "0", "at most 2, the GPUs of this machine"), (["--tp", "2"], "1", "NVLink multicast stays off")],
)
def test_a_command_that_cannot_start(
    outside: pytest.MonkeyPatch, arguments: list[str], multicast: str, message: str
) -> None:
    outside.setattr("flashllm.engine.launch.launch_ranks", lambda *_: pytest.fail("ranks are started"))
    outside.setenv("NCCL_NVLS_ENABLE", multicast)
    done = CliRunner().invoke(program, arguments)
    assert isinstance(done.exception, ArgumentError)
    assert message in str(done.exception)


COMMAND = """
import sys, time
import click
from flashllm.cli import _parallel
from flashllm.engine import parallel
from flashllm.errors import FormatError
class Nothing:
    def all_reduce(self, array): pass
    def abort(self): pass
parallel.open_group.__wrapped__.__kwdefaults__["connect"] = lambda place, rendezvous: Nothing()
@click.command()
@_parallel.tensor_parallel_option
def program(tp):
    with _parallel.tensor_parallel(tp) as group:
        click.echo(f"rank {group.rank} of {group.count}")
        click.echo("statistics", err=True)
        group.rendezvous.barrier()
        WORK
        group.rendezvous.barrier()
program()
"""


@pytest.mark.parametrize("arguments", [[], ["--tp", "2"]])
def test_ranks_of_torchrun_need_no_launcher(arguments: list[str]) -> None:
    """Each rank is silent but the first, even where nobody hides its output."""
    from flashllm.engine.rendezvous import free_port

    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND.replace("WORK", "pass"), *arguments],
            env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["rank 0 of 2\nstatistics\n", ""]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_a_command_says_which_rank_has_failed(capfd: pytest.CaptureFixture[str]) -> None:
    code = COMMAND.replace("WORK", "if group.rank: raise click.ClickException('no memory')")
    assert launch_ranks(2, [sys.executable, "-c", code]) == 1
    output, errors = capfd.readouterr()
    assert output == "rank 0 of 2\n"
    assert errors == (
        "statistics\nError: rank 1 has failed: ClickException: no memory\n"
        "rank 1: Error: no memory\nError: rank 1 of 2 ended with status 1\n"
    )


def test_the_status_of_a_rank_that_ends_for_another_is_not_one_of_the_command_line() -> None:
    assert PEER_FAILED not in (0, 1, 2, launch.INTERRUPTED)
