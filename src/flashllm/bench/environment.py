# SPDX-License-Identifier: Apache-2.0
"""What a row says about the code and the machine that made it."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flashllm.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Fields that all rows of a run share."""

    run_id: str
    sweep_id: str
    commit: str | None
    dirty: bool | None
    command: str
    backend: str
    gpu: str | None = None
    arch: str | None = None
    sm_count: int | None = None
    driver: str | None = None
    cuda: str | None = None
    cupy: str | None = None
    cublas: str | None = None


def utc_now() -> str:
    """The time now, e.g. ``2026-11-23T06:37:00Z``."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def commit_and_dirty(package: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit this code comes from and whether it has been changed since.

    From ``FLASHLLM_COMMIT`` and ``FLASHLLM_DIRTY`` (0 or 1) where the first is set, for example for a copy of a
    checkout about which git knows nothing or something else; otherwise from git, if the package lies in a checkout of
    its own; otherwise unknown. Files outside src and cuda do not make it dirty.
    """
    if told := os.environ.get("FLASHLLM_COMMIT"):
        dirty = os.environ.get("FLASHLLM_DIRTY")
        if dirty is not None and dirty.lower() not in ("0", "1", "true", "false"):
            raise ArgumentError("FLASHLLM_DIRTY", expected="0 or 1", got=repr(dirty))
        return told, None if dirty is None else dirty.lower() in ("1", "true")
    package = package or Path(__file__).parent.parent
    commit = _git(package, "rev-parse", "HEAD")
    if not commit or not _git(package, "ls-files", "--error-unmatch", "__init__.py"):
        return None, None
    top = Path(_git(package, "rev-parse", "--show-toplevel") or package)
    changed = _git(top, "status", "--porcelain", "--", "src", "cuda")
    return commit, None if changed is None else bool(changed)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def collect(backend: str, *, sweep_id: str | None = None) -> Environment:
    """Facts about this run, and about the current GPU when ``backend`` is ``"cuda"``."""
    run_id = secrets.token_hex(6)
    commit, dirty = commit_and_dirty()
    command = shlex.join(["flashllm", *sys.argv[1:]])
    if backend != "cuda":
        return Environment(
            run_id=run_id,
            sweep_id=sweep_id or run_id,
            commit=commit,
            dirty=dirty,
            command=command,
            backend=backend,
        )
    import cupy

    from flashllm.baselines import cublas_api
    from flashllm.bench.telemetry import driver_version
    from flashllm.device import device_facts

    facts = device_facts()
    runtime = int(cupy.cuda.runtime.runtimeGetVersion())
    return Environment(
        run_id=run_id,
        sweep_id=sweep_id or run_id,
        commit=commit,
        dirty=dirty,
        command=command,
        backend=backend,
        gpu=facts.name,
        arch=f"sm_{facts.arch}",
        sm_count=facts.sm_count,
        driver=driver_version(),
        cuda=f"{runtime // 1000}.{runtime % 1000 // 10}",
        cupy=str(cupy.__version__),
        cublas=cublas_api.version(),
    )


def result_name(gpu: str | None, what: str) -> str:
    """File name of a run: ``<UTC yyyymmddThhmmss>-<gpu>-<what>.jsonl``, so that name order is time order."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    words = re.sub(r"[^a-z0-9]+", "-", (gpu or "no-gpu").lower().replace("nvidia", "")).strip("-")
    return f"{stamp}-{words}-{what}.jsonl"
