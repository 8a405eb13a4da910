# SPDX-License-Identifier: Apache-2.0
"""Check this machine: driver, GPU, compiler, libraries, and say how to fix what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from flashllm import __version__


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    """Command or action that makes a failed check pass."""
    needed_for: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Check this machine: driver, GPU, compiler, libraries, and say how to fix what is missing.

    Exits with status 1 when not even the NumPy reference can run.
    """
    checks = run_checks()
    usable = all(check.ok for check in checks if check.needed_for == "everything")
    compiles = usable and all(check.ok for check in checks if check.needed_for == "compiling")
    runs = compiles and all(check.ok for check in checks if check.needed_for == "running on the GPU")
    emulates = usable and all(check.ok for check in checks if check.needed_for == "emulating kernels on the CPU")
    if as_json:
        report = {
            "flashllm": __version__,
            "platform": platform.platform(),
            "checks": [asdict(check) for check in checks],
            "reference": usable,
            "emulator": emulates,
            "compile": compiles,
            "gpu": runs,
        }
        click.echo(json.dumps(report, indent=1))
    else:
        for check in checks:
            state = click.style("ok     ", fg="green") if check.ok else click.style("missing", fg="yellow")
            click.echo(f"{state}  {check.name:<16} {check.found}")
            if not check.ok:
                click.echo(f"{'':<9}{'':<16} for {check.needed_for}: {check.fix}")
        click.echo()
        for text, possible in (
            ("NumPy reference", usable),
            ("emulate kernels", emulates),
            ("compile kernels", compiles),
            ("run kernels on the GPU", runs),
        ):
            click.echo(f"{text:<24} {'yes' if possible else 'no'}")
    if not usable:
        raise SystemExit(1)


def run_checks() -> list[Check]:
    """Every check, in the order of the report; none of them raises."""
    cuda = driver_cuda_version()
    major = _cuda_major(cuda)
    suffix = "" if major == 13 else "-cu12"
    pins = f"'cuda-core>=1.1' 'cuda-bindings=={major}.*'"
    return [
        Check(
            name="Python",
            ok=sys.version_info >= (3, 10),
            found=f"{platform.python_version()} ({sys.executable})",
            fix="install Python 3.10 or newer",
            needed_for="everything",
        ),
        _guarded("NumPy", _numpy, fix="pip install 'numpy>=2.0' scipy ml_dtypes", needed_for="everything"),
        _guarded(
            "device code",
            _device_code,
            fix="reinstall flashllm",
            needed_for="everything",
        ),
        _guarded(
            "kernel cache",
            _cache_folder,
            fix="export FLASHLLM_CACHE_DIR=/a/writable/folder",
            needed_for="keeping compiled kernels",
        ),
        _guarded(
            "NVRTC",
            _nvrtc,
            fix=f"pip install {pins} 'nvidia-cuda-nvrtc{suffix}=={major}.*'",
            needed_for="compiling",
        ),
        _guarded(
            "CUDA headers",
            _headers,
            fix=f"pip install 'nvidia-cuda-runtime{suffix}=={major}.*'",
            needed_for="compiling",
        ),
        Check(
            name="driver",
            ok=cuda is not None,
            found=f"CUDA {_dotted(cuda)}" if cuda is not None else "libcuda does not load",
            fix="install the NVIDIA driver (Ubuntu: sudo ubuntu-drivers install)",
            needed_for="running on the GPU",
        ),
        _guarded("CuPy", _cupy, fix=f"pip install cupy-cuda{major}x", needed_for="running on the GPU"),
        _guarded(
            "GPU",
            _gpu,
            fix="use a machine with an NVIDIA GPU of compute capability 8.0 (Ampere) or newer",
            needed_for="running on the GPU",
        ),
        _guarded(
            "cuBLAS",
            _cublas,
            fix=f"pip install 'nvidia-cublas{suffix}=={major}.*'",
            needed_for="the dense baseline",
        ),
        _guarded(
            "C++ compiler",
            _host_compiler,
            fix="sudo apt-get install g++",
            needed_for="emulating kernels on the CPU",
        ),
    ]


def driver_cuda_version() -> int | None:
    """CUDA version of the driver, e.g. 13000, or ``None`` where no driver is installed."""
    import ctypes

    version = ctypes.c_int()
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value
    return None


def _cuda_major(driver: int | None) -> int:
    """CUDA 12 or 13: which to install for this driver, or, without one, beside the packages already installed."""
    if driver is not None:
        return 13 if driver >= 13000 else 12
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("cuda-bindings").split(".")[0])
    except (PackageNotFoundError, ValueError):
        return 13


def _guarded(name: str, look: Callable[[], str], *, fix: str, needed_for: str) -> Check:
    """Call ``look``, which returns what it found or raises to say what is wrong."""
    try:
        found = look()
    except Exception as error:  # a broken installation can fail in any way; the report goes on
        problem = str(error).strip().split("\n", 1)[0].split("; `flashllm doctor`")[0] or type(error).__name__
        return Check(name=name, ok=False, found=problem, fix=fix, needed_for=needed_for)
    return Check(name=name, ok=True, found=found, fix=fix, needed_for=needed_for)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _numpy() -> str:
    import ml_dtypes
    import numpy
    import scipy

    return f"{numpy.__version__} (SciPy {scipy.__version__}, ml_dtypes {ml_dtypes.__version__})"


def _device_code() -> str:
    from flashllm.jit.sources import cuda_root

    return str(cuda_root())


def _cache_folder() -> str:
    from flashllm.jit.cache import cache_root

    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root):
        pass
    return str(root)


def _nvrtc() -> str:
    from importlib.metadata import version

    from flashllm.jit.toolchain import find_nvrtc

    (major, minor), library = find_nvrtc()
    return f"{major}.{minor} (cuda-core {version('cuda-core')}, {library})"


def _headers() -> str:
    from flashllm.jit.toolchain import find_headers

    return str(find_headers())


def _cupy() -> str:
    # CuPy creates its cache folder on import and fails where it cannot.
    import cupy

    return f"{cupy.__version__} ({Path(cupy.__file__).parent})"


def _gpu() -> str:
    from flashllm.device import device_facts, gpu_problem

    if (problem := gpu_problem()) is not None:
        raise RuntimeError(problem)
    facts = device_facts()
    return (
        f"{facts.name}, compute capability {facts.cc[0]}.{facts.cc[1]} (sm_{facts.arch}), "
        f"{facts.sm_count} SMs, {facts.memory_bytes / 2**30:.0f} GiB"
    )


def _cublas() -> str:
    from cuda import pathfinder

    try:
        return str(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    except pathfinder.DynamicLibNotFoundError as error:
        raise RuntimeError("libcublas does not load") from error


def _host_compiler() -> str:
    from flashllm.backends import emulator

    if (problem := emulator.available()) is not None:
        raise RuntimeError(problem)
    return str(shutil.which(os.environ.get("FLASHLLM_CXX") or "g++"))
