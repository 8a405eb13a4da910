# SPDX-License-Identifier: Apache-2.0
"""Every bad file gives one ``FormatError`` that says where and what; nothing is executed, awaited or allocated."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

import hostile
from flashllm.errors import FormatError

CONTAINERS = hostile.containers()
CASES = [(kind, name) for kind, container in CONTAINERS.items() for name in container.mutations]


@pytest.fixture(autouse=True)
def _in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_sound_file_is_read(tmp_path: Path, kind: str) -> None:
    container = CONTAINERS[kind]
    path = tmp_path / f"file{container.suffix}"
    container.write(path)
    container.use(container.read(path))
    link = tmp_path / f"link{container.suffix}"
    link.symlink_to(path.name)
    container.use(container.read(link))
    assert len(container.mutations) >= 30


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
def test_mutation(tmp_path: Path, kind: str, name: str) -> None:
    container = CONTAINERS[kind]
    mutation = container.mutations[name]
    path = tmp_path / f"file{container.suffix}"
    mutation.write(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    hostile.check(container, mutation, path)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "kibibytes"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name}, "nothing was unpacked or run"


@pytest.mark.parametrize("name", hostile.SPECIAL)
@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_no_file_of_the_kind(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / f"file{CONTAINERS[kind].suffix}"
    hostile.SPECIAL[name](path)
    with pytest.raises(FormatError) as error:
        CONTAINERS[kind].read(path)
    assert error.value.path == str(path)
    assert str(error.value).isprintable()
    assert not (tmp_path / hostile.MARKER).exists()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_missing_files(tmp_path: Path, kind: str) -> None:
    suffix = CONTAINERS[kind].suffix
    (tmp_path / f"link{suffix}").symlink_to(f"nowhere{suffix}")
    for name in ("none", "link"):
        with pytest.raises(FileNotFoundError):
            CONTAINERS[kind].read(tmp_path / f"{name}{suffix}")
    with pytest.raises(ValueError, match="path: expected a path without zero bytes"):
        CONTAINERS[kind].read(Path(f"a\0b{suffix}"))


def test_the_trap_works(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    import pickle

    pickle.loads(hostile.TRAP)
    assert [entry.name for entry in tmp_path.iterdir()] == [hostile.MARKER]
