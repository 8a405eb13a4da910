# SPDX-License-Identifier: Apache-2.0
"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no reports, except on deliberate mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

from flashllm.backends import emulator
from flashllm.backends.emulator_build import compile_all

PROGRAM = Path(__file__).parent / "sanitized.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **emulator.sanitizer_environment(), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


def test_kernels_pass() -> None:
    for build, specs in sanitized.builds(sanitized.jobs()).items():
        compile_all(specs, build)  # here, since in the program compilers too would run under the sanitizers
    done = run("products")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("mistake", "report"),
    [(0, ""), (1, "AddressSanitizer: heap-buffer-overflow"), (2, "runtime error: signed integer overflow")],
)
def test_mistakes_are_reported(mistake: int, report: str) -> None:
    done = run("plain", str(mistake))
    assert (done.returncode == 0) == (mistake == 0), done.stderr[-3000:]
    assert report in done.stderr
    if mistake:
        assert "broken.cu" in done.stderr
