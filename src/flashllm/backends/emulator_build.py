# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the CPU with g++, against ``cuda/emulator``; cached on disk like GPU code."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from flashllm.cpus import cores
from flashllm.errors import ArgumentError, CompileError, MissingDependencyError
from flashllm.jit import cache as disk
from flashllm.jit import sources
from flashllm.jit.spec import KernelSpec, normalize_arch

_SCHEMA = 1
_FLAGS = (
    "-std=c++17",
    "-g1",  # file and line in reports of the sanitizers
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # a kernel's static variables are its own, not shared with other objects of the process
    "-fno-strict-aliasing",  # as in CUDA: kernels read one type's memory as another's
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
_SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_RUNTIME_SPEED, _KERNEL_SPEED = "-O2", "-Og"
"""Optimisation of the emulator, compiled once, and of kernels, which take longer to compile than to run."""
_V3_FEATURES = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_PER_OBJECT = 12
"""Kernels compiled into one shared object: parsing is shared, memory and waiting stay small."""


@dataclass(frozen=True, kw_only=True)
class EmulatedKernel:
    """A kernel compiled for the CPU: entry points number ``index`` of the shared object ``path``."""

    spec: KernelSpec
    path: Path
    index: int
    arch: str
    sanitized: bool
    cached: bool
    """True when the object came from the disk cache."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build depends on beside the kernel."""

    arch: str = "90a"
    sanitize: bool = False
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    defines: tuple[str, ...] = ()
    """Macros, ``NAME`` or ``NAME=value``."""
    source_root: Path | None = None
    """Folder that ``spec.source`` is below; the package's device code for ``None``."""
    cache_dir: Path | None = None


def available() -> str | None:
    """Why kernels cannot be emulated here, in one line; ``None`` when they can."""
    if not sys.platform.startswith("linux"):
        return f"the emulator runs on Linux, not on {sys.platform}"
    if shutil.which(_compiler()) is None:
        return f"no {_compiler()} found: the emulator compiles kernels for the CPU (install g++ 10 or newer)"
    return None


def compile_emulated(spec: KernelSpec, options: BuildOptions | None = None) -> EmulatedKernel:
    """Compile ``spec`` for the CPU, or take it from the disk cache.

    Raises :class:`CompileError` when the kernel is not written for the architecture or does not compile,
    :class:`MissingDependencyError` without a compiler.
    """
    return compile_together([spec], options)[0]


def compile_together(specs: Sequence[KernelSpec], options: BuildOptions | None = None) -> list[EmulatedKernel]:
    """Compile kernels of one source file into one shared object, in the order of ``specs``."""
    options = options or BuildOptions()
    arch = normalize_arch(options.arch)
    if (problem := available()) is not None:
        raise MissingDependencyError(problem)
    if len({spec.source for spec in specs}) != 1:
        raise ArgumentError("specs", expected="kernels of one source file", got=str([spec.source for spec in specs]))
    for spec in specs:
        if not spec.supports(arch):
            raise CompileError(f"{spec.label}: written for sm_{', sm_'.join(spec.archs)}, asked for sm_{arch}")
    root = options.source_root or sources.cuda_root()
    flags = _flags(options)
    key = disk.make_key(
        {
            "schema": _SCHEMA,
            "expressions": [spec.expression for spec in specs],
            "source": specs[0].source,
            "digest": sources.source_digest(root / specs[0].source, root),
            "headers": _headers_digest(),
            "emulator": _emulator_digest(),
            "flags": list(flags),
            "compiler": _compiler_version(),
        }
    )
    found = _find(key, options.cache_dir)
    cached = found is not None
    if found is None:
        code = _build(specs, root, flags, options)
        found = _store(key, code, {"expressions": [s.expression for s in specs], "arch": arch}, options.cache_dir)
    return [
        EmulatedKernel(spec=spec, path=found[0], index=i, arch=arch, sanitized=options.sanitize, cached=cached)
        for i, spec in enumerate(specs)
    ]


def compile_all(specs: Iterable[KernelSpec], options: BuildOptions | None = None) -> list[EmulatedKernel]:
    """Compile many kernels, grouped by source file, on all cores; in no particular order."""
    groups: dict[str, list[KernelSpec]] = {}
    for spec in dict.fromkeys(specs):
        groups.setdefault(spec.source, []).append(spec)
    parts = [group[i : i + _PER_OBJECT] for group in groups.values() for i in range(0, len(group), _PER_OBJECT)]
    if not parts:
        return []
    _runtime(options or BuildOptions())  # once, not by every worker
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        return [kernel for part in pool.map(lambda part: compile_together(part, options), parts) for kernel in part]


def sanitizer_environment() -> dict[str, str]:
    """Environment variables for a Python process that runs kernels built with ``sanitize``.

    The sanitizer has to be loaded before Python, so it cannot be loaded with the kernel.
    """
    library = _run([_compiler(), "-print-file-name=libasan.so"]).strip()
    return {
        "LD_PRELOAD": str(Path(library).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python never frees everything
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _flags(options: BuildOptions) -> tuple[str, ...]:
    arch = normalize_arch(options.arch)
    digits = arch.rstrip("af")
    defines = [f"-D__CUDA_ARCH__={digits}0", *(f"-D{define}" for define in options.defines)]
    if arch.endswith("a"):
        defines.append(f"-D__CUDA_ARCH_FEAT_SM{digits}_ALL")
    return (*_flags_of_both(options.sanitize), _KERNEL_SPEED, *defines)


def _flags_of_both(sanitize: bool) -> tuple[str, ...]:
    return (*_FLAGS, *_machine_flags(), *(_SANITIZE_FLAGS if sanitize else ()))


@cache
def _machine_flags() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return ("-march=x86-64-v3",) if set(line.split()) >= _V3_FEATURES else ()


def _build(specs: Sequence[KernelSpec], root: Path, flags: tuple[str, ...], options: BuildOptions) -> bytes:
    runtime = _runtime(options)
    with tempfile.TemporaryDirectory(prefix="flashllm-emulator-") as folder:
        stub, result = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        stub.write_text(_stub(specs, root), encoding="utf-8")
        what = f"{specs[0].label}{f' and {len(specs) - 1} more' if len(specs) > 1 else ''} ({specs[0].source})"
        command = [*flags, *_includes(root), "-shared", str(stub), str(runtime), "-o", str(result)]
        _run([_compiler(), *command], what=f"{what} does not compile for the CPU, as sm_{options.arch}")
        return result.read_bytes()


def _stub(specs: Sequence[KernelSpec], root: Path) -> str:
    """The source file that turns templates into entry points."""
    lines = [
        '#include "emu/cuda.hpp"',
        f'#include "{(root / specs[0].source).resolve()}"',
        '#include "emu/launch.hpp"',
        *(f"FLASHLLM_EMULATE({i}, {spec.expression})" for i, spec in enumerate(specs)),
    ]
    return "\n".join(lines) + "\n"


def _runtime(options: BuildOptions) -> Path:
    """The emulator itself, compiled once per set of flags."""
    flags = (*_flags_of_both(options.sanitize), _RUNTIME_SPEED)
    parts = {"schema": _SCHEMA, "runtime": _emulator_digest(), "flags": list(flags), "compiler": _compiler_version()}
    key = disk.make_key(parts)
    found = _find(key, options.cache_dir)
    if found is None:
        folder = sources.cuda_root() / "emulator" / "runtime"
        with tempfile.TemporaryDirectory(prefix="flashllm-emulator-") as scratch:
            objects = [Path(scratch) / f"{file.stem}.o" for file in sorted(folder.glob("*.cpp"))]

            def compile_one(target: Path) -> None:
                source = folder / f"{target.stem}.cpp"
                command = [*flags, *_includes(sources.cuda_root()), "-c", str(source), "-o", str(target)]
                _run([_compiler(), *command], what=f"the emulator ({source.name}) does not compile")

            with ThreadPoolExecutor(max_workers=cores()) as pool:
                list(pool.map(compile_one, objects))
            whole = Path(scratch) / "runtime.o"
            command = ["-r", "-nostdlib", *map(str, objects), "-o", str(whole)]
            _run([_compiler(), *command], what="the emulator does not link")
            found = _store(key, whole.read_bytes(), {"runtime": True}, options.cache_dir)
    return found[0]


def _includes(root: Path) -> tuple[str, ...]:
    own = sources.cuda_root()
    # The emulator first: its headers stand in for the others.
    return tuple(f"-I{folder}" for folder in dict.fromkeys((own / "emulator", root, own)))


def _find(key: str, cache_dir: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """What the cache holds or, where it cannot be written, what this process has stored instead."""
    found = disk.load(key, cache_dir)
    if found is None and _private_folder.cache_info().currsize:
        found = disk.load(key, _private_folder())
    return found


def _store(key: str, code: bytes, meta: dict[str, Any], cache_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    try:
        return disk.store(key, code, meta, cache_dir)
    except OSError as error:
        if not _private_folder.cache_info().currsize:  # once, not for every kernel
            warnings.warn(f"kernel cache cannot be written ({error}); using a temporary one", stacklevel=2)
        return disk.store(key, code, meta, _private_folder())


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="flashllm-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compiler() -> str:
    return os.environ.get("FLASHLLM_CXX") or "g++"


def _compiler_version() -> str:
    return _version_of(_compiler())


@cache
def _version_of(compiler: str) -> str:
    return f"{shutil.which(compiler)}\n{_run([compiler, '--version'])}"


def _digest_of(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _emulator_digest() -> str:
    root = sources.cuda_root() / "emulator"
    kinds = {".hpp", ".cpp", ".h", ".cuh"}
    return _digest_of((file for file in root.rglob("*") if file.suffix in kinds), root)


def _headers_digest() -> str:
    """Digest of the package's device headers, which sources elsewhere include too."""
    root = sources.cuda_root()
    return _digest_of((root / "flashllm").glob("*.cuh"), root)


def _run(command: Sequence[str], *, what: str | None = None) -> str:
    try:
        # Messages in plain English, whatever the user's language.
        env = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=env)
    except OSError as error:
        raise MissingDependencyError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        words = done.stderr.strip() or f"status {done.returncode}, without a word"
        raise CompileError(f"{what or f'{command[0]} {command[1]} fails'}:\n{words}")
    return done.stdout
