# SPDX-License-Identifier: Apache-2.0
"""Measured kernel choices: one JSON file per kind of GPU in the cache directory."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashllm.jit.cache import tune_dir
from flashllm.matmul.tiled_csl import Choice, n_block_for, vectors_for

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.formats.tiled_csl import TiledCSL

VERSION = 1
_loaded: dict[tuple[Path, int], dict[str, Choice]] = {}


def path_for(device: DeviceFacts) -> Path:
    """The file of ``device``'s kind: its name and SM count decide which choice is fastest."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return tune_dir() / f"{name}-{device.sm_count}sm.json"


def key_for(w: TiledCSL, n: int) -> str:
    """What a measured choice is valid for: format, type, shape, class of density and column block."""
    columns = n_block_for(n)
    wide = -(-n // columns)
    return f"{w.format} {w.dtype} {w.shape[0]}x{w.shape[1]} v{vectors_for(w)} n{columns}x{wide}"


def lookup(w: TiledCSL, n: int, *, device: DeviceFacts) -> Choice | None:
    """The choice measured for ``w`` and ``n`` on this kind of device, if any."""
    return _read(path_for(device)).get(key_for(w, n))


def store(w: TiledCSL, n: int, choice: Choice, *, device: DeviceFacts) -> Path:
    """Record ``choice`` and return the file. Written beside and renamed: readers see the old file or the new one."""
    path = path_for(device)
    entries = dict(_read(path))
    entries[key_for(w, n)] = choice
    payload = {"version": VERSION, "choices": {key: asdict(value) for key, value in sorted(entries.items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(payload, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _loaded.clear()
    return path


def _read(path: Path) -> dict[str, Choice]:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return {}
    known = _loaded.get((path, stamp))
    if known is None:
        known = _loaded[(path, stamp)] = _parse(path)
    return known


def _parse(path: Path) -> dict[str, Choice]:
    """Entries of the file; a damaged or foreign file, or an entry of another release, counts as not measured."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(payload, dict) or payload.get("version") != VERSION:
        return {}
    choices = payload.get("choices")
    found = {}
    for key, value in choices.items() if isinstance(choices, dict) else ():
        choice = _choice(value)
        if choice is not None:
            found[key] = choice
    return found


def _choice(value: Any) -> Choice | None:
    from flashllm.matmul.tiled_csl import specs

    if not isinstance(value, dict) or set(value) != {field.name for field in fields(Choice)}:
        return None
    try:
        choice = Choice(**value)
        usable = choice.spec in specs() and 1 <= choice.blocks_per_sm <= 64
    except (TypeError, KeyError, ValueError):
        return None
    return choice if usable else None
