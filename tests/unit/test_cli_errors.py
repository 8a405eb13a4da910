# SPDX-License-Identifier: Apache-2.0
"""What a user sees when something is impossible: one line and the right exit status, whichever the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flashllm.bench import results
from flashllm.cli.main import command

SMALL = ("bench", "--backend", "reference", "--shape", "192x128", "--sparsity", "0.8", "--n", "8")


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def _one_error(result: Result) -> str:
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
    assert "Traceback" not in result.output
    return line


@pytest.mark.parametrize("arch", ["hopper", "75", "sm_61"])
def test_an_architecture_without_kernels_is_bad_usage(arch: str) -> None:
    result = _run("compile", "--arch", arch)
    assert result.exit_code == 2
    assert "arch: expected an architecture from 80 on" in _one_error(result)


@pytest.mark.parametrize("arguments", [("bench",), ("tune",)])
def test_a_device_that_is_not_there_is_bad_usage(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr("flashllm.device.device_count", lambda: (0, "the driver reports no GPU"))
    result = _run(*arguments, "--device", "1")
    assert result.exit_code == 2
    assert "--device: expected the number of a GPU, got 1, but the driver reports no GPU" in _one_error(result)


@pytest.mark.parametrize("command", ["bench", "verify"])
@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_a_device_is_nothing_for_a_backend_without_one(command: str, backend: str) -> None:
    result = _run(command, "--backend", backend, "--device", "0")
    assert result.exit_code == 2
    assert f"--device: expected nothing with --backend {backend}" in _one_error(result)


def test_a_csv_file_that_cannot_be_written_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def not_reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr("flashllm.bench.runner_host.run_host", not_reached)
    (tmp_path / "file").write_text("")
    result = _run(*SMALL, "--csv", str(tmp_path / "file" / "rows.csv"))
    assert result.exit_code == 2
    assert str(tmp_path / "file") in _one_error(result)


@pytest.mark.parametrize("option", ["--out", "--resume", "--weights"])
def test_csv_never_replaces_another_file_of_the_command(tmp_path: Path, option: str) -> None:
    path = tmp_path / "rows"
    path.touch()
    result = _run("bench", "--backend", "reference", "--n", "8", option, str(path), "--csv", str(path))
    assert (result.exit_code, path.read_bytes()) == (2, b"")
    assert f"--csv: expected another file than {option}" in _one_error(result)


@pytest.mark.parametrize("name", ["", "a/b", "a/"])
def test_a_name_to_save_as_is_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run(*SMALL, "--save", name)
    assert result.exit_code == 2
    assert f"--save: expected a name without folders, got {name!r}" in _one_error(result)


def test_only_rows_that_were_written_are_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "append", full)
    result = _run(*SMALL, "--out", str(tmp_path / "rows.jsonl"))
    assert result.exit_code == 1
    assert "rows appended" not in result.output


def test_csv_makes_its_folder(tmp_path: Path) -> None:
    assert _run(*SMALL, "--csv", str(tmp_path / "new" / "rows.csv")).exit_code == 0
    assert len((tmp_path / "new" / "rows.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("option", ["--out", "--resume"])
@pytest.mark.parametrize("content", ["no end of line", "a text\n"])
def test_rows_are_added_to_no_other_file(tmp_path: Path, option: str, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    result = _run(*SMALL, option, str(path))
    assert (result.exit_code, path.read_text()) == (2, content)
    assert str(path) in _one_error(result)


@pytest.mark.parametrize("option", ["--out", "--resume"])
def test_rows_never_go_on_a_line_that_a_crash_left_unfinished(tmp_path: Path, option: str) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(*SMALL, "--out", str(path)).exit_code == 0
    with path.open("ab") as file:
        file.write(b'{"torn')
    assert _run(*SMALL, "--seed", "1", option, str(path)).exit_code == 0
    assert [row.seed for row in results.read(path)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("bench", "--weights"), "--weights"),
        (("compare",), "BEFORE"),
        (("eval", ".", "--text"), "--text"),
        (("finetune", ".", "-o", "out", "--text"), "--text"),
        (("generate", ".", "--prompts"), "--prompts"),
        (("inspect",), "FILE"),
        (("prune", ".", "-o", "out", "--sparsity", "0.5", "--calib"), "--calib"),
        (("report",), "RESULTS"),
        (("table",), "RESULTS"),
    ],
)
def test_a_file_that_is_not_there_is_named_by_its_argument(
    tmp_path: Path, arguments: tuple[str, ...], name: str
) -> None:
    absent = tmp_path / "absent"
    result = _run(*arguments, str(absent))
    assert result.exit_code == 2
    assert result.stderr == f"Error: {name}: expected a file, found none at '{absent}'\n"


@pytest.mark.parametrize("command", ["prune", "finetune", "convert"])
def test_packed_weights_are_told_from_a_checkpoint(tmp_path: Path, command: str) -> None:
    (tmp_path / "flashllm.json").write_text("{}")
    more = {"prune": ("--sparsity", "0.5", "--method", "magnitude"), "finetune": ("--text", __file__), "convert": ()}
    result = _run(command, str(tmp_path), "-o", str(tmp_path / "out"), *more[command])
    assert result.exit_code == 2
    assert f"MODEL: expected a checkpoint, got sparse weights in {tmp_path}" in _one_error(result)


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_a_time_cap_is_a_number_of_seconds(seconds: str) -> None:
    result = _run(*SMALL, "--time-cap", seconds)
    assert result.exit_code == 2
    assert _one_error(result) == f"Error: --time-cap: expected seconds from 0.01 on, got {seconds}"


def test_options_of_timing_are_said_to_have_no_effect_without_a_gpu() -> None:
    result = _run(*SMALL, "--l2", "warm", "--pdl")
    assert result.exit_code == 0
    assert "\n--l2, --pdl: without effect" in result.stderr
    assert "without effect" not in _run(*SMALL).stderr


def test_a_matrix_too_large_for_the_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 1.73 EiB")

    monkeypatch.setattr("flashllm.bench.runner_host.run_host", refuse)
    result = _run(*SMALL)
    assert (result.exit_code, _one_error(result)) == (2, "Error: Unable to allocate 1.73 EiB")
    monkeypatch.setattr("flashllm.jit.cache.info", refuse)
    result = _run("cache", "info")
    assert (result.exit_code, _one_error(result)) == (1, "Error: Unable to allocate 1.73 EiB")


def test_system_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> int:
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("flashllm.jit.cache.clear", refuse)
    result = _run("cache", "clear")
    assert result.exit_code == 1
    assert _one_error(result) == "Error: [Errno 13] Permission denied: '/cache'"
    assert isinstance(_run("--traceback", "cache", "clear").exception, PermissionError)


def test_a_closed_pipe_is_no_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("flashllm.bench.report.markdown", closed)
    (tmp_path / "rows.jsonl").write_text("")
    result = _run("table", str(tmp_path / "rows.jsonl"))
    assert (result.exit_code, result.stderr) == (1, "")


def test_ctrl_c_is_status_130_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashllm.jit.cache.info", interrupt)
    result = _run("cache", "info")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
