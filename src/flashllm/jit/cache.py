# SPDX-License-Identifier: Apache-2.0
"""Disk cache of compiled kernels.

One entry is one directory ``kernels/<first two digits>/<key>`` that holds ``kernel.cubin`` and
``kernel.json``. A writer fills a private temporary directory, flushes it and renames it into place,
so a reader sees a whole entry or none, however many processes write the same one. Everything read
back is checked against stored SHA-256 sums; what does not match counts as absent and is rebuilt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEY = re.compile(r"[0-9a-f]{64}")
_CUBIN = "kernel.cubin"
_META = "kernel.json"
_TEMPORARY = "tmp-"
_ATTEMPTS = 16
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What the cache holds: whole entries, their bytes, and where they are."""

    path: Path
    entries: int
    size_bytes: int
    tuned_files: int


def cache_root() -> Path:
    """``$FLASHLLM_CACHE_DIR``, else ``$XDG_CACHE_HOME/flashllm``, else ``~/.cache/flashllm``."""
    if own := os.environ.get("FLASHLLM_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "flashllm"
    return Path("~/.cache/flashllm").expanduser()


def tune_dir() -> Path:
    """Folder of measured kernel choices, one JSON file per kind of device."""
    return cache_root() / "tune"


def make_key(parts: Mapping[str, Any]) -> str:
    """64 hexadecimal digits that identify ``parts`` (JSON values only), independent of their order."""
    return _digest(_canonical(parts))


def load(key: str, root: Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Path of the cubin and its metadata, or ``None`` when the entry is absent or damaged."""
    entry = _entry(key, root)
    try:
        sidecar = json.loads((entry / _META).read_bytes())
        meta = sidecar["meta"]
        if sidecar["meta_sha256"] != _digest(_canonical(meta)):
            return None
        if sidecar["cubin_sha256"] != _digest((entry / _CUBIN).read_bytes()):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry / _CUBIN, meta


def store(key: str, cubin: bytes, meta: Mapping[str, Any], root: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Put one entry in place and return what :func:`load` would; a valid entry already there wins.

    Raises :class:`OSError` when the cache cannot be written.
    """
    entry = _entry(key, root)
    for _ in range(_ATTEMPTS):
        # clear() in another process may remove the temporary directory or its parent. mkdir() may then find the parent
        # present and, when it looks again, gone, which it reports as FileExistsError.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return _store(entry, key, cubin, meta, root)
    raise OSError(f"{entry}: other processes keep removing this entry")


def _store(
    entry: Path, key: str, cubin: bytes, meta: Mapping[str, Any], root: Path | None
) -> tuple[Path, dict[str, Any]]:
    entry.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=entry.parent))
    try:
        sidecar = {"meta": meta, "meta_sha256": _digest(_canonical(meta)), "cubin_sha256": _digest(cubin)}
        _write_flushed(fresh / _CUBIN, cubin)
        _write_flushed(fresh / _META, json.dumps(sidecar, indent=1, sort_keys=True).encode())
        fresh.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        _flush_directory(fresh)
        # rename() replaces an empty directory only. Each round either puts ours in place, finds
        # another process's valid entry, or moves one damaged entry out of the way.
        for _ in range(_ATTEMPTS):
            try:
                fresh.rename(entry)
            except OSError as error:
                if (found := load(key, root)) is not None:
                    return found
                if error.errno not in _OCCUPIED:
                    raise
                _discard(entry)
            else:
                _flush_directory(entry.parent)
                return entry / _CUBIN, dict(meta)
        raise OSError(f"{entry}: other processes keep replacing this entry")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def info(root: Path | None = None) -> CacheInfo:
    """Number and size of the entries; never fails on a missing cache."""
    base = cache_root() if root is None else root
    entries = size = 0
    for entry in _entries(base):
        entries += 1
        size += sum(_size(file) for file in (entry / _CUBIN, entry / _META))
    tuned = sum(1 for _ in (base / "tune").glob("*.json"))
    return CacheInfo(path=base, entries=entries, size_bytes=size, tuned_files=tuned)


def clear(root: Path | None = None, *, tuned: bool = False) -> int:
    """Remove every compiled kernel and, with ``tuned``, the measured choices too; returns how many were removed.

    Removes only what this module names, so a cache directory shared with other files is safe.
    """
    base = cache_root() if root is None else root
    removed = 0
    for entry in list(_entries(base)):
        _discard(entry)
        removed += 1
    for leftover in (base / "kernels").glob(f"??/{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for shard in (base / "kernels").glob("??"):
        with contextlib.suppress(OSError):
            shard.rmdir()
    if tuned:
        for file in (base / "tune").glob("*.json"):
            file.unlink(missing_ok=True)
            removed += 1
    return removed


def _entry(key: str, root: Path | None) -> Path:
    return (cache_root() if root is None else root) / "kernels" / key[:2] / key


def _entries(base: Path) -> Iterator[Path]:
    for entry in sorted((base / "kernels").glob("??/*")):
        if _KEY.fullmatch(entry.name):
            yield entry


def _discard(entry: Path) -> None:
    """Take ``entry`` out of sight in one step, then delete it."""
    aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=entry.parent))
    with contextlib.suppress(OSError):
        entry.rename(aside / "old")
    shutil.rmtree(aside, ignore_errors=True)


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network and overlay file systems refuse to flush a directory; the rename is atomic without it.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
