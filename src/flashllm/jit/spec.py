# SPDX-License-Identifier: Apache-2.0
"""Description of one compiled kernel instance and of the architectures it is built for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flashllm.errors import ArgumentError, UnsupportedDeviceError

ALL_ARCHS: tuple[str, ...] = ("80", "86", "89", "90a", "100a", "120a")
"""Architectures every release compiles; ``90a`` is the tuned one."""

_ARCH_OF_CC: dict[tuple[int, int], str] = {
    (8, 0): "80",
    (8, 6): "86",
    (8, 9): "89",
    (9, 0): "90a",
    (10, 0): "100a",
    (12, 0): "120a",
}

# Largest static + dynamic shared memory one block may ask for, by compute capability (CUDA
# programming guide, table of technical specifications; the opt-in limit, in bytes).
_SHARED_LIMIT: dict[str, int] = {
    "80": 163 * 1024,
    "86": 99 * 1024,
    "87": 163 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "103": 227 * 1024,
    "110": 227 * 1024,
    "120": 99 * 1024,
    "121": 99 * 1024,
}

MAX_GRID_YZ = 65535
"""The most blocks of a grid in its second and in its third dimension, on every GPU."""
DEFAULT_SHARED_LIMIT = 48 * 1024
"""Dynamic shared memory (bytes) a launch may use without asking for more."""


def normalize_arch(arch: str) -> str:
    """``"sm_90a"``, ``"compute_90a"`` and ``"90a"`` all become ``"90a"``; anything else, or below 80, is refused."""
    match = re.fullmatch(r"(?:sm_|compute_)?((\d{2,3})[af]?)", arch.strip().lower())
    if match is None or int(match.group(2)) < 80:
        raise ArgumentError("arch", expected="an architecture from 80 on, such as 80, 90a or sm_90a", got=repr(arch))
    return match.group(1)


def arch_for_device(cc: tuple[int, int]) -> str:
    """Architecture to compile for on a GPU of compute capability ``cc``.

    GPUs outside :data:`ALL_ARCHS` get the sm_80 code path compiled for their own number.
    Raises :class:`UnsupportedDeviceError` below 8.0.
    """
    major, minor = cc
    if major < 8:
        raise UnsupportedDeviceError(
            f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
        )
    return _ARCH_OF_CC.get((major, minor), f"{major}{minor}")


def shared_limit(arch: str) -> int | None:
    """Shared-memory bytes one block may use on ``arch``, or ``None`` for one this release does not know."""
    return _SHARED_LIMIT.get(normalize_arch(arch).rstrip("af"))


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel instance: where its source is, how its template is filled in, what a launch needs."""

    name: str
    """Short name, e.g. ``"tiled_csl"``."""
    source: str
    """Path below ``cuda/``, e.g. ``"spmm/tiled_csl.cu"``."""
    function: str
    """Qualified function or function template, e.g. ``"flashllm::spmm_tiled_csl"``."""
    template: tuple[tuple[str, str], ...] = ()
    """Ordered (parameter name, C++ text) pairs; empty for a plain function."""
    threads: int
    """Threads of one block."""
    shared_bytes: int = 0
    """Dynamic shared memory of one block, bytes."""
    archs: tuple[str, ...] = ALL_ARCHS
    """Architectures the kernel is written for."""
    deterministic: bool = True
    """Same bits on every run; ``False`` for anything with floating-point atomics."""

    def __post_init__(self) -> None:
        if not 0 < self.threads <= 1024:
            raise ArgumentError("threads", expected="1..1024 threads per block", got=str(self.threads))
        if self.shared_bytes < 0:
            raise ArgumentError("shared_bytes", expected="a number of bytes >= 0", got=str(self.shared_bytes))

    def __hash__(self) -> int:
        # Computed once: specs are looked up at every launch. Never pickled: text hashes differ by process.
        value: int | None = self.__dict__.get("_hash")
        if value is None:
            value = hash((self.name, self.source, self.function, self.template, self.threads, self.shared_bytes))
            object.__setattr__(self, "_hash", value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_hash"}

    @property
    def expression(self) -> str:
        """C++ name expression of the instance, e.g. ``flashllm::spmm_tiled_csl<__half, 16>``."""
        if not self.template:
            return self.function
        return f"{self.function}<{', '.join(text for _, text in self.template)}>"

    @property
    def label(self) -> str:
        """Short text for tables, e.g. ``tiled_csl<T=__half, kN=16>``."""
        if not self.template:
            return self.name
        return f"{self.name}<{', '.join(f'{key}={text}' for key, text in self.template)}>"

    def supports(self, arch: str) -> bool:
        """Whether the kernel may be compiled for ``arch``; unlisted GPUs take the sm_80 path."""
        arch = normalize_arch(arch)
        return arch in self.archs or (arch not in ALL_ARCHS and "80" in self.archs)
