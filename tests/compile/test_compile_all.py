# SPDX-License-Identifier: Apache-2.0
"""Kernels of the package compile for every architecture, without spills and within shared memory.

By default a sample: about every third instance of every function for sm_90a, covering all its template arguments except
the value type, and every third for its other architectures, which take turns as value types do. With
``FLASHLLM_COMPILE=all``, all of them, as ``flashllm compile --all`` does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flashllm import registry
from flashllm.errors import MissingDependencyError
from flashllm.jit import ALL_ARCHS, KernelSpec, shared_limit
from flashllm.jit.compile import CompileResult, compile_many
from flashllm.jit.sources import cuda_root

SPECS = registry.all_specs()
EMULATED = Path(__file__).parent.parent / "emulator"
TUNED = "90a"
Kernel = tuple[KernelSpec, ...]
"""Specs that differ only in their value type."""


def functions() -> list[list[Kernel]]:
    """The kernels of every function of every source."""
    found: dict[tuple[str, str], dict[KernelSpec, list[KernelSpec]]] = {}
    for spec in SPECS:
        untyped = replace(spec, template=tuple(entry for entry in spec.template if entry[0] != "T"))
        found.setdefault((spec.source, spec.function), {}).setdefault(untyped, []).append(spec)
    return [[tuple(specs) for specs in kernels.values()] for kernels in found.values()]


def arguments(kernels: Iterable[Kernel]) -> set[tuple[str, str]]:
    """Names and values of their template arguments, except for value types."""
    return {entry for kernel in kernels for entry in kernel[0].template if entry[0] != "T"}


def third_of(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Every third one, and those with a template argument that no earlier one has."""
    chosen = list(kernels[::3])
    for kernel in kernels:
        if not arguments([kernel]) <= arguments(chosen):
            chosen.append(kernel)
    return chosen


def others(kernel: Kernel) -> list[str]:
    """Its architectures except the tuned one."""
    return [arch for arch in kernel[0].archs if arch != TUNED]


def sampled() -> list[tuple[KernelSpec, str]]:
    """What is compiled by default."""
    jobs: list[tuple[KernelSpec, str]] = []
    for kernels in functions():
        for turn, kernel in enumerate(third_of([k for k in kernels if TUNED in k[0].archs])):
            jobs.append((kernel[turn % len(kernel)], TUNED))
        for turn, kernel in enumerate([k for k in kernels if others(k)][::3]):
            archs = others(kernel)
            jobs.append((kernel[-1 - turn % len(kernel)], archs[len(jobs) % len(archs)]))
    return jobs


ALL = os.environ.get("FLASHLLM_COMPILE") == "all"
JOBS = [(spec, arch) for spec in SPECS for arch in spec.archs] if ALL else sampled()
TRIED_ARCHS = ALL_ARCHS if ALL else ("80", TUNED, "120a")


def archs_of(spec: KernelSpec) -> list[str]:
    """Architectures that ``spec`` is compiled for."""
    return [arch for one, arch in JOBS if one == spec]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[KernelSpec, str], CompileResult]:
    try:
        results = compile_many(JOBS, allow_spills=True, cache_dir=tmp_path_factory.mktemp("kernels"))
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return {(result.spec, result.arch): result for result in results}


@pytest.mark.parametrize("spec", list(dict.fromkeys(spec for spec, _ in JOBS)), ids=lambda spec: spec.label)
def test_compiles_within_limits(spec: KernelSpec, compiled: dict[tuple[KernelSpec, str], CompileResult]) -> None:
    for arch in archs_of(spec):
        result = compiled[spec, arch]
        assert result.cubin is not None, str(result.error)
        resources = result.cubin.resources
        assert not resources.uses_local_memory, f"sm_{arch}: {resources.describe_local()}"
        limit = shared_limit(arch)
        assert limit is not None
        assert resources.shared_static + spec.shared_bytes <= limit, f"sm_{arch}: shared memory"
        # 65,536 registers per SM, allocated to a warp in units of 256: what a launch of one block needs.
        per_warp = -(-resources.registers * 32 // 256) * 256
        assert per_warp * -(-spec.threads // 32) <= 65536, f"sm_{arch}: registers"


def test_every_arch_has_kernels() -> None:
    assert {arch for _, arch in JOBS} == set(ALL_ARCHS)


def test_every_function_is_compiled_for_sm_90a_and_for_another() -> None:
    """At least a third of its kernels for each of the two, and for sm_90a with all of its template arguments."""
    assert len(set(JOBS)) == len(JOBS)
    assert all(arch in spec.archs for spec, arch in JOBS)
    for kernels in functions():
        for tuned in (True, False):
            wanted = [kernel for kernel in kernels if (TUNED in kernel[0].archs if tuned else others(kernel))]
            jobs = [(spec, arch) for spec, arch in JOBS if (arch == TUNED) == tuned]
            found = [kernel for kernel in wanted if any(spec in kernel for spec, _ in jobs)]
            assert len(found) >= len(wanted) / 3
            assert arguments(found) == arguments(wanted) or not tuned


def test_specs_are_distinct() -> None:
    assert all(spec.archs for spec in SPECS), "a kernel for no architecture"
    assert len(set(SPECS)) == len(SPECS)
    assert len({(spec.source, spec.expression, spec.threads, spec.shared_bytes) for spec in SPECS}) == len(SPECS)


def test_every_kernel_source_has_a_spec() -> None:
    used = {spec.source for spec in SPECS}
    root = cuda_root()
    present = {file.relative_to(root).as_posix() for file in root.rglob("*.cu")}
    assert used == present, "a kernel source without a spec is never compiled in tests"
    assert all((root / source).is_file() and not Path(source).is_absolute() for source in used)


def tried(source: str, function: str, archs: tuple[str, ...], *template: str) -> KernelSpec:
    """A kernel of tests/emulator."""
    return KernelSpec(
        name=function,
        source=source,
        function=f"{Path(source).stem}::{function}",
        template=tuple((f"argument{i}", value) for i, value in enumerate(template)),
        threads=128,
        archs=archs,
    )


TRIED = (
    tried("broken.cu", "ring", ("90a", "100a", "120a"), "0"),
    tried("broken.cu", "share", ("90a", "100a", "120a"), "0"),
    tried("broken.cu", "relay", TRIED_ARCHS, "0"),
    tried("broken.cu", "multiply_registers", ("90a",), "0"),
    *(
        tried("fragments.cu", "multiply_sparse", TRIED_ARCHS, dtype, selector, "0")
        for dtype in ("__half", "__nv_bfloat16")
        for selector in ("0", "1")
    ),
    tried("fragments.cu", "transpose", TRIED_ARCHS, "0"),
    tried("fragments.cu", "words", TRIED_ARCHS, "0"),
    tried("fragments.cu", "publish", ("90a",), "0"),
)


@pytest.fixture(scope="module")
def results_of_tried(tmp_path_factory: pytest.TempPathFactory) -> list[CompileResult]:
    """All compiled together: workers take as long to start as a kernel takes to compile."""
    folder = tmp_path_factory.mktemp("tried")
    shutil.copytree(cuda_root(), folder / "cuda")
    for source in {spec.source for spec in TRIED}:
        shutil.copy(EMULATED / source, folder / "cuda")
    jobs = [(spec, arch) for spec in TRIED for arch in spec.archs]
    return compile_many(jobs, source_root=folder / "cuda", cache_dir=folder / "kernels")


@pytest.mark.parametrize("spec", TRIED, ids=lambda spec: spec.label)
def test_kernels_that_try_the_emulator_compile(spec: KernelSpec, results_of_tried: list[CompileResult]) -> None:
    """The compiler accepts the instructions in them that the emulator emulates."""
    results = [result for result in results_of_tried if result.spec == spec]
    assert [result.arch for result in results] == list(spec.archs)
    for result in results:
        assert result.cubin is not None, str(result.error)
