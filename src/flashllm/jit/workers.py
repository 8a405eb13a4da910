# SPDX-License-Identifier: Apache-2.0
"""Builds kernels in child processes, so that a crash of the compiler costs one kernel and not the program.

A request is a line of JSON on the child's standard input: spec, arch, root of the device code. The answer is
a line of JSON, either with the metadata and the size of the machine code, which follows it, or with the text
of the error. The disk cache is left to the parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
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
            request = {"spec": asdict(spec), "arch": arch, "root": str(root)}
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            answer = json.loads(answers.readline())  # at the end of its output there is no line, and so no JSON
            failure = answer.get("error")
            code = b"" if failure else answers.read(answer["size"])
            if not failure and len(code) != answer["size"]:
                raise EOFError
        except (OSError, EOFError, ValueError) as error:
            status = self._stop()
            raise CompileError(
                f"{spec.label}: the compiler process died on sm_{arch} ({_cause(status)}); "
                "a defect of NVRTC, or too little memory"
            ) from error
        if failure:
            raise CompileError(failure)
        return code, answer["meta"]

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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches parent and child; the parent ends the child
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    for line in sys.stdin.buffer:
        request = json.loads(line)
        spec = _spec(request["spec"])
        code, answer = b"", {}
        try:
            code, meta = build(spec, request["arch"], Path(request["root"]))
            answer = {"meta": meta, "size": len(code)}
        except FlashLLMError as error:
            answer = {"error": str(error)}
        except Exception as error:  # the parent must hear of it, whatever it is
            answer = {"error": f"{spec.label}: {type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n" + code)
        answers.flush()


def _spec(fields: dict[str, Any]) -> KernelSpec:
    """The spec whose ``asdict`` went through JSON, which has lists for tuples."""
    template = tuple((name, text) for name, text in fields["template"])
    return KernelSpec(**{**fields, "template": template, "archs": tuple(fields["archs"])})


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
