# SPDX-License-Identifier: Apache-2.0
"""Finds the compiler (NVRTC) and the CUDA headers, in Python packages or in an installed toolkit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flashllm.errors import MissingDependencyError

_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")
_HINT = "`flashllm doctor` says what to install"


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """The compiler in use."""

    version: tuple[int, int]
    """NVRTC's version, e.g. (12, 9)."""
    library: str
    """Path of the NVRTC library."""
    include_dir: Path
    """Folder with the CUDA headers."""
    identity: str
    """Digest of compiler and headers; part of every cache key."""


@lru_cache(maxsize=1)
def toolchain() -> Toolchain:
    """The compiler and headers of this environment; :class:`MissingDependencyError` when one is absent."""
    version, library = find_nvrtc()
    include = find_headers()
    # NVRTC reports no patch level; the library's size stands in for it, as the library only changes as a whole.
    digest = hashlib.sha256(f"{version[0]}.{version[1]} {_size(library)}\n".encode())
    for name in _HEADERS:
        file = include / name
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return Toolchain(version=version, library=library, include_dir=include, identity=digest.hexdigest())


def find_nvrtc() -> tuple[tuple[int, int], str]:
    """Version and path of the NVRTC library. Raises :class:`MissingDependencyError`."""
    try:
        from cuda import pathfinder
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependencyError(f"compiling needs cuda-core and cuda-bindings ({error}); {_HINT}") from error
    try:
        library = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
        status, major, minor = nvrtc.nvrtcVersion()
    except (pathfinder.DynamicLibNotFoundError, RuntimeError) as error:
        raise MissingDependencyError(f"NVRTC, CUDA's run-time compiler, is not installed; {_HINT}") from error
    if int(status) != 0:
        raise MissingDependencyError(f"NVRTC at {library} does not answer ({status}); {_HINT}")
    return (int(major), int(minor)), str(library)


def find_headers() -> Path:
    """Folder that holds ``cuda_fp16.h``. Raises :class:`MissingDependencyError`."""
    try:
        from cuda import pathfinder
    except ImportError as error:
        raise MissingDependencyError(f"compiling needs cuda-core ({error}); {_HINT}") from error
    found = pathfinder.find_nvidia_header_directory("cudart")
    if found is None or not (Path(found) / "cuda_fp16.h").is_file():
        raise MissingDependencyError(f"the CUDA headers (cuda_fp16.h) are not installed; {_HINT}")
    return Path(found)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
