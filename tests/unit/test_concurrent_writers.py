# SPDX-License-Identifier: Apache-2.0
"""Real processes that write the same files at the same time: nothing is lost, nothing half-written is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flashllm.bench import results
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import load_weights, save_weights
from flashllm.jit import cache

TESTS = Path(__file__).resolve().parents[1]
START = """
import sys
from pathlib import Path
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
"""
GO = """
print("ready", flush=True)
sys.stdin.readline()
"""


def start(program: str, folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """``count`` processes of ``program`` (imports, a line GO, the work), released at the same time."""
    path = os.pathsep.join([str(TESTS / "unit"), os.environ["PYTHONPATH"]])
    code = START + program.replace("GO\n", GO)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for seed in range(count)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Their output; all must succeed."""
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output)
    return outputs


TUNE = """
import numpy as np
from flashllm.device import DeviceFacts
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.matmul import tiled_csl, tune_cache
from test_matmul import H100
weights = [TiledCSL.from_dense(np.zeros((16 * seed + i + 1, 8), np.float16)) for i in range(15)]
GO
for w in weights:
    choice = next(iter(tiled_csl.candidates(w, 16, arch="90a")))
    path = tune_cache.store(w, 16, choice, median_us=10.0, device=H100)
    assert tune_cache.lookup(w, 16, device=H100) == choice
print(path)
"""


def test_tuned_choices_of_all_processes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    (path,) = {output.strip() for output in finish(start(TUNE, tmp_path, 4))}
    assert len(json.loads(Path(path).read_text())["choices"]) == 60
    assert {file.name for file in (tmp_path / "tune").iterdir()} == {Path(path).name, ".lock"}


RESULTS = """
from bench_rows import row
from flashllm.bench import results
GO
for turn in range(40):
    if turn % 3 == seed % 3:
        results.drop_torn_line(folder / "rows.jsonl")
    results.append(folder / "rows.jsonl", row(seed=1000 * seed + turn))
    results.read(folder / "rows.jsonl")
"""


def test_rows_of_all_processes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"schema":1,"torn by a cra')
    finish(start(RESULTS, tmp_path, 4))
    assert sorted(row.seed for row in results.read(path)) == [
        1000 * seed + turn for seed in range(4) for turn in range(40)
    ]


WRITER = """
import numpy as np
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import save_weights
weights = {name: TiledCSL.from_dense(np.full((130, 70), seed + 1, np.float16)) for name in "abcd"}
GO
for _ in range(60):
    save_weights(folder / "w.safetensors", weights)
"""
READER = """
from flashllm.io.container import load_weights
import numpy as np
GO
for turn in range(150):
    weights = load_weights(folder / "w.safetensors", mmap=bool(turn % 2))
    values = {float(w.to_dense().max()) for w in weights.values()}
    assert len(weights) == 4 and len(values) == 1, values
"""


def _save(path: Path) -> None:
    save_weights(path, {name: TiledCSL.from_dense(np.full((130, 70), 9, np.float16)) for name in "abcd"})


def test_readers_see_the_whole_file_of_one_writer(tmp_path: Path) -> None:
    _save(tmp_path / "w.safetensors")
    writers = start(WRITER, tmp_path, 2)
    readers = start(READER, tmp_path, 2)
    finish(writers + readers)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    _save(tmp_path / "w.safetensors")
    for delay in (0.0, 0.003, 0.01, 0.03):
        processes = start(WRITER.replace("range(60)", "range(10**9)"), tmp_path, 1)
        time.sleep(delay)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].communicate()
        assert {float(w.to_dense().max()) for w in load_weights(tmp_path / "w.safetensors").values()} <= {1.0, 9.0}


CACHE = """
import random
from flashllm.jit import cache
rng = random.Random(seed)
GO
for turn in range(60):
    key = cache.make_key({"turn": turn % 6})
    path, meta = cache.store(key, bytes([turn % 6]) * 5000, {"turn": turn % 6}, folder)
    if (found := cache.load(key, folder)) is not None:  # else damaged again meanwhile
        assert found[1] == {"turn": turn % 6}
    victim = rng.choice((path, path.with_name("kernel.json")))
    try:
        if turn % 5 == 1:
            victim.write_bytes(victim.read_bytes()[:-1])
        elif turn % 5 == 2:
            victim.unlink()
        elif turn % 5 == 3:
            victim.write_bytes(b"[" * 100_000)
        elif turn % 17 == 4:
            cache.clear(folder)
    except OSError:
        pass
"""


def test_damaged_kernels_are_replaced_while_others_write(tmp_path: Path) -> None:
    finish(start(CACHE, tmp_path, 3))
    for turn in range(6):
        key, code = cache.make_key({"turn": turn}), bytes([turn]) * 5000
        cache.store(key, code, {"turn": turn}, tmp_path)
        found = cache.load(key, tmp_path)
        assert found is not None
        assert (found[0].read_bytes(), found[1]) == (code, {"turn": turn})


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"NaN", b'{"meta": ' * 50_000, b""], ids=range(5))
def test_a_hostile_sidecar_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    key = cache.make_key({"a": 1})
    path, _ = cache.store(key, b"code", {"a": 1}, tmp_path)
    path.with_name("kernel.json").write_bytes(content)
    assert cache.load(key, tmp_path) is None
    cache.store(key, b"code", {"a": 1}, tmp_path)
    assert cache.load(key, tmp_path) == (path, {"a": 1})


def test_an_entry_that_is_a_dangling_link_is_replaced(tmp_path: Path) -> None:
    key = cache.make_key({"a": 1})
    entry = tmp_path / "kernels" / key[:2] / key
    entry.parent.mkdir(parents=True)
    entry.symlink_to("nowhere")
    path, _ = cache.store(key, b"code", {"a": 1}, tmp_path)
    assert path.read_bytes() == b"code"


def test_a_full_disk_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_rows import row

    path = tmp_path / "rows.jsonl"
    results.append(path, row(seed=1))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        with pytest.raises(OSError, match="the disk is full"):
            results.append(path, row(seed=2))
    results.append(path, row(seed=3))
    assert [r.seed for r in results.read(path)] == [1, 3]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"kind": "kernel", "schema": ' + "[" * 900 + "]" * 900 + "}"])
def test_deep_json_in_a_results_file_is_a_named_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(results.FormatError, match=r"rows\.jsonl:1"):
        results.read(path)


def test_integers_past_any_float_are_no_results() -> None:
    from bench_rows import row

    with pytest.raises(results.FormatError, match="median_us: expected a finite number"):
        row(median_us=10**400)


@pytest.mark.parametrize("value", [3.0, True, "3"])
@pytest.mark.parametrize("field", ["blocks_per_sm", "n_block", "resident_blocks"])
def test_tuned_choices_of_other_types_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    from test_matmul import H100, packed

    from flashllm.matmul import tiled_csl, tune_cache

    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w = packed()
    path = tune_cache.store(w, 16, next(iter(tiled_csl.candidates(w, 16, arch="90a"))), median_us=10.0, device=H100)
    payload = json.loads(path.read_text())
    payload["choices"][tune_cache.key_for(w, 16)]["choice"][field] = value
    path.write_text(json.dumps(payload))
    assert tune_cache.lookup(w, 16, device=H100) is None
    path.write_text("[" * 100_000)
    assert tune_cache.lookup(w, 16, device=H100) is None
