# SPDX-License-Identifier: Apache-2.0
"""Building, caching and calling emulated kernels; every kernel of the package compiles for the CPU."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm import ArgumentError, TiledCSL
from flashllm.backends import emulator, emulator_build
from flashllm.bench import bandwidth, data
from flashllm.cpus import cores
from flashllm.errors import CompileError, MissingDependencyError
from flashllm.jit.cache import cache_root
from flashllm.jit.sources import cuda_root
from flashllm.jit.spec import KernelSpec
from products import assert_exact, exact, integers, weight

READ = bandwidth.spec()
SMALL = """#include "flashllm/portable.cuh"
namespace small {
template <typename T> __global__ void scale(const T* x, T* y, T by) { y[threadIdx.x] = x[threadIdx.x] * by; }
}
"""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the emulator itself, which takes longer to compile than all kernels here."""
    folder = tmp_path_factory.mktemp("cache")
    entry = emulator_build._runtime(emulator.BuildOptions()).parent
    shutil.copytree(entry, folder / entry.relative_to(cache_root()))
    return folder


@pytest.fixture
def small(tmp_path: Path, cache_dir: Path) -> tuple[KernelSpec, emulator.BuildOptions]:
    """A kernel that no other test has compiled."""
    (tmp_path / "small.cu").write_text(f"{SMALL}// {tmp_path.name}\n")
    spec = KernelSpec(name="scale", source="small.cu", function="small::scale", template=(("T", "float"),), threads=40)
    return spec, emulator.BuildOptions(arch="80", source_root=tmp_path, cache_dir=cache_dir)


def test_available_here() -> None:
    assert emulator.available() is None


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    monkeypatch.setenv("FLASHLLM_CXX", "no-such-compiler")
    assert "no-such-compiler" in (emulator.available() or "")
    with pytest.raises(MissingDependencyError, match="no-such-compiler"):
        emulator.compile_emulated(*small)


def test_a_compiler_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    monkeypatch.setenv("FLASHLLM_CXX", "false")
    with pytest.raises(CompileError, match=r"^false --version fails:\nstatus 1, without a word$"):
        emulator.compile_emulated(*small)


def test_an_empty_variable_names_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CXX", "")
    assert emulator.available() is None


def test_second_build_comes_from_the_cache(small: Any) -> None:
    spec, options = small
    first = emulator.compile_emulated(spec, options)
    second = emulator.compile_emulated(spec, options)
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path
    (options.source_root / "small.cu").write_text(SMALL.replace("* by", "+ by"))
    assert not emulator.compile_emulated(spec, options).cached


def test_damaged_cache_entry_is_rebuilt(small: Any) -> None:
    first = emulator.compile_emulated(*small)
    first.path.write_bytes(first.path.read_bytes()[:1000])
    second = emulator.compile_emulated(*small)
    assert not second.cached
    assert second.path.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(small: Any, tmp_path: Path) -> None:
    spec, options = small
    (tmp_path / "file").touch()
    options = replace(options, cache_dir=tmp_path / "file" / "cache")
    emulator_build._private_folder.cache_clear()
    with pytest.warns(UserWarning, match=r"kernel cache cannot be written \(.* Not a directory: ") as warned:
        first = emulator.compile_emulated(spec, options)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither the kernel nor the emulator itself is compiled again
        second = emulator.compile_emulated(spec, options)
        assert emulator_build._runtime(options).is_file()
    assert (second.cached, second.path) == (True, first.path)


def test_compile_error_carries_the_compiler_s_words(small: Any) -> None:
    spec, options = small
    (options.source_root / "small.cu").write_text(SMALL.replace("* by", "* buy"))
    with pytest.raises(CompileError, match=r"scale<T=float> \(small.cu\) does not compile(.|\n)*'buy'"):
        emulator.compile_emulated(spec, options)


def test_other_architectures_are_refused(small: Any) -> None:
    spec, options = small
    only = KernelSpec(**{**{f: getattr(spec, f) for f in ("name", "source", "function", "template", "threads")},
                         "archs": ("90a",)})  # fmt: skip
    with pytest.raises(CompileError, match="written for sm_90a"):
        emulator.compile_emulated(only, options)


def test_launch_checks_its_arguments(small: Any) -> None:
    spec, options = small
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    emulator.launch(spec, (1,), (x, y, np.float32(3)), build=options)
    np.testing.assert_array_equal(y, x * 3)
    bad: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
        ("args", (1,), (x, y)),
        (r"args\[2\]", (1,), (x, y, np.float64(3))),
        (r"args\[2\]", (1,), (x, y, 3.0)),
        (r"args\[1\]", (1,), (x, y[::2], np.float32(3))),
        ("grid", (0,), (x, y, np.float32(3))),
        ("grid", (1, 1, 1, 1), (x, y, np.float32(3))),
    ]
    for name, grid, args in bad:
        with pytest.raises(ArgumentError, match=f"^{name}: expected"):
            emulator.launch(spec, grid, args, build=options)


def test_spmm_names_bad_operands() -> None:
    w = TiledCSL.from_dense(np.ones((4, 8), np.float16))
    for x in (np.ones((2, 7), np.float16), np.ones((2, 8), np.float32), np.ones(8, np.float16),
              np.ones((8, 2), np.float16).T):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"^x: expected"):
            emulator.spmm(x, w)


def test_sanitized_kernels_need_the_sanitizer_in_the_process(small: Any) -> None:
    spec, options = small
    options = emulator.BuildOptions(**{**options.__dict__, "sanitize": True})
    with pytest.raises(MissingDependencyError, match="sanitizer_environment"):
        emulator.launch(spec, (1,), (), build=options)


def test_portable_switch_gives_the_same_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The switch that processors other than x86-64, and those without AVX2, use."""
    w = weight("skewed", (130, 200), 0.3, "fp16")
    x = integers(np.random.default_rng(0), (12, 200), "fp16")
    want = emulator.spmm(x, TiledCSL.from_dense(w), arch="80", seed=5)[1]
    flags = tuple(flag for flag in emulator_build._FLAGS if flag != "-g1")
    monkeypatch.setattr(emulator_build, "_FLAGS", (*flags, "-DFLASHLLM_UCONTEXT"))
    monkeypatch.setattr(emulator_build, "_RUNTIME_SPEED", "-Og")
    monkeypatch.setattr(emulator_build, "_machine_flags", lambda: ())
    build = emulator.BuildOptions(arch="80", cache_dir=tmp_path)
    got, counts = emulator.spmm(x, TiledCSL.from_dense(w), seed=5, build=build)
    assert_exact(got, exact(x, w, "fp16"))
    assert counts == want


def test_measurement_kernels_run() -> None:
    emulator.preload([READ, *data.specs()])
    words = np.random.default_rng(0).integers(0, 1 << 32, 4 * 5000, dtype=np.uint64).astype(np.uint32)
    checksum = np.zeros(1, np.uint32)
    counts = emulator.launch(READ, (2,), (words, np.int64(5000), checksum), seed=3)
    assert checksum[0] == np.bitwise_xor.reduce(words)
    assert counts.global_read_bytes == words.nbytes


def test_every_function_of_ptx_has_a_twin() -> None:
    """A new wrapper must come with its emulation."""
    names = r"FLASHLLM_DEVICE [\w ]*?(\w+)\("
    real, twin = (
        set(re.findall(names, (cuda_root() / path / "ptx.cuh").read_text()))
        for path in ("flashllm", "emulator/flashllm")
    )
    assert real <= twin
    assert len(real) > 15
    text = [(cuda_root() / path / "portable.cuh").read_text() for path in ("flashllm", "emulator/flashllm")]
    macros = [set(re.findall(r"#define (FLASHLLM_\w+)", t)) for t in text]
    assert macros[0] <= macros[1]


def test_nothing_of_the_emulator_exceeds_400_lines() -> None:
    files = [f for f in (cuda_root() / "emulator").rglob("*") if f.is_file()]
    assert len(files) > 10
    assert max(len(f.read_text().splitlines()) for f in files) <= 400
    assert cores() >= 1
