# SPDX-License-Identifier: Apache-2.0
"""Builds kernels in child processes, so that a crash of the compiler costs one kernel and not the program.

A child reads pickled requests (spec, arch, root of the device code) from its standard input and answers
each with pickled machine code and metadata, or with the text of the error. The disk cache is the parent's.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from flashllm.errors import CompileError, FlashLLMError
from flashllm.jit.spec import KernelSpec


class BuildWorker:
    """One child process, started with the first kernel and again after a crash; use with ``with``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BuildWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def build(self, spec: KernelSpec, arch: str, root: Path) -> tuple[bytes, dict[str, Any]]:
        """Machine code and metadata of ``spec``. Raises :class:`CompileError`, also when the compiler dies."""
        if self._process is None:
            self._process = _start()
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            pickle.dump((spec, arch, root), requests)
            requests.flush()
            code, result = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = self._stop()
            raise CompileError(
                f"{spec.label}: the compiler process died on sm_{arch} ({_cause(status)}); "
                "a defect of NVRTC, or too little memory"
            ) from error
        if code is None:
            raise CompileError(result)
        return code, result

    def _stop(self) -> int:
        """End the child, if there is one, and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            process.communicate(timeout=10)  # closes its input, which ends it
        except (OSError, ValueError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        return process.returncode


def serve() -> None:
    """The child: answer requests until the input ends."""
    from flashllm.jit.compile import build

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    while True:
        try:
            spec, arch, root = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        answer: tuple[bytes | None, Any]
        try:
            answer = build(spec, arch, root)
        except FlashLLMError as error:
            answer = (None, str(error))
        except Exception as error:  # the parent must hear of it, whatever it is
            answer = (None, f"{spec.label}: {type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def _start() -> subprocess.Popen[bytes]:
    # The child finds the package wherever this process did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", "from flashllm.jit.workers import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _cause(status: int) -> str:
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"signal {-status}"
    return f"exit status {status}"
