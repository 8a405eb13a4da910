# SPDX-License-Identifier: Apache-2.0
"""Measured kernel choices and their times: one JSON file per kind of GPU in the cache directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flashllm.io.files import locked, write_whole
from flashllm.jit.cache import tune_dir
from flashllm.registry import FORMATS, kernel

if TYPE_CHECKING:
    from flashllm.formats.weight import SparseWeight
    from flashllm.matmul.kernel import KernelChoice

VERSION = 2
_LOCK = ".lock"
_SAME_DENSITY = 0.05
"""Measured times are used for matrices whose density differs by less than this."""


class Kind(Protocol):
    """What tells one kind of GPU from another: a ``DeviceFacts`` or a ``Gpu``."""

    @property
    def name(self) -> str:
        """The driver's full name."""

    @property
    def sm_count(self) -> int:
        """Multiprocessors."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The fastest choice for a weight and ``n`` rows of x, and its time."""

    choice: KernelChoice
    """The fastest instance of the kernel."""
    expanded: bool
    """Expanding the weight for cuBLAS was faster; ``median_us`` is then the time of that."""
    n: int
    density: float
    """Fraction of stored elements of the weight measured."""
    weight_bytes: int
    median_us: float
    """L2-cold, in a CUDA graph."""


_loaded: dict[tuple[Path, int, int, int], dict[str, Measurement]] = {}


def path_for(device: Kind) -> Path:
    """The file of ``device``'s kind: its name and SM count decide which choice is fastest."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return tune_dir() / f"{name}-{device.sm_count}sm.json"


def key_for(w: SparseWeight, n: int) -> str:
    """What a measured choice is valid for: format, type, shape and what the kernel adds. The format comes first."""
    return f"{_prefix(w.format, w.dtype, w.shape)}{kernel(w.format).tune_key(w, n)}"


def _prefix(format_name: str, dtype: str, shape: tuple[int, int]) -> str:
    return f"{format_name} {dtype} {shape[0]}x{shape[1]} "


def lookup(w: SparseWeight, n: int, *, device: Kind) -> KernelChoice | None:
    """The choice measured for ``w`` and ``n`` on this kind of device, if any."""
    found = find(w, n, device=device)
    return None if found is None else found.choice


def find(w: SparseWeight, n: int, *, device: Kind) -> Measurement | None:
    """What was measured for ``w`` and ``n``, or an N that takes the same blocks of columns, on this kind of device."""
    return _read(path_for(device)).get(key_for(w, n))


def measured(
    format_name: str, shape: tuple[int, int], n: int, *, dtype: str, density: float, device: Kind
) -> Measurement | None:
    """What was measured on this kind of device for such a matrix and exactly ``n`` rows of x, if anything.

    Of several densities, the nearest is taken; it must differ by less than 0.05.
    """
    prefix = _prefix(format_name, dtype, shape)
    similar = [
        found
        for key, found in _read(path_for(device)).items()
        if key.startswith(prefix) and found.n == n and abs(found.density - density) < _SAME_DENSITY
    ]
    return min(similar, key=lambda found: abs(found.density - density), default=None)


def store(
    w: SparseWeight, n: int, choice: KernelChoice, *, median_us: float, device: Kind, expanded: bool = False
) -> Path:
    """Record ``choice``, whether to expand the weight instead, and the time of the faster way; return the file.

    The new file is written beside the old one and renamed, so that readers see one or the other; a lock
    ensures that processes that record at the same time keep each other's choices.
    """
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing(path.parent):
        entries = _parse(path)
        entries[key_for(w, n)] = Measurement(
            choice=choice,
            expanded=expanded,
            n=n,
            density=w.density,
            weight_bytes=w.nbytes,
            median_us=median_us,
        )
        choices: dict[str, Any] = dict(sorted(entries.items()))
        payload = {"version": VERSION, "choices": {key: asdict(value) for key, value in choices.items()}}
        write_whole(path, json.dumps(payload, indent=1))
    _loaded.clear()
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the lock of all writers in ``folder``, which is on a file of its own, as the others are replaced."""
    with (folder / _LOCK).open("ab") as lock, locked(lock.fileno()):
        yield


def _read(path: Path) -> dict[str, Measurement]:
    try:
        stat = path.stat()
    except OSError:
        return {}
    # The modification time alone advances in steps of milliseconds, so two files may share one.
    stamp = (path, stat.st_mtime_ns, stat.st_ino, stat.st_size)
    known = _loaded.get(stamp)
    if known is None:
        known = _loaded[stamp] = _parse(path)
    return known


def _parse(path: Path) -> dict[str, Measurement]:
    """Entries of the file; a damaged or foreign file, or an entry of another release, counts as not measured."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(payload, dict) or payload.get("version") != VERSION:
        return {}
    choices = payload.get("choices")
    found = {}
    for key, value in choices.items() if isinstance(choices, dict) else ():
        measurement = _measurement(key.partition(" ")[0], value)
        if measurement is not None:
            found[key] = measurement
    return found


def _measurement(format_name: str, value: Any) -> Measurement | None:
    """An entry whose choice can be launched and whose numbers make sense, or ``None``."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Measurement)}:
        return None
    choice = _choice(format_name, value["choice"])
    expanded, n, weight_bytes = (value[name] for name in ("expanded", "n", "weight_bytes"))
    density, us = value["density"], value["median_us"]
    typed = type(expanded) is bool and type(n) is type(weight_bytes) is int and type(density) is type(us) is float
    if choice is None or not typed or min(n - 1, weight_bytes) < 0 or not (0 <= density <= 1 and 0 < us < math.inf):
        return None
    return Measurement(choice=choice, expanded=expanded, n=n, density=density, weight_bytes=weight_bytes, median_us=us)


def _choice(format_name: str, value: Any) -> KernelChoice | None:
    """A choice of the format's kernel, or ``None`` unless ``value`` is one that can be launched."""
    if format_name not in FORMATS or not isinstance(value, dict):
        return None
    module = kernel(format_name)
    expected = {field.name: field.type for field in fields(module.Choice)}
    # 16 and 16.0 are equal, and so are True and 1, until one of them is part of a C++ name or of a grid.
    if {name: type(part).__name__ for name, part in value.items()} != expected:
        return None
    try:
        choice: KernelChoice = module.Choice(**value)
        return choice if module.usable(choice) else None
    except (TypeError, KeyError, ValueError):
        return None
