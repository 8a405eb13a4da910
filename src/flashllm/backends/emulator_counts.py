# SPDX-License-Identifier: Apache-2.0
"""What an emulated launch did, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SharedAccess:
    """Warp-wide shared-memory instructions of one kind and the cycles (wavefronts) they take."""

    requests: int
    wavefronts: int
    ideal: int
    """Wavefronts without any bank conflict."""

    @property
    def conflicts(self) -> int:
        """Wavefronts lost to bank conflicts."""
        return self.wavefronts - self.ideal


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over one launch. Plain C++ accesses, unlike wrappers (``ptx.cuh``) and built-ins (``__ldg``), go unseen."""

    blocks: int
    barriers: int
    """Block-wide barriers completed, over all blocks."""
    switches: int
    """Changes from one emulated thread to another."""
    mma: Mapping[str, int]
    """Tensor-core instructions by shape: warp-wide m16n8k16 and sp.m16n8k32 (sparse), warpgroup-wide m64nNk16."""
    global_read_bytes: int
    global_write_bytes: int
    prefetch_bytes: int
    copy_async_bytes: int
    """Read by asynchronous copies (also in ``global_read_bytes``)."""
    copy_async_zeros: int
    """Filled with zeros by asynchronous copies."""
    bulk_copy_bytes: int
    """Read by bulk copies (also in ``global_read_bytes``)."""
    scatter: SharedAccess
    """2-byte stores. The n-th store of each lane between two meetings of the warp counts as one instruction."""
    store4: SharedAccess
    """4-byte stores, counted as the 2-byte ones are."""
    store16: SharedAccess
    """16-byte stores, a quarter of a warp at a time."""
    ldmatrix: SharedAccess

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all tensor-core instructions; a sparse one performs half as many as its shape has."""
        sizes = {shape: _volume(shape) for shape in self.mma}
        return sum(count * sizes[shape] for shape, count in self.mma.items())

    @classmethod
    def from_values(cls, values: Mapping[str, int]) -> Counts:
        """From the emulator's counters by name."""

        def access(kind: str) -> SharedAccess:
            return SharedAccess(
                requests=values[f"{kind}_requests"],
                wavefronts=values[f"{kind}_wavefronts"],
                ideal=values[f"{kind}_ideal"],
            )

        return cls(
            mma={_shape(key): n for key, n in values.items() if key.startswith(("mma_", "wgmma_")) and n},
            scatter=access("scatter"),
            store4=access("store4"),
            store16=access("store16"),
            ldmatrix=access("ldmatrix"),
            **{key: values[key] for key in _PLAIN},
        )


_PLAIN = (
    "blocks",
    "barriers",
    "switches",
    "global_read_bytes",
    "global_write_bytes",
    "prefetch_bytes",
    "copy_async_bytes",
    "copy_async_zeros",
    "bulk_copy_bytes",
)


def _shape(counter: str) -> str:
    return counter.split("_", 1)[1].replace("_", ".")


def _volume(shape: str) -> int:
    m, rest = shape.removeprefix("sp.")[1:].split("n")
    n, k = rest.split("k")
    return int(m) * int(n) * int(k) // (2 if shape.startswith("sp.") else 1)
