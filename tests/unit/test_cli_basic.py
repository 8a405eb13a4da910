# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import flashllm
from flashllm.cli.main import command
from flashllm.errors import FormatError
from flashllm.jit import KernelSpec

HEAVY = ["numpy", "cupy", "scipy", "rich", "cuda.core", "safetensors", "ml_dtypes", "matplotlib"]


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False)


def test_import_loads_nothing_heavy() -> None:
    done = _python(f"import sys, flashllm; print([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_loads_nothing_heavy_and_is_quick(argument: str) -> None:
    code = (
        "import sys\nfrom flashllm.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    started = time.perf_counter()
    done = _python(code, argument)
    seconds = time.perf_counter() - started
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert seconds < 3, "0.15 s on an idle machine; the margin is for a busy one"


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashllm", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == f"flashllm, version {flashllm.__version__}"


def test_output_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "\u2192.npy"
    np.save(path, np.eye(4, dtype=np.float16))
    done = subprocess.run(
        [sys.executable, "-m", "flashllm", "inspect", str(path)],
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2192.npy: 4x4 fp16" in done.stdout


def test_every_command_has_help() -> None:
    names = command.list_commands(None)  # type: ignore[arg-type]
    assert {"cache", "compile", "doctor"} <= set(names)
    overview = CliRunner().invoke(command, ["--help"]).output
    for name in names:
        assert f"\n  {name} " in overview
        result = CliRunner().invoke(command, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.output


def test_unknown_command() -> None:
    result = CliRunner().invoke(command, ["nonsense"])
    assert result.exit_code == 2
    assert "No such command 'nonsense'" in result.output


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm.jit import cache

    def fail() -> Any:
        raise FormatError(field="words", expected="uint32", got="float64", path="w.safetensors")

    monkeypatch.setattr(cache, "info", fail)
    result = CliRunner().invoke(command, ["cache", "info"])
    assert result.exit_code == 1
    assert result.output.strip() == "Error: w.safetensors: words: expected uint32, got float64"
    with_traceback = CliRunner().invoke(command, ["--traceback", "cache", "info"])
    assert isinstance(with_traceback.exception, FormatError)


def test_cache_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashllm.jit import cache

    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    cache.store(cache.make_key({"a": 1}), b"code", {})
    info = json.loads(CliRunner().invoke(command, ["cache", "info", "--json"]).output)
    assert info["path"] == str(tmp_path)
    assert info["kernels"] == 1
    assert "kernels  1 (" in CliRunner().invoke(command, ["cache", "info"]).output
    assert "removed 1 of 1" in CliRunner().invoke(command, ["cache", "clear"]).output
    assert cache.info().entries == 0


SOURCE = """\
template <int kN> __global__ void good(float* p) { p[threadIdx.x] = kN; }
__global__ void indexed(float* p, int i) {
  float local[64];
  for (int j = 0; j < 64; ++j) local[j] = p[j];
  for (int j = 0; j < 64; ++j) local[(i * j) & 63] += 1.0f;
  p[threadIdx.x] = local[i & 63];
}
"""
GOOD = KernelSpec(name="good", source="k.cu", function="good", template=(("kN", "4"),), threads=128)
HOPPER = KernelSpec(name="hopper", source="k.cu", function="good", template=(("kN", "5"),), threads=128, archs=("90a",))
SPILLS = KernelSpec(name="spills", source="k.cu", function="indexed", threads=32)
LARGE = KernelSpec(
    name="large", source="k.cu", function="good", template=(("kN", "6"),), threads=32, shared_bytes=150_000
)
ABSENT = KernelSpec(name="absent", source="k.cu", function="absent", threads=32)


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs ``flashllm compile`` on kernels of our own."""
    from flashllm.errors import MissingDependencyError
    from flashllm.jit import sources, toolchain

    try:
        toolchain.toolchain()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    (tmp_path / "k.cu").write_text(SOURCE)
    monkeypatch.setattr(sources, "cuda_root", lambda: tmp_path)

    def run(specs: list[KernelSpec], *args: str) -> Any:
        registry = ModuleType("flashllm.registry")
        registry.all_specs = lambda: specs  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flashllm.registry", registry)
        monkeypatch.setattr(flashllm, "registry", registry, raising=False)
        return CliRunner().invoke(command, ["compile", *args])

    return run


def test_compile_all(compile_with: Any) -> None:
    result = compile_with([GOOD, HOPPER], "--all")
    assert result.exit_code == 0, result.output
    for arch in ("80", "86", "89", "90a", "100a", "120a"):
        assert f"sm_{arch} " in result.output
    assert "7 of 7 are fine; 7 built now" in result.output


def test_compile_json(compile_with: Any) -> None:
    result = compile_with([GOOD], "--arch", "sm_90a", "--json")
    row = json.loads(result.output)
    assert (row["kernel"], row["arch"], row["threads"]) == ("good<kN=4>", "90a", 128)
    assert row["registers"] > 0
    assert (row["spill_bytes"], row["local_bytes"], row["problem"]) == (0, 0, None)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (SPILLS, "spills uses local memory on sm_86"),
        (LARGE, "large<kN=6> needs 150,000 bytes of shared memory, a block on sm_86 can have 101,376"),
        (ABSENT, "does not compile for sm_86"),
    ],
)
def test_compile_fails_on_problems(compile_with: Any, spec: KernelSpec, text: str) -> None:
    result = compile_with([GOOD, spec], "--arch", "86")
    assert result.exit_code == 1
    assert text in result.output
    assert "1 of 2 are fine" in result.output


def test_compile_without_gpu_asks_for_an_arch(compile_with: Any) -> None:
    from flashllm.device import gpu_problem

    if gpu_problem() is None:
        pytest.skip("this machine has a GPU")
    result = compile_with([GOOD])
    assert result.exit_code == 2
    assert "--arch 90a" in result.output


def test_compile_refuses_what_matches_nothing(compile_with: Any) -> None:
    result = compile_with([HOPPER], "--arch", "80")
    assert result.exit_code == 2
    assert "--kernel: no kernel matches '' on sm_80" in result.output


def test_dump_sass(compile_with: Any, tmp_path: Path) -> None:
    from flashllm.errors import MissingDependencyError
    from flashllm.jit.sass import find_disassembler

    try:
        find_disassembler()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    result = compile_with([GOOD], "--arch", "80", "--arch", "90a", "--dump-sass", str(tmp_path / "sass"))
    assert result.exit_code == 0, result.output
    files = sorted(file.name for file in (tmp_path / "sass").iterdir())
    assert files == ["good_kN=4.sm_80.sass", "good_kN=4.sm_90a.sass"]
    assert "STG" in (tmp_path / "sass" / files[0]).read_text()


def test_dump_sass_without_a_disassembler(compile_with: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashllm.jit import sass

    monkeypatch.setattr(sass, "_find", lambda name: None)
    result = compile_with([GOOD], "--arch", "80", "--dump-sass", str(tmp_path / "sass"))
    assert result.exit_code == 1
    assert "pip install nvidia-cuda-nvdisasm" in result.output
