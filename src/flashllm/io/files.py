# SPDX-License-Identifier: Apache-2.0
"""Opening and reading files that may be anything, writing and copying them whole, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flashllm.errors import ArgumentError, FormatError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_regular(path: str | Path) -> BinaryIO:
    """Open ``path`` for reading. Raises ``FormatError`` unless it is a regular file, ``OSError`` if it is unreadable.

    Never blocks; opening a FIFO would otherwise wait for a writer that may never come.
    """
    if "\0" in str(path):
        raise ArgumentError("path", expected="a path without zero bytes", got=repr(str(path)))
    try:
        _check_regular(Path(path).stat().st_mode, path)  # before opening, which acts on some devices
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FormatError(
            field="file", expected="a regular file", got="a loop of symbolic links", path=str(path)
        ) from error
    file = os.fdopen(handle, "rb")
    try:
        _check_regular(os.fstat(handle).st_mode, path)  # again: it may be another file by now
    except FormatError:
        file.close()
        raise
    return file


def _check_regular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        got = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise FormatError(field="file", expected="a regular file", got=got, path=str(path))


def read_utf8(path: str | Path, *, most_bytes: int) -> str:
    """The text of a regular file, without the mark (U+FEFF) that some editors put in front of UTF-8.

    Raises as ``open_regular``, and ``FormatError`` for more bytes or invalid UTF-8.
    """
    with open_regular(path) as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise FormatError(field="file", expected=f"at most {most_bytes:,} bytes", got="more", path=str(path))
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"byte {raw[error.start]:#04x}"
        raise FormatError(field="file", index=error.start, expected="UTF-8", got=got, path=str(path)) from error


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that replaces ``target`` at the end: whole and on disk, or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        # Writing names no file, opening and renaming name one that nobody knows.
        if error.errno in _FULL if error.filename is None else error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with a file that holds ``text``: whole, or not at all, with the default permissions."""
    with replacing(path) as file:
        file.write(text.encode())


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file; ``target`` appears whole. Raises ``FormatError`` for anything else, and ``OSError``."""
    with open_regular(source) as read, replacing(target) as written:
        shutil.copyfileobj(read, written)


def make_empty(directory: Path) -> None:
    """Create ``directory`` if it does not exist. Raises ``ArgumentError`` if it is a file or not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        got = f"{str(directory)!r} with files" if directory.is_dir() else f"a file at {str(directory)!r}"
        raise ArgumentError("out", expected="a new or empty directory", got=got)
    directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """Create ``directory`` if needed and hold its lock, so that processes that write into it run one after the other.

    Raises ``ArgumentError`` for anything but a directory, and ``OSError``.
    """
    if directory.exists() and not directory.is_dir():
        raise ArgumentError("out", expected="a directory, or nothing yet", got=f"a file at {str(directory)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        with locked(handle):
            yield directory
    finally:
        os.close(handle)


def torn_files(directory: Path, names: Collection[str]) -> list[Path]:
    """What processes that were killed while they wrote files of these ``names`` have left in ``directory``.

    With the lock of :func:`claimed`, no living process is writing them.
    """
    there = (file for file in directory.iterdir() if file.name.startswith(".") and file.name.endswith(".tmp"))
    # NAME in ``.NAME.PROCESS-RANDOM.tmp``, as `replacing` calls a file while it is being written.
    return [file for file in there if file.name[1:].rpartition(".tmp")[0].rpartition(".")[0] in names]


def write_whole(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace ``path`` with a file of ``text`` and permissions ``mode``: whole and on disk, or not at all."""
    with replacing(path) as file:
        os.fchmod(file.fileno(), mode)
        file.write(text.encode())


@contextmanager
def locked(handle: int) -> Iterator[None]:
    """Hold the lock of an open file, so that processes that take it run one after the other.

    Closing the file releases the lock, so a process that dies does not leave it locked. On a file system
    without locks, the body runs anyway.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
