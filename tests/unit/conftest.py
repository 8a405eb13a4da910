# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import tensors_of, write


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, and a private cache."""
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A checkpoint with zeros."""
    return write(tmp_path / "llama", "llama", tensors_of("llama", "fp16"))
