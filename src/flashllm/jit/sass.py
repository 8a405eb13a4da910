# SPDX-License-Identifier: Apache-2.0
"""Machine code as text, by NVIDIA's disassembler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from flashllm.errors import CompileError, MissingDependencyError

_ARGUMENTS = {"nvdisasm": ["--print-code"], "cuobjdump": ["--dump-sass"]}


def find_disassembler() -> tuple[str, Path]:
    """Name and path of nvdisasm or cuobjdump. Raises :class:`MissingDependencyError`."""
    for name in _ARGUMENTS:
        if found := _find(name):
            return name, Path(found)
    raise MissingDependencyError(
        "neither nvdisasm nor cuobjdump was found: pip install nvidia-cuda-nvdisasm, "
        "or put the bin folder of a CUDA toolkit on the PATH"
    )


def disassemble(cubin: Path) -> str:
    """SASS of a cubin file."""
    name, program = find_disassembler()
    done = subprocess.run([program, *_ARGUMENTS[name], cubin], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{program} failed on {cubin}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _find(name: str) -> str | None:
    try:
        from cuda import pathfinder

        found: str | None = pathfinder.find_nvidia_binary_utility(name)
    except Exception:  # cuda-pathfinder missing, or too old to know the tool
        found = None
    return found or shutil.which(name)
