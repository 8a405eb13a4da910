# SPDX-License-Identifier: Apache-2.0
"""Pruning and conversion of whole checkpoints on the GPU give what they give on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm.convert import upload
from flashllm.convert.run import convert
from flashllm.io.checkpoint import open_checkpoint
from flashllm.prune.methods import METHODS
from flashllm.prune.run import Settings, prune
from model_cases import matrix_names, read_tensors, write_checkpoint

pytestmark = pytest.mark.gpu

TOKENS = np.random.default_rng(0).integers(0, 90, (6, 40))


def _matrices(path: Path) -> dict[str, Any]:
    tensors = read_tensors(path)
    return {name: tensors[name] for name in matrix_names(path)}


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_elements_are_pruned(tmp_path: Path, cp: Any, method: str, kind: str) -> None:
    source = write_checkpoint(tmp_path / "model", kind)
    for name, xp in (("cpu", np), ("gpu", cp)):
        with open_checkpoint(source) as checkpoint:
            prune(checkpoint, tmp_path / name, Settings(method=method, sparsity=0.5), tokens=TOKENS, xp=xp)
    ours, theirs = _matrices(tmp_path / "cpu"), _matrices(tmp_path / "gpu")
    for name, left in ours.items():
        right = theirs[name]
        assert np.count_nonzero(left) == np.count_nonzero(right)
        # Sums have another order: scores that are almost equal may change places.
        assert ((left == 0) != (right == 0)).mean() < (0.02 if METHODS[method].calibrates else 1e-9), name
        both = (left != 0) & (right != 0)
        np.testing.assert_allclose(left[both].astype(np.float32), right[both].astype(np.float32), atol=0.02)


@pytest.mark.parametrize("format", ["tiled-csl", "bitmap", "slot24"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_files_are_the_same(
    tmp_path: Path, cp: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, format: str
) -> None:  # fmt: skip
    monkeypatch.setattr(upload, "BUFFER_BYTES", 4096)  # many copies
    monkeypatch.setattr(upload, "_PART_BYTES", 512)
    source = write_checkpoint(tmp_path / "model", "llama", dtype=dtype, zeros=0.7)
    for device in ("cpu", "gpu"):
        convert(source, tmp_path / device, format=format, device=device)
    for path in (tmp_path / "cpu").iterdir():
        assert path.read_bytes() == (tmp_path / "gpu" / path.name).read_bytes(), path.name


def test_upload_keeps_every_byte(cp: Any) -> None:
    source = np.random.default_rng(1).integers(0, 1 << 16, (3001, 40_007)).astype(np.uint16)
    target = cp.zeros(source.shape, cp.uint16)
    with upload.Upload() as uploading:
        for first in range(0, len(source), 1000):
            uploading.copy(target[first : first + 1000], source[first : first + 1000])
    assert (target.get() == source).all()
