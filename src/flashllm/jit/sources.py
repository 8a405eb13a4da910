# SPDX-License-Identifier: Apache-2.0
"""Finds the device code and digests it, headers included."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from functools import lru_cache
from pathlib import Path

from flashllm.errors import CompileError, MissingDependencyError

_INCLUDE = re.compile(rb"^[ \t]*#[ \t]*include[ \t]*(.*?)[ \t]*\r?$", re.MULTILINE)
_TARGET = re.compile(rb'^(?:"([^"\n]+)"|<([^>\n]+)>)')
_MARKER = "flashllm/ptx.cuh"


@lru_cache(maxsize=1)
def cuda_root() -> Path:
    """Folder with the device code: inside an installed wheel, else ``<repository>/cuda``."""
    package = Path(str(importlib.resources.files("flashllm")))
    candidates = (package / "cuda", package.parent.parent / "cuda")
    for candidate in candidates:
        if (candidate / _MARKER).is_file():
            return candidate
    raise MissingDependencyError(
        f"device code not found: no {_MARKER} below {' or '.join(map(str, candidates))}; reinstall flashllm"
    )


def source_files(path: Path, root: Path | None = None) -> list[Path]:
    """``path`` and every header of ours that it includes, directly or not, each once, in include order.

    An include counts as ours when it names a file below ``root`` (or, quoted, beside the including
    file); anything else is a CUDA header. An include through a macro cannot be followed and is
    refused, because a kernel cached under an incomplete digest would go stale unnoticed.
    """
    root = cuda_root() if root is None else root
    seen: dict[Path, None] = {}

    def visit(file: Path) -> None:
        if file in seen:
            return
        seen[file] = None
        try:
            text = file.read_bytes()
        except OSError as error:
            raise CompileError(f"{file}: cannot read the kernel source: {error.strerror}") from error
        for match in _INCLUDE.finditer(text):
            target = _TARGET.match(match.group(1))
            if target is None:
                wanted = match.group(1).decode(errors="replace")
                raise CompileError(f'{file}: #include must name a file as "..." or <...>, got {wanted!r}')
            name = (target.group(1) or target.group(2)).decode(errors="replace")
            places = [root / name] if target.group(2) else [file.parent / name, root / name]
            for place in places:
                if place.is_file():
                    visit(place.resolve())
                    break

    visit(path.resolve())
    return list(seen)


def source_digest(path: Path, root: Path | None = None) -> str:
    """SHA-256 over ``path`` and our headers below it; changes when any byte or file name of them does."""
    root = (cuda_root() if root is None else root).resolve()
    digest = hashlib.sha256()
    for file in source_files(path, root):
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
