# SPDX-License-Identifier: Apache-2.0
"""A few thousand damaged files, read in a process with little memory; `make fuzz` reads more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz_containers

SCRIPT = Path(fuzz_containers.__file__)
SEED = os.environ.get("FLASHLLM_FUZZ_SEED", "20260101")
CASES = os.environ.get("FLASHLLM_FUZZ_CASES", "4000")


def test_damaged_files() -> None:
    command = [sys.executable, str(SCRIPT), "--cases", CASES, "--seed", SEED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for outcome in ("npz read", "npz refused", "npy read", "npy refused", "weights refused", "safetensors refused"):
        assert outcome in done.stdout, "the damage is too small or too great to find anything"


PROGRAM = """
import ctypes, pathlib, sys, time
import fuzz_containers, hostile
from flashllm.io import matrices

def faulty(path):
    if "sound" not in path.name:
        FAULT

matrices._read_npy = faulty
npy = hostile.containers()["npy"]
object.__setattr__(npy, "use", lambda matrix: None)
hostile.containers = lambda: {"npy": npy}
fuzz_containers.SECONDS = 1
fuzz_containers.child(10, 1, pathlib.Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("bytearray(1 << 30)", "MemoryError"),
        ("time.sleep(60)", "TimeoutError"),
        ("ctypes.string_at(0)", "Segmentation fault"),
        ("raise IndexError(3)", "IndexError"),
    ],
)
def test_a_fault_of_a_reader_is_a_failure(tmp_path: Path, fault: str, shown: str) -> None:
    """The limits of the child process work."""
    path = os.pathsep.join([str(SCRIPT.parent), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", PROGRAM.replace("FAULT", fault), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False, timeout=60
    )
    assert done.returncode != 0
    assert shown in done.stderr
