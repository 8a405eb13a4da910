# SPDX-License-Identifier: Apache-2.0
"""Files made to do harm: named mutations of every kind of file the package reads, and the error each must cause.

:func:`containers` gives, for each kind of file, a sound one, its reader and its mutations. The unit tests run each
mutation by name; ``fuzz_containers.py`` runs them all, and random damage, with little memory.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm.errors import FormatError

Writer = Callable[[Path], Any]
MARKER = "unpickled"
"""Name of the folder that unpickling ``TRAP`` makes in the current one."""


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


TRAP = pickle.dumps(_Trap())


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """How to write one bad file, and which field (and position in it) the error must name."""

    write: Callable[[Path], Any]
    field: str
    index: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the reader."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """A kind of file. ``read`` returns what the file holds; ``use`` does everything with it that a program would."""

    suffix: str
    write: Callable[[Path], Any]
    read: Callable[..., Any]
    use: Callable[[Any], Any]
    mutations: dict[str, Mutation]


class Table(dict[str, Mutation]):
    """Mutations by name; a name given twice is an error."""

    def add(
        self, name: str, field: str, write: Callable[[Path], Any], index: int | None = None, **options: Any
    ) -> None:
        """``index`` is the position that the error must name, ``options`` are for the reader."""
        assert name not in self, name
        self[name] = Mutation(write=write, field=field, index=index, options=options)

    def add_bytes(self, name: str, field: str, sound: Callable[[Path], Any], change: Callable[[bytes], bytes]) -> None:
        """A change to the bytes of the file that ``sound`` writes."""

        def write(path: Path) -> None:
            sound(path)
            path.write_bytes(change(path.read_bytes()))

        self.add(name, field, write)


def check_parts(error: FormatError, path: Path) -> None:
    """The error says where it is, what was expected and what was found, in one line."""
    assert error.path == str(path)
    assert error.field
    assert error.expected
    assert error.got
    message = str(error)
    assert message.isprintable(), "one line, nothing that a terminal acts on"
    assert message.startswith(f"{path}: ")
    assert len(message) < 4000


def check(container: Container, mutation: Mutation, path: Path) -> FormatError:
    """Read the file at ``path`` and return the error, after checking its parts."""
    with pytest.raises(FormatError) as caught:
        container.read(path, **mutation.options)
    error = caught.value
    check_parts(error, path)
    assert error.field == mutation.field, str(error)
    assert mutation.index in (None, error.index), str(error)
    return error


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # The name of a socket has at most 107 characters; that of a test's folder may have more.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "directory": lambda path: path.mkdir(),
    "FIFO": _fifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a directory": lambda path: path.symlink_to("/"),
    "loop of links": _loop,
    "empty file": lambda path: path.touch(),
    "file of the system that states size 0": lambda path: path.symlink_to("/proc/self/status"),
    "one byte": lambda path: path.write_bytes(b"\x93"),
    "pickle": lambda path: path.write_bytes(TRAP),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "ones": lambda path: path.write_bytes(b"\xff" * 100_000),
    "hole of a terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "text": lambda path: path.write_text("not a matrix\n" * 100),
    "ELF program": lambda path: path.write_bytes(b"\x7fELF\2\1\1" + bytes(57)),
}
"""What may be found where a file of any kind is expected."""


def changed(array: np.ndarray[Any, Any], at: int, value: Any) -> np.ndarray[Any, Any]:
    """A copy with one element replaced."""
    out = array.copy()
    out[at] = value
    return out


def containers() -> dict[str, Container]:
    """Every kind of file by name."""
    import hostile_numpy
    import hostile_tensors

    return {
        "npz": hostile_numpy.NPZ,
        "npy": hostile_numpy.NPY,
        "safetensors": hostile_tensors.SAFETENSORS,
        "weights": hostile_tensors.WEIGHTS,
    }
