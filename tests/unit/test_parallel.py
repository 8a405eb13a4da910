# SPDX-License-Identifier: Apache-2.0
"""A process in a group: its place, and what commands do with it. No GPU is needed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from flashllm import errors
from flashllm.cli import _parallel, main
from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.engine import parallel
from flashllm.engine.communicator import CommunicationError
from flashllm.engine.parallel import Group, check_gpus, open_group, place_of
from flashllm.engine.processes import launch_ranks
from flashllm.engine.rendezvous import Place
from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import ArgumentError
from flashllm.statuses import INTERRUPTED, PEER_FAILED

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


@click.command()
@_parallel.tensor_parallel_option
def program(tp: int) -> None:
    with _parallel.tensor_parallel(tp) as group:
        click.echo(f"rank {group.rank} of {group.count}")
        click.echo("statistics", err=True)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that is not a rank, with two GPUs and without NCCL."""
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

    outside.setattr("flashllm.engine.processes.launch_ranks", launched)
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
    outside.setattr("flashllm.engine.processes.launch_ranks", lambda *_: pytest.fail("ranks are started"))
    outside.setenv("NCCL_NVLS_ENABLE", multicast)
    done = CliRunner().invoke(program, arguments)
    assert isinstance(done.exception, ArgumentError)
    assert message in str(done.exception)


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(), SystemExit(3), SystemExit("text"), click.exceptions.Exit(4), KeyboardInterrupt(),
        CommunicationError("rank 1 has ended"), click.ClickException("failed"), BadUsage("--prompt"),
        errors.ArgumentError("a", expected="b", got="c"), errors.FormatError(field="a", expected="b", got="c"),
        errors.DeviceMemoryError("a", needed=2, free=1), errors.MissingDependencyError("none"),
        errors.UnsupportedDeviceError("old"), FileNotFoundError("none"), errors.VerificationError("a"), ValueError(),
    ],
    ids=repr,
)  # fmt: skip
def test_the_status_kept_for_the_end_is_that_of_the_command(outside: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def failing() -> None:
        with usage_errors(), _parallel.tensor_parallel(1):
            raise error

    outside.setattr(main.LazyGroup, "get_command", lambda *_: failing)
    assert CliRunner().invoke(main.command, ["failing"]).exit_code == parallel._status(error)


def test_ranks_of_decode_bench_compare_options_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(facts: dict[str, Any]) -> None:
        raise CommunicationError(str(facts))

    rendezvous: Any = SimpleNamespace(agree=agree)
    group = Group(rank=1, count=2, communicator=None, rendezvous=rendezvous)
    monkeypatch.setattr("flashllm.cli.decode_bench.tensor_parallel", lambda _: contextlib.nullcontext(group))
    done = CliRunner().invoke(main.command, ["decode-bench", "--sparsity", "0.6,0.7", "--layers", "2"])
    wanted = {
        "--model": "opt-30b", "--sparsity": "0.6,0.7", "--systems": "sparse,dense", "--format": "auto",
        "--batch": "8,16,32,64", "--prompt": 64, "--output": 512, "--dtype": "fp16", "--layers": 2,
    }  # fmt: skip
    assert done.output == f"Error: {wanted}\n"


COMMAND = """
import sys, time
import click
from flashllm.cli import _parallel
from flashllm.engine import parallel
from flashllm.errors import FormatError
class Nothing:
    is_aborting = False
    def leave(self): pass
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
    """Every rank except the first is silent, even where nothing hides its output."""
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
    assert PEER_FAILED not in (0, 1, 2, INTERRUPTED)
