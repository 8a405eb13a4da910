# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package. Each message names what was expected and what was found."""

from __future__ import annotations

import reprlib

_LONGEST_PART = 1000
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """``repr`` of anything from a file, cut short and without recursion into deep nesting."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python refuses to print integers of many digits
        return f"{type(value).__name__} out of any range"


def _one_line(text: str) -> str:
    """``text`` as one line: names in a file may hold control characters or be megabytes long."""
    cut = text if len(text) <= _LONGEST_PART else text[:_LONGEST_PART] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


class FlashLLMError(Exception):
    """Base class of every error this package raises on purpose."""


class ArgumentError(FlashLLMError, ValueError):
    """A function argument has the wrong type, shape, dtype, device or layout."""

    def __init__(self, argument: str, *, expected: str, got: str) -> None:
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(_one_line(argument) + f": expected {_one_line(expected)}, got {_one_line(got)}")


class FormatError(FlashLLMError, ValueError):
    """A sparse weight or a file that holds one breaks its format.

    ``path`` is the file (``None`` for an object in memory), ``field`` the buffer or header entry,
    ``index`` the position of the first offending element (``None`` where it has no meaning).
    """

    def __init__(
        self, *, field: str, expected: str, got: str, path: str | None = None, index: int | None = None
    ) -> None:
        self.path, self.field, self.index, self.expected, self.got = path, field, index, expected, got
        where = f"{_one_line(path)}: " if path else ""
        at = f"[{index}]" if index is not None else ""
        super().__init__(f"{where}{_one_line(field)}{at}: expected {_one_line(expected)}, got {_one_line(got)}")


class CompileError(FlashLLMError, RuntimeError):
    """A kernel does not compile, or breaks a resource rule such as zero spills."""


class MissingDependencyError(FlashLLMError, RuntimeError):
    """A driver, library or package that the call needs is not there; the message says how to get it."""


class UnsupportedDeviceError(FlashLLMError, RuntimeError):
    """The GPU cannot run the kernels (older than compute capability 8.0)."""


class DeviceMemoryError(FlashLLMError, MemoryError):
    """A device allocation does not fit: says what needs how many bytes and how many are free."""

    def __init__(self, what: str, *, needed: int, free: int) -> None:
        self.what, self.needed, self.free = what, needed, free
        super().__init__(f"{what}: needs {needed:,} bytes of device memory, {free:,} are free")


class VerificationError(FlashLLMError, ArithmeticError):
    """A kernel's output lies outside the promised error bound."""


USAGE_ERRORS = (
    ArgumentError,
    FormatError,
    DeviceMemoryError,
    MissingDependencyError,
    UnsupportedDeviceError,
    OSError,
)
"""Errors that tell a user why a request cannot be fulfilled: arguments, files, memory, packages or the GPU."""
