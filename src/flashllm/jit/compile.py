# SPDX-License-Identifier: Apache-2.0
"""Compiles a :class:`KernelSpec` to machine code for one architecture; needs NVRTC but no GPU."""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flashllm.errors import CompileError, MissingDependencyError
from flashllm.jit import cache, sources
from flashllm.jit.resources import Resources, parse_ptxas
from flashllm.jit.spec import KernelSpec, normalize_arch
from flashllm.jit.toolchain import toolchain
from flashllm.jit.workers import BuildWorker

_SCHEMA = 1
_STD = "c++17"
_PTXAS_OPTIONS = ("-v",)
_import_lock = threading.Lock()  # two threads that import cuda.core for the first time disturb each other


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """Machine code of one kernel for one architecture, on disk."""

    path: Path
    lowered_name: str
    resources: Resources
    arch: str
    cached: bool
    """True when the code came from the disk cache."""


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """Outcome of one job of :func:`compile_many`: exactly one of ``cubin`` and ``error`` is set."""

    spec: KernelSpec
    arch: str
    cubin: Cubin | None = None
    error: CompileError | None = None


def compile_kernel(
    spec: KernelSpec,
    arch: str,
    *,
    allow_spills: bool = False,
    source_root: Path | None = None,
    cache_dir: Path | None = None,
) -> Cubin:
    """Compile ``spec`` for ``arch`` (``"90a"`` or ``"sm_90a"``), or take it from the disk cache.

    ``source_root`` and ``cache_dir`` replace the package's device code and the user's cache.
    Raises :class:`CompileError` when the kernel is not written for ``arch``, does not compile, or
    (unless ``allow_spills``) uses local memory; :class:`MissingDependencyError` without a compiler.
    """
    return _compile(build, spec, arch, allow_spills=allow_spills, source_root=source_root, cache_dir=cache_dir)


def compile_many(
    jobs: Iterable[tuple[KernelSpec, str]],
    *,
    workers: int = 2,
    allow_spills: bool = False,
    source_root: Path | None = None,
    cache_dir: Path | None = None,
) -> list[CompileResult]:
    """Compile every (spec, arch) pair; results in the order of ``jobs``, failures included, none raised.

    What is not in the cache is built by ``workers`` child processes at a time, so that not even a crash of
    the compiler ends this one.
    """
    work = list(jobs)
    toolchain()  # a missing compiler is one error, not one per job
    idle: SimpleQueue[BuildWorker] = SimpleQueue()

    def one(job: tuple[KernelSpec, str]) -> CompileResult:
        spec, arch = job
        worker = idle.get()
        try:
            cubin = _compile(
                worker.build, spec, arch, allow_spills=allow_spills, source_root=source_root, cache_dir=cache_dir
            )
        except CompileError as error:
            return CompileResult(spec=spec, arch=arch, error=error)
        finally:
            idle.put(worker)
        return CompileResult(spec=spec, arch=arch, cubin=cubin)

    count = max(1, min(workers, len(work)))
    with ExitStack() as stack:
        for _ in range(count):
            idle.put(stack.enter_context(BuildWorker()))
        return list(stack.enter_context(ThreadPoolExecutor(max_workers=count)).map(one, work))


def build(spec: KernelSpec, arch: str, root: Path) -> tuple[bytes, dict[str, Any]]:
    """Machine code and cache metadata of ``spec``, always built anew; ``root`` holds the device code."""
    tools = toolchain()
    try:
        with _import_lock:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda-core 1.1 or newer is needed to compile ({error}); `flashllm doctor` says what to install"
        ) from error
    text = (root / spec.source).read_text(encoding="utf-8")
    log = io.StringIO()
    options = ProgramOptions(
        name=spec.source,  # the file name of error messages and of sanitizer reports
        std=_STD,
        arch=f"sm_{arch}",
        lineinfo=True,
        include_path=[str(root), str(tools.include_dir)],
        ptxas_options=list(_PTXAS_OPTIONS),
        define_macro=list(_macros()) or None,
        no_cache=True,  # where a driver is present NVRTC 13 has a cache of its own; a hit has no ptxas log
    )
    program = None
    try:
        program = Program(text, "c++", options)
        compiled = program.compile("cubin", name_expressions=(spec.expression,), logs=log)
        lowered = compiled.symbol_mapping[spec.expression]
    except Exception as error:  # cuda.core has no public base class for its errors
        details = "\n".join(part for part in (str(error).strip(), log.getvalue().strip()) if part)
        raise CompileError(
            f"{spec.label} ({spec.source}) does not compile for sm_{arch} "
            f"with NVRTC {tools.version[0]}.{tools.version[1]}:\n{details}"
        ) from error
    finally:
        # Freed here rather than, with the traceback above, by the cycle collector: its destructor
        # complains on stderr when its fields are cleared first.
        del program
    name = lowered.decode() if isinstance(lowered, bytes) else str(lowered)
    resources = parse_ptxas(log.getvalue(), name)
    meta = {
        "lowered_name": name,
        "expression": spec.expression,
        "source": spec.source,
        "arch": arch,
        "nvrtc": ".".join(map(str, tools.version)),
        "resources": asdict(resources),
    }
    return bytes(compiled.code), meta


def _compile(
    builder: Callable[[KernelSpec, str, Path], tuple[bytes, dict[str, Any]]],
    spec: KernelSpec,
    arch: str,
    *,
    allow_spills: bool,
    source_root: Path | None,
    cache_dir: Path | None,
) -> Cubin:
    """:func:`compile_kernel`, with ``builder`` as the step that builds what is not cached."""
    arch = normalize_arch(arch)
    if not spec.supports(arch):
        raise CompileError(f"{spec.label}: written for sm_{', sm_'.join(spec.archs)}, asked for sm_{arch}")
    root = sources.cuda_root() if source_root is None else source_root
    key = _key(spec, arch, root)
    found = cache.load(key, cache_dir)
    cached = found is not None
    while found is None:
        code, meta = builder(spec, arch, root)
        # A source edited meanwhile would put the new code under the old source's key.
        started_from, key = key, _key(spec, arch, root)
        if key == started_from:
            found = _store(key, code, meta, cache_dir)
    path, meta = found
    resources = Resources(**meta["resources"])
    if resources.uses_local_memory and not allow_spills:
        raise CompileError(f"{spec.label}: uses local memory on sm_{arch}: {resources.describe_local()}")
    return Cubin(path=path, lowered_name=str(meta["lowered_name"]), resources=resources, arch=arch, cached=cached)


def _macros() -> tuple[str, ...]:
    """``FLASHLLM_RACECHECK=1`` in the environment asks for kernels that compute-sanitizer's racecheck can follow."""
    return ("FLASHLLM_RACECHECK",) if os.environ.get("FLASHLLM_RACECHECK") == "1" else ()


def _key(spec: KernelSpec, arch: str, root: Path) -> str:
    return cache.make_key(
        {
            "schema": _SCHEMA,
            "expression": spec.expression,
            "source": spec.source,
            "digest": sources.source_digest(root / spec.source, root),
            "std": _STD,
            "ptxas": list(_PTXAS_OPTIONS),
            "macros": list(_macros()),
            "lineinfo": True,
            "arch": arch,
            "toolchain": toolchain().identity,
        }
    )


def _store(key: str, code: bytes, meta: dict[str, Any], cache_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    try:
        return cache.store(key, code, meta, cache_dir)
    except OSError as error:
        place = cache.cache_root() if cache_dir is None else cache_dir
        warnings.warn(
            f"kernel cache {place} cannot be written ({error}); kernels are rebuilt in every process. "
            "Set FLASHLLM_CACHE_DIR to a writable folder.",
            RuntimeWarning,
            stacklevel=3,
        )
        return cache.store(key, code, meta, _private_cache())


@lru_cache(maxsize=1)
def _private_cache() -> Path:
    path = tempfile.mkdtemp(prefix="flashllm-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)
