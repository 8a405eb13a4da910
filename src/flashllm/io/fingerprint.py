# SPDX-License-Identifier: Apache-2.0
"""Tells checkpoints apart without reading all of them, so that interrupted work continues with the same one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import open_regular

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of its configuration, its tensors' names, shapes and types, and samples of its files, in hexadecimal.

    Different checkpoints have different fingerprints; a copy has the same one. Raises ``FormatError``, ``OSError``.
    """
    digest = hashlib.sha256()
    tensors = [(info.name, list(info.shape), info.stored) for info in checkpoint.tensors.values()]
    digest.update(json.dumps([dict(checkpoint.config), tensors], sort_keys=True, default=str).encode())
    path = Path(checkpoint.path)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
            last = max(0, size - _SAMPLE_BYTES)
            for number in range(_SAMPLES):
                opened.seek(last * number // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
