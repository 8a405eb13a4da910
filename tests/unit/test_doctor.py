# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import flashllm
from flashllm.cli import doctor
from flashllm.cli.doctor import Check

NAMES = [
    "Python",
    "NumPy",
    "device code",
    "kernel cache",
    "NVRTC",
    "CUDA headers",
    "driver",
    "CuPy",
    "GPU",
    "cuBLAS",
    "C++ compiler",
]


def _json() -> dict[str, Any]:
    result = CliRunner().invoke(doctor.command, ["--json"])
    report: dict[str, Any] = json.loads(result.output)
    report["exit_code"] = result.exit_code
    return report


def test_reports_every_part_of_the_machine() -> None:
    report = _json()
    assert [check["name"] for check in report["checks"]] == NAMES
    assert report["flashllm"] == flashllm.__version__
    assert report["platform"]
    assert report["reference"] is True
    assert report["exit_code"] == 0
    for check in report["checks"]:
        assert check["found"], check
        assert check["fix"], check


def test_text_gives_the_fix_under_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks() -> list[Check]:
        return [
            Check(name="NumPy", ok=True, found="2.4", fix="", needed_for="everything"),
            Check(name="NVRTC", ok=False, found="none", fix="pip install it", needed_for="compiling"),
        ]

    monkeypatch.setattr(doctor, "run_checks", checks)
    result = CliRunner().invoke(doctor.command)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["ok", "NumPy", "2.4"]
    assert lines[1].split() == ["missing", "NVRTC", "none"]
    assert lines[2].strip() == "for compiling: pip install it"
    assert lines[-4].split() == ["NumPy", "reference", "yes"]
    assert lines[-3].split() == ["emulate", "kernels", "yes"]
    assert lines[-2].split() == ["compile", "kernels", "no"]
    assert lines[-1].split()[-1] == "no"


def test_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(blocked / "cache"))
    report = _json()
    check = next(check for check in report["checks"] if check["name"] == "kernel cache")
    assert not check["ok"]
    assert "FLASHLLM_CACHE_DIR" in check["fix"]
    assert report["reference"] is True, "kernels are then kept for the process only"
    assert report["exit_code"] == 0


def test_emulator_needs_only_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CXX", "no-such-compiler")
    report = _json()
    check = next(check for check in report["checks"] if check["name"] == "C++ compiler")
    assert (check["ok"], report["emulator"], report["reference"]) == (False, False, True)
    assert "no-such-compiler" in check["found"]
    assert check["fix"] == "sudo apt-get install g++"


@pytest.mark.parametrize(("cuda", "package"), [(12040, "cupy-cuda12x"), (13000, "cupy-cuda13x"), (None, "cupy-")])
def test_fixes_match_the_driver(monkeypatch: pytest.MonkeyPatch, cuda: int | None, package: str) -> None:
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: cuda)
    checks = {check.name: check for check in doctor.run_checks()}
    assert package in checks["CuPy"].fix
    assert checks["driver"].ok == (cuda is not None)


def test_a_crashing_check_is_a_line_not_a_traceback() -> None:
    def crash() -> str:
        raise RuntimeError("broken installation\nwith details")

    check = doctor._guarded("x", crash, fix="repair", needed_for="everything")
    assert not check.ok
    assert check.found == "broken installation"
