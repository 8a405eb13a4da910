# SPDX-License-Identifier: Apache-2.0
"""What one compiled kernel uses, as ``ptxas -v`` reports it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashllm.errors import CompileError

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOCAL = re.compile(r"(\d+) bytes lmem")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Per-thread registers and per-thread or per-block bytes of one kernel."""

    registers: int
    """Registers of one thread."""
    shared_static: int = 0
    """Static shared memory of one block, bytes."""
    spill_store: int = 0
    """Bytes of spill stores in the code."""
    spill_load: int = 0
    """Bytes of spill loads in the code."""
    stack: int = 0
    """Stack frame of one thread, bytes; lives in local memory."""
    local: int = 0
    """Local memory of one thread, bytes."""

    @property
    def uses_local_memory(self) -> bool:
        """True when anything that should live in registers lives in memory."""
        return max(self.spill_store, self.spill_load, self.stack, self.local) > 0

    def describe_local(self) -> str:
        """The offending byte counts in words."""
        return (
            f"{self.spill_store} bytes of spill stores, {self.spill_load} bytes of spill loads, "
            f"{self.stack} bytes of stack frame, {self.local} bytes of local memory"
        )


def parse_ptxas(log: str, entry: str) -> Resources:
    """Resources of the kernel with (lowered) name ``entry`` from a verbose ptxas ``log``.

    The log may hold several kernels and device functions; only the lines about ``entry`` count.
    Raises :class:`CompileError` when the log says nothing about it.
    """
    compiling = subject = ""
    registers = shared = local = stack = store = load = None
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            compiling = subject = found.group(1)
        elif found := _PROPERTIES.search(line):
            subject = found.group(1)
        elif compiling == entry:
            if subject == entry and (found := _FRAME.search(line)):
                stack, store, load = (int(text) for text in found.groups())
            elif found := _REGISTERS.search(line):
                registers = int(found.group(1))
                shared = _first_int(_SHARED, line)
                local = _first_int(_LOCAL, line)
    if registers is None or stack is None or store is None or load is None:
        raise CompileError(f"{entry}: ptxas reported no resources; its log was:\n{log.strip() or '(empty)'}")
    return Resources(
        registers=registers,
        shared_static=shared or 0,
        spill_store=store,
        spill_load=load,
        stack=stack,
        local=local or 0,
    )


def _first_int(pattern: re.Pattern[str], line: str) -> int:
    found = pattern.search(line)
    return int(found.group(1)) if found else 0
