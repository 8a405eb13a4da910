# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashllm.jit import cache

KEY = cache.make_key({"kernel": "k", "arch": "90a"})
META: dict[str, Any] = {"lowered_name": "_Z1k", "resources": {"registers": 8}}
CODE = bytes(range(256)) * 40


def test_round_trip(tmp_path: Path) -> None:
    assert cache.load(KEY, tmp_path) is None
    stored = cache.store(KEY, CODE, META, tmp_path)
    assert stored == cache.load(KEY, tmp_path)
    path, meta = stored
    assert path.read_bytes() == CODE
    assert meta == META


def test_key_depends_on_content_only() -> None:
    assert cache.make_key({"arch": "90a", "kernel": "k"}) == KEY
    assert cache.make_key({"arch": "90", "kernel": "k"}) != KEY


def test_first_valid_entry_stays(tmp_path: Path) -> None:
    cache.store(KEY, CODE, META, tmp_path)
    path, _ = cache.store(KEY, b"another build", META, tmp_path)
    assert path.read_bytes() == CODE


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cubin bit", "cubin cut", "cubin gone", "meta value", "meta cut", "meta gone"])
def test_damaged_entries_count_as_absent_and_are_replaced(tmp_path: Path, damage: str) -> None:
    path, _ = cache.store(KEY, CODE, META, tmp_path)
    sidecar = path.with_name("kernel.json")
    if damage == "cubin bit":
        _flip(path, 1234)
    elif damage == "cubin cut":
        path.write_bytes(CODE[:-1])
    elif damage == "cubin gone":
        path.unlink()
    elif damage == "meta value":
        sidecar.write_text(sidecar.read_text().replace("_Z1k", "_Z2k"))
    elif damage == "meta cut":
        sidecar.write_text(sidecar.read_text()[:30])
    else:
        sidecar.unlink()
    assert cache.load(KEY, tmp_path) is None
    path, meta = cache.store(KEY, CODE, META, tmp_path)
    assert (path.read_bytes(), meta) == (CODE, META)
    assert [entry.name for entry in path.parent.parent.iterdir()] == [KEY]


def test_sidecar_may_hold_any_json(tmp_path: Path) -> None:
    path, _ = cache.store(KEY, CODE, META, tmp_path)
    for text in ("[]", "null", "3", '{"meta": 1}', "\xff"):
        path.with_name("kernel.json").write_text(text, encoding="latin-1")
        assert cache.load(KEY, tmp_path) is None


def test_a_failed_store_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.store(KEY, CODE, META, tmp_path)
    assert cache.load(KEY, tmp_path) is None
    assert list((tmp_path / "kernels" / KEY[:2]).iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from flashllm.jit import cache
root, seed = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    key = cache.make_key({"turn": turn})
    path, meta = cache.store(key, bytes([seed]) * 5000, {"seed": seed}, root)
    found = cache.load(key, root)
    assert found is not None and found[0].read_bytes() == bytes([found[1]["seed"]]) * 5000, found
"""


def test_concurrent_processes_share_one_cache(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    for worker in workers:  # all start together, so that they collide
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    assert cache.info(tmp_path).entries == 40
    names = [entry.name for entry in (tmp_path / "kernels").glob("??/*")]
    assert not [name for name in names if name.startswith("tmp-")]


def test_info_and_clear(tmp_path: Path) -> None:
    assert cache.info(tmp_path).entries == 0
    for number in range(3):
        cache.store(cache.make_key({"n": number}), CODE, META, tmp_path)
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "H100.json").write_text("{}")
    (tmp_path / "kernels" / "notes.txt").write_text("mine")
    leftover = tmp_path / "kernels" / KEY[:2] / "tmp-crashed"
    leftover.mkdir(parents=True)
    found = cache.info(tmp_path)
    assert (found.entries, found.tuned_files) == (3, 1)
    assert found.size_bytes > 3 * len(CODE)
    assert cache.clear(tmp_path) == 3
    assert cache.info(tmp_path).entries == 0
    assert not leftover.exists()
    assert (tmp_path / "tune" / "H100.json").exists()
    assert (tmp_path / "kernels" / "notes.txt").exists()
    assert cache.clear(tmp_path, tuned=True) == 1
    assert cache.info(tmp_path).tuned_files == 0


def test_cache_root_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "own"
    monkeypatch.delenv("FLASHLLM_CACHE_DIR")
    assert cache.cache_root() == tmp_path / "xdg" / "flashllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "flashllm"


def test_sidecar_is_readable_json(tmp_path: Path) -> None:
    path, _ = cache.store(KEY, CODE, META, tmp_path)
    assert json.loads(path.with_name("kernel.json").read_text())["meta"] == META
