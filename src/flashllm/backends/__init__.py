# SPDX-License-Identifier: Apache-2.0
"""Where a product runs: on the GPU (``cuda``) or in NumPy (``reference``)."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from flashllm.errors import ArgumentError, UnsupportedDeviceError

BackendName = Literal["cuda", "reference"]


class Selection(NamedTuple):
    """The backend to use and, in one line, why."""

    name: BackendName
    reason: str


def select(name: str | None = None) -> Selection:
    """Choose the backend: ``name`` when given, else ``cuda`` where a GPU is usable, else ``reference``.

    Raises :class:`UnsupportedDeviceError` when ``cuda`` is asked for and no GPU is usable, and
    :class:`ArgumentError` for an unknown name. Unpacks: ``name, reason = select()``.
    """
    if name == "reference":
        return Selection("reference", "asked for")
    if name not in (None, "auto", "cuda"):
        raise ArgumentError("backend", expected="'cuda', 'reference' or None", got=repr(name))

    from flashllm.device import current_device, gpu_problem

    problem = gpu_problem()
    if problem is None:
        return _cuda(current_device())
    if name == "cuda":
        raise UnsupportedDeviceError(f"backend 'cuda' was asked for, but {problem}; see `flashllm doctor`")
    return Selection("reference", problem)


@cache
def _cuda(device: int) -> Selection:
    from flashllm.device import device_facts

    facts = device_facts(device)
    return Selection("cuda", f"{facts.name}, compute capability {facts.cc[0]}.{facts.cc[1]}")
