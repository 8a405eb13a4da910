# SPDX-License-Identifier: Apache-2.0
"""Compiling small kernels for GPUs that are not present; needs NVRTC."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashllm.errors import CompileError, MissingDependencyError
from flashllm.jit import ALL_ARCHS, KernelSpec, cache, workers
from flashllm.jit import compile as compile_module
from flashllm.jit.compile import build, compile_kernel, compile_many

SCALE = """\
#include "flashllm/factor.cuh"
namespace demo {
template <typename T, int kN>
__global__ void __launch_bounds__(128) scale(T* p) {
  __shared__ T buffer[128];
  buffer[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = buffer[127 - threadIdx.x] * T(float(kN * kFactor));
}
extern "C" __global__ void plain(float* p) { p[threadIdx.x] = 1.0f; }
__global__ void indexed(float* p, int i) {
  float local[64];
  for (int j = 0; j < 64; ++j) local[j] = p[j];
  for (int j = 0; j < 64; ++j) local[(i * j) & 63] += 1.0f;
  p[threadIdx.x] = local[i & 63];
}
}  // namespace demo
"""

SPEC = KernelSpec(
    name="scale",
    source="demo/scale.cu",
    function="demo::scale",
    template=(("T", "__half"), ("kN", "3")),
    threads=128,
)


@pytest.fixture(scope="module", autouse=True)
def _needs_nvrtc() -> None:
    from flashllm.jit.toolchain import toolchain

    try:
        toolchain()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda"
    (folder / "demo").mkdir(parents=True)
    (folder / "flashllm").mkdir()
    (folder / "demo/scale.cu").write_text(SCALE)
    (folder / "flashllm/factor.cuh").write_text(
        "#pragma once\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\nnamespace demo { constexpr int kFactor = 2; }\n"
    )
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_every_arch_compiles_and_caches(root: Path, store: Path) -> None:
    jobs = [(SPEC, arch) for arch in (*ALL_ARCHS, "87", "103", "121")]
    first = compile_many(jobs, source_root=root, cache_dir=store)
    assert [result.arch for result in first] == [arch for _, arch in jobs]
    for result in first:
        assert result.error is None
        assert result.cubin is not None
        assert not result.cubin.cached
        assert result.cubin.path.read_bytes()[:4] == b"\x7fELF"
        assert "scale" in result.cubin.lowered_name
        assert result.cubin.resources.shared_static == 256
        assert 0 < result.cubin.resources.registers <= 32
    again = compile_many(jobs, source_root=root, cache_dir=store)
    assert all(result.cubin is not None and result.cubin.cached for result in again)
    assert cache.info(store).entries == len(jobs)


def test_plain_function(root: Path, store: Path) -> None:
    spec = KernelSpec(name="plain", source="demo/scale.cu", function="demo::plain", threads=32)
    assert compile_kernel(spec, "sm_80", source_root=root, cache_dir=store).lowered_name == "plain"


def test_template_arguments_make_separate_kernels(root: Path, store: Path) -> None:
    other = replace(SPEC, template=(("T", "__nv_bfloat16"), ("kN", "3")))
    a = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    b = compile_kernel(other, "90a", source_root=root, cache_dir=store)
    assert a.lowered_name != b.lowered_name
    assert a.path != b.path


def test_racecheck_gets_kernels_of_its_own(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = root / "flashllm/factor.cuh"
    header.write_text(header.read_text() + '#ifdef FLASHLLM_RACECHECK\n#error "seen"\n#endif\n')
    compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    monkeypatch.setenv("FLASHLLM_RACECHECK", "1")
    with pytest.raises(CompileError, match="seen"):
        compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)


def test_edited_header_rebuilds(root: Path, store: Path) -> None:
    before = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    header = root / "flashllm/factor.cuh"
    header.write_text(header.read_text().replace("kFactor = 2", "kFactor = 5"))
    after = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    assert not after.cached
    assert after.path.read_bytes() != before.path.read_bytes()


def test_damaged_cubin_is_rebuilt(root: Path, store: Path) -> None:
    first = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    content = first.path.read_bytes()
    first.path.write_bytes(content[: len(content) // 2])
    second = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    assert not second.cached
    assert second.path.read_bytes()[:4] == b"\x7fELF"
    assert len(second.path.read_bytes()) == len(content)
    assert compile_kernel(SPEC, "90a", source_root=root, cache_dir=store).cached


def test_error_shows_the_log_with_file_and_line(root: Path, store: Path) -> None:
    text = (root / "demo/scale.cu").read_text()
    (root / "demo/scale.cu").write_text(text.replace("float(kN * kFactor)", "no_such_name"))
    with pytest.raises(CompileError) as caught:
        compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    message = str(caught.value)
    assert "scale<T=__half, kN=3> (demo/scale.cu) does not compile for sm_90a" in message
    assert 'demo/scale.cu(8): error: identifier "no_such_name" is undefined' in message
    assert cache.info(store).entries == 0


def test_assembler_errors_are_shown(root: Path, store: Path) -> None:
    # Valid CUDA C++ whose inline assembly the architecture does not have: only ptxas can tell.
    (root / "demo/scale.cu").write_text(
        '__global__ void hopper() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }\n'
    )
    spec = KernelSpec(name="hopper", source="demo/scale.cu", function="hopper", threads=128)
    assert compile_kernel(spec, "90a", source_root=root, cache_dir=store).resources.registers > 0
    with pytest.raises(CompileError, match=r"(?s)hopper.*sm_80.*wgmma"):
        compile_kernel(spec, "80", source_root=root, cache_dir=store)


def test_unknown_function_is_an_error(root: Path, store: Path) -> None:
    with pytest.raises(CompileError, match="nothing"):
        compile_kernel(replace(SPEC, function="demo::nothing"), "90a", source_root=root, cache_dir=store)


def test_local_memory_is_refused_unless_allowed(root: Path, store: Path) -> None:
    spec = KernelSpec(name="indexed", source="demo/scale.cu", function="demo::indexed", threads=32)
    for _ in range(2):  # built, then from the cache
        with pytest.raises(CompileError, match=r"indexed: uses local memory on sm_90a: .*256 bytes of stack"):
            compile_kernel(spec, "90a", source_root=root, cache_dir=store)
    cubin = compile_kernel(spec, "90a", source_root=root, cache_dir=store, allow_spills=True)
    assert cubin.resources.stack == 256


def test_spec_for_another_arch_is_refused(root: Path, store: Path) -> None:
    with pytest.raises(CompileError, match="written for sm_90a, asked for sm_80"):
        compile_kernel(replace(SPEC, archs=("90a",)), "80", source_root=root, cache_dir=store)


def test_compile_many_reports_failures_in_place(root: Path, store: Path) -> None:
    bad = replace(SPEC, function="demo::nothing")
    results = compile_many([(SPEC, "80"), (bad, "80"), (SPEC, "86")], source_root=root, cache_dir=store)
    assert [result.error is None for result in results] == [True, False, True]


def test_ctrl_c_is_for_the_parent_to_handle(root: Path) -> None:
    """A terminal sends it to parent and child; the child must not answer with a traceback."""
    with workers.BuildWorker() as worker:
        first, _ = worker.build(SPEC, "80", root)
        assert worker._process is not None
        worker._process.send_signal(signal.SIGINT)
        again, _ = worker.build(replace(SPEC, template=(("T", "__half"), ("kN", "4"))), "80", root)
    assert first
    assert again
    assert first != again


def test_a_compiler_crash_is_one_failed_kernel(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = workers._start
    starts = 0

    def crash_first() -> subprocess.Popen[bytes]:
        nonlocal starts
        starts += 1
        if starts > 1:
            return start()
        code = "import os, signal, sys; sys.stdin.buffer.read(1); os.kill(os.getpid(), signal.SIGSEGV)"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(workers, "_start", crash_first)
    jobs = [(SPEC, "80"), (SPEC, "86"), (SPEC, "89")]
    results = compile_many(jobs, workers=1, source_root=root, cache_dir=store)
    assert "died on sm_80 (SIGSEGV)" in str(results[0].error)
    assert [result.error is None for result in results] == [False, True, True]
    assert starts == 2


def test_source_edited_during_the_build_is_built_again(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = root / "flashllm/factor.cuh"
    original = header.read_text()
    seen = []

    def edit_then_build(spec: KernelSpec, arch: str, folder: Path) -> Any:
        if not seen:
            header.write_text(original.replace("kFactor = 2", "kFactor = 7"))
        seen.append(arch)
        return build(spec, arch, folder)

    monkeypatch.setattr(compile_module, "build", edit_then_build)
    edited = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    assert len(seen) == 2
    header.write_text(original)
    restored = compile_kernel(SPEC, "90a", source_root=root, cache_dir=store)
    assert not restored.cached, "code of the edited header must not be found under the original's key"
    assert restored.path.read_bytes() != edited.path.read_bytes()


def test_unwritable_cache_warns_and_still_works(root: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    with pytest.warns(RuntimeWarning, match="FLASHLLM_CACHE_DIR"):
        cubin = compile_kernel(SPEC, "90a", source_root=root, cache_dir=blocked)
    assert cubin.path.read_bytes()[:4] == b"\x7fELF"


COMPILER = """
import sys
from pathlib import Path
from flashllm.jit import KernelSpec
from flashllm.jit.compile import compile_kernel
spec = KernelSpec(name="scale", source="demo/scale.cu", function="demo::scale",
                  template=(("T", "__half"), ("kN", "3")), threads=128)
cubin = compile_kernel(spec, "90a", source_root=Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
assert cubin.path.read_bytes()[:4] == b"\\x7fELF"
print(cubin.path)
"""


def test_processes_that_compile_the_same_kernel_agree(root: Path, store: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILER, str(root), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    paths = set()
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        paths.add(output.strip())
    assert len(paths) == 1
    assert cache.info(store).entries == 1
