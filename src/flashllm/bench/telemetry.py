# SPDX-License-Identifier: Apache-2.0
"""Clock, temperature and power of the GPU while it works, from NVML where nvidia-ml-py is installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reading; ``None`` where NVML does not say."""

    sm_mhz: int | None = None
    temp_c: int | None = None
    power_w: float | None = None


@lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no NVML library, no permission: telemetry is a courtesy
        return None
    return pynvml


@lru_cache(maxsize=8)
def _handle(pci_bus_id: str) -> Any:
    nvml = _nvml()
    try:
        return nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode()) if nvml else None
    except Exception:  # a container may hide the GPU's bus number from NVML
        return None


def read() -> Reading:
    """Read the current GPU. Call it while kernels run: an idle GPU lowers its clock within milliseconds."""
    import cupy

    handle = _handle(str(cupy.cuda.Device().pci_bus_id))
    if handle is None:
        return Reading()
    nvml = _nvml()

    def ask(function: Any, *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except Exception:  # not supported on this GPU
            return None

    power = ask(nvml.nvmlDeviceGetPowerUsage)
    return Reading(
        sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        temp_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        power_w=None if power is None else round(power / 1000.0, 1),
    )


def driver_version() -> str | None:
    """Version of the NVIDIA driver, e.g. ``"580.159.04"``."""
    nvml = _nvml()
    if nvml is not None:
        text = nvml.nvmlSystemGetDriverVersion()
        return text.decode() if isinstance(text, bytes) else str(text)
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group(1) if found else None
