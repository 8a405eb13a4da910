# SPDX-License-Identifier: Apache-2.0
"""GPU models whose speed can be estimated without having one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashllm.errors import ArgumentError

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What bounds the time of a product on one GPU model."""

    name: str
    read_gbps: float
    """Read bandwidth in GB/s (10^9 bytes)."""
    source: str
    """Where the bandwidth comes from."""
    arch: str
    """Architecture kernels are compiled for, e.g. ``"90a"``."""
    sm_count: int
    clock_mhz: float
    """Highest SM clock."""

    @property
    def tensor_flops(self) -> float:
        """Peak dense fp16 operations with fp32 sums, in 10^12 per second."""
        return _FLOPS_PER_CYCLE.get(self.arch, _FLOPS_PER_CYCLE["80"]) * self.sm_count * self.clock_mhz * 1e-6


# Per multiprocessor, from NVIDIA's architecture white papers (GA100, GA102, AD102, GH100, RTX Blackwell) and the B200
# datasheet: dense fp16 peak over multiprocessors and boost clock.
_FLOPS_PER_CYCLE = {"80": 2048, "86": 1024, "89": 1024, "90a": 4096, "100a": 8192, "120a": 1024}

_MEASURED = "measured, pure read"
_PEAK = "datasheet peak"

GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu(name="H100 80GB", read_gbps=3060.0, source=_MEASURED, arch="90a", sm_count=132, clock_mhz=1980.0),
        Gpu(name="H200", read_gbps=4530.0, source=_MEASURED, arch="90a", sm_count=132, clock_mhz=1980.0),
        Gpu(name="A100 40GB", read_gbps=1555.0, source=_PEAK, arch="80", sm_count=108, clock_mhz=1410.0),
        Gpu(name="A100 80GB", read_gbps=2039.0, source=f"{_PEAK} (SXM)", arch="80", sm_count=108, clock_mhz=1410.0),
        Gpu(name="H100 PCIe", read_gbps=2000.0, source=_PEAK, arch="90a", sm_count=114, clock_mhz=1755.0),
        Gpu(name="L40S", read_gbps=864.0, source=_PEAK, arch="89", sm_count=142, clock_mhz=2520.0),
        Gpu(name="RTX 4090", read_gbps=1008.0, source=_PEAK, arch="89", sm_count=128, clock_mhz=2520.0),
    )
}
"""By name in lower case. Multiprocessors and clocks (boost) are those of NVIDIA's datasheets."""

DEFAULT_GPU = "H100 80GB"


def find_gpu(name: str, *, argument: str = "gpu") -> Gpu:
    """The GPU called ``name`` (case does not matter). Raises :class:`ArgumentError` with the known names."""
    gpu = GPUS.get(" ".join(name.lower().split()))
    if gpu is None:
        raise ArgumentError(argument, expected=f"one of {', '.join(g.name for g in GPUS.values())}", got=repr(name))
    return gpu


def model_of(device_name: str) -> Gpu | None:
    """The model in :data:`GPUS` of a device with a name such as ``"NVIDIA H100 80GB HBM3"``; ``None`` if unknown."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    return next((gpu for key, gpu in GPUS.items() if words.issuperset(key.split())), None)


def gpu_of(facts: DeviceFacts) -> Gpu:
    """The model of the GPU that ``facts`` describe: its own multiprocessors and clock, and the known bandwidth.

    A GPU that is not in :data:`GPUS` is assumed to read as much per multiprocessor as :data:`DEFAULT_GPU`;
    ``source`` says so.
    """
    default = GPUS[DEFAULT_GPU.lower()]
    known = model_of(facts.name)
    if known is not None:
        read_gbps, source = known.read_gbps, known.source
    else:
        read_gbps = default.read_gbps * facts.sm_count / default.sm_count
        source = f"unknown; assumed: as much per multiprocessor as {default.name}"
    return Gpu(
        name=facts.name,
        read_gbps=read_gbps,
        source=source,
        arch=facts.arch,
        sm_count=facts.sm_count,
        clock_mhz=facts.clock_mhz or default.clock_mhz,
    )


def facts_of(gpu: Gpu) -> DeviceFacts:
    """Facts to plan for a GPU that need not be present. Unknown memory sizes are 0, since no plan uses them."""
    from flashllm.device import DeviceFacts
    from flashllm.jit.spec import shared_limit

    digits = gpu.arch.rstrip("af")
    shared = shared_limit(gpu.arch) or 0
    return DeviceFacts(
        index=0,
        name=gpu.name,
        cc=(int(digits[:-1]), int(digits[-1])),
        arch=gpu.arch,
        sm_count=gpu.sm_count,
        l2_bytes=0,
        shared_per_block=shared,
        shared_per_sm=shared + 1024,
        memory_bytes=0,
        clock_mhz=gpu.clock_mhz,
        driver=0,
    )
