# SPDX-License-Identifier: Apache-2.0
"""Where a product runs: on the GPU (``cuda``), the same kernels on the CPU (``emulator``) or NumPy (``reference``)."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from flashllm.errors import ArgumentError, MissingDependencyError, UnsupportedDeviceError

BackendName = Literal["cuda", "emulator", "reference"]
BACKENDS: tuple[BackendName, ...] = ("cuda", "emulator", "reference")


class Selection(NamedTuple):
    """The backend to use and, in one line, why."""

    name: BackendName
    reason: str


def select(name: str | None = None) -> Selection:
    """Choose the backend: ``name`` when given, else the first usable one of :data:`BACKENDS`.

    ``cuda`` needs a GPU and its packages, ``emulator`` g++, ``reference`` nothing. Raises
    :class:`UnsupportedDeviceError` or :class:`MissingDependencyError` when what was asked for is not usable, and
    :class:`ArgumentError` for an unknown name. Unpacks: ``name, reason = select()``.
    """
    if name not in (None, "auto", *BACKENDS):
        raise ArgumentError("backend", expected="'cuda', 'emulator', 'reference' or None", got=repr(name))
    if name == "reference":
        return Selection("reference", "asked for")
    if name == "emulator":
        if (missing := _emulator_problem()) is not None:
            raise MissingDependencyError(f"backend 'emulator' was asked for, but {missing}")
        return Selection("emulator", "asked for")

    from flashllm.device import current_device, gpu_problem

    problem = gpu_problem()
    if problem is None:
        return _cuda(current_device())
    if name == "cuda":
        raise UnsupportedDeviceError(f"backend 'cuda' was asked for, but {problem}; see `flashllm doctor`")
    if (missing := _emulator_problem()) is not None:
        return Selection("reference", f"{problem}, and {missing}")
    return Selection("emulator", problem)


def _emulator_problem() -> str | None:
    from flashllm.backends import emulator

    return emulator.available()


@cache
def _cuda(device: int) -> Selection:
    from flashllm.device import device_facts

    facts = device_facts(device)
    return Selection("cuda", f"{facts.name}, compute capability {facts.cc[0]}.{facts.cc[1]}")
