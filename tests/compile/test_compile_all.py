# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the package compiles for every architecture, without spills and within shared memory.

By default every kernel for sm_90a, and every third, or one that is not for it, for one of its other architectures in
turn, with one value type each, so that all have their share; with ``FLASHLLM_COMPILE=all`` for all of them, as
``flashllm compile --all`` does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flashllm import registry
from flashllm.errors import MissingDependencyError
from flashllm.jit import ALL_ARCHS, KernelSpec, shared_limit
from flashllm.jit.compile import CompileResult, compile_many
from flashllm.jit.sources import cuda_root

SPECS = registry.all_specs()
EMULATED = Path(__file__).parent.parent / "emulator"


def archs_of(spec: KernelSpec) -> tuple[str, ...]:
    """Architectures to compile ``spec`` for."""
    if os.environ.get("FLASHLLM_COMPILE") == "all":
        return spec.archs
    others = [arch for arch in spec.archs if arch != "90a"]
    twins = [other for other in SPECS if kernel_of(other) == kernel_of(spec)]
    turn = KERNELS.index(kernel_of(spec))
    wanted = others and (turn % 3 == 0 or "90a" not in spec.archs)
    chosen = [others[turn // 3 % len(others)]] if wanted and spec == twins[turn % len(twins)] else []
    return tuple(chosen + ["90a"] * ("90a" in spec.archs and spec == twins[0]))


def kernel_of(spec: KernelSpec) -> tuple[object, ...]:
    """All of ``spec`` but its value type."""
    template = tuple(entry for entry in spec.template if entry[0] != "T")
    return spec.name, spec.function, template, spec.threads, spec.shared_bytes, spec.archs


KERNELS = list(dict.fromkeys(map(kernel_of, SPECS)))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[KernelSpec, str], CompileResult]:
    jobs = [(spec, arch) for spec in SPECS for arch in archs_of(spec)]
    try:
        results = compile_many(jobs, allow_spills=True, cache_dir=tmp_path_factory.mktemp("kernels"))
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return {(result.spec, result.arch): result for result in results}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if archs_of(spec)], ids=lambda spec: spec.label)
def test_compiles_within_limits(spec: KernelSpec, compiled: dict[tuple[KernelSpec, str], CompileResult]) -> None:
    for arch in archs_of(spec):
        result = compiled[spec, arch]
        assert result.cubin is not None, str(result.error)
        resources = result.cubin.resources
        assert not resources.uses_local_memory, f"sm_{arch}: {resources.describe_local()}"
        limit = shared_limit(arch)
        assert limit is not None
        assert resources.shared_static + spec.shared_bytes <= limit, f"sm_{arch}: shared memory"
        # 65,536 registers per SM, given out to a warp in units of 256: what a launch of one block needs.
        per_warp = -(-resources.registers * 32 // 256) * 256
        assert per_warp * -(-spec.threads // 32) <= 65536, f"sm_{arch}: registers"


def test_every_arch_has_kernels() -> None:
    for arch in ALL_ARCHS:
        assert any(arch in archs_of(spec) for spec in SPECS)


def test_every_kernel_is_compiled_for_sm_90a_or_another_and_a_third_for_both() -> None:
    compiled = {(kernel_of(spec), arch) for spec in SPECS for arch in archs_of(spec)}
    both = 0
    for spec in SPECS:
        found = {arch for kernel, arch in compiled if kernel == kernel_of(spec)}
        assert found
        assert ("90a" in found) == ("90a" in spec.archs)
        both += len(found) == 2
    assert both >= sum({"90a"} < set(spec.archs) for spec in SPECS) / 4


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


@pytest.mark.parametrize(
    ("source", "function", "template", "archs"),
    [
        ("broken.cu", "ring", ("0",), ("90a", "100a", "120a")),
        ("broken.cu", "share", ("0",), ("90a", "100a", "120a")),
        ("broken.cu", "relay", ("0",), ALL_ARCHS),
        ("broken.cu", "multiply_registers", ("0",), ("90a",)),
        *(
            ("fragments.cu", "multiply_sparse", (dtype, selector, "0"), ALL_ARCHS)
            for dtype in ("__half", "__nv_bfloat16")
            for selector in ("0", "1")
        ),
        ("fragments.cu", "transpose", ("0",), ALL_ARCHS),
        ("fragments.cu", "words", ("0",), ALL_ARCHS),
        ("fragments.cu", "publish", ("0",), ("90a",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_kernels_that_try_the_emulator_compile(
    source: str, function: str, template: tuple[str, ...], archs: tuple[str, ...], tmp_path: Path
) -> None:
    """What the emulator does for their instructions is what a compiler takes for them."""
    shutil.copytree(cuda_root(), tmp_path / "cuda")
    shutil.copy(EMULATED / source, tmp_path / "cuda")
    spec = KernelSpec(
        name=function,
        source=source,
        function=f"{Path(source).stem}::{function}",
        template=tuple((f"argument{i}", value) for i, value in enumerate(template)),
        threads=128,
        archs=archs,
    )
    jobs = [(spec, arch) for arch in spec.archs]
    for result in compile_many(jobs, source_root=tmp_path / "cuda", cache_dir=tmp_path / "kernels"):
        assert result.cubin is not None, str(result.error)
