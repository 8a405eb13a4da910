# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from flashllm.errors import ArgumentError, CompileError, UnsupportedDeviceError
from flashllm.jit import ALL_ARCHS, KernelSpec, arch_for_device, normalize_arch, shared_limit
from flashllm.jit.resources import Resources, parse_ptxas

SPEC = KernelSpec(
    name="tiled_csl",
    source="spmm/tiled_csl.cu",
    function="flashllm::spmm_tiled_csl",
    template=(("T", "__half"), ("kN", "16")),
    threads=128,
)


def test_expression_and_label() -> None:
    assert SPEC.expression == "flashllm::spmm_tiled_csl<__half, 16>"
    assert SPEC.label == "tiled_csl<T=__half, kN=16>"
    plain = KernelSpec(name="read", source="bench/read.cu", function="read_all", threads=32)
    assert plain.expression == "read_all"
    assert plain.label == "read"


def test_spec_is_a_value() -> None:
    first = hash(SPEC)
    assert hash(SPEC) == first
    copy = pickle.loads(pickle.dumps(SPEC))
    assert "_hash" not in vars(copy), "text hashes differ from process to process"
    assert copy == SPEC
    assert hash(copy) == first
    assert replace(SPEC, threads=64) != SPEC
    assert len({SPEC, copy, replace(SPEC, threads=64), replace(SPEC, deterministic=False)}) == 3


@pytest.mark.parametrize("threads", [0, -32, 1025])
def test_spec_refuses_bad_thread_counts(threads: int) -> None:
    with pytest.raises(ArgumentError, match=r"threads: expected 1\.\.1024"):
        KernelSpec(name="k", source="k.cu", function="k", threads=threads)


def test_spec_refuses_negative_shared_memory() -> None:
    with pytest.raises(ArgumentError, match="shared_bytes"):
        KernelSpec(name="k", source="k.cu", function="k", threads=32, shared_bytes=-1)


@pytest.mark.parametrize(
    ("text", "arch"), [("90a", "90a"), ("sm_90a", "90a"), ("SM_80", "80"), ("compute_120a", "120a")]
)
def test_normalize_arch(text: str, arch: str) -> None:
    assert normalize_arch(text) == arch


@pytest.mark.parametrize("text", ["", "hopper", "9.0", "sm90a!", "8", "75", "sm_70"])
def test_normalize_arch_refuses(text: str) -> None:
    with pytest.raises(ArgumentError, match="arch: expected"):
        normalize_arch(text)


@pytest.mark.parametrize(
    ("cc", "arch"),
    [
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "87"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((10, 0), "100a"),
        ((10, 3), "103"),
        ((12, 0), "120a"),
        ((12, 1), "121"),
    ],
)
def test_arch_for_device(cc: tuple[int, int], arch: str) -> None:
    assert arch_for_device(cc) == arch
    assert SPEC.supports(arch)


@pytest.mark.parametrize("cc", [(7, 5), (6, 1)])
def test_old_gpus_are_refused(cc: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedDeviceError, match=f"{cc[0]}.{cc[1]}"):
        arch_for_device(cc)


def test_supports_follows_archs() -> None:
    hopper = KernelSpec(name="k", source="k.cu", function="k", threads=128, archs=("90a",))
    assert hopper.supports("sm_90a")
    assert not hopper.supports("80")
    assert not hopper.supports("87"), "an unlisted GPU runs the sm_80 path, which this kernel lacks"


def test_shared_limits_cover_every_arch() -> None:
    limits = {arch: shared_limit(arch) for arch in ALL_ARCHS}
    kib = 1024
    assert limits == {
        "80": 163 * kib,
        "86": 99 * kib,
        "89": 99 * kib,
        "90a": 227 * kib,
        "100a": 227 * kib,
        "120a": 99 * kib,
    }
    assert shared_limit("999") is None


LOG = """\
ptxas info    : 0 bytes gmem, 64 bytes cmem[3]
ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_90a'
ptxas info    : Function properties for _Z5otherPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for helper
    96 bytes stack frame, 96 bytes spill stores, 96 bytes spill loads
ptxas info    : Function properties for _Z1kPf
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 12.296 ms
"""


def test_parse_ptxas_reads_the_right_kernel() -> None:
    resources = parse_ptxas(LOG, "_Z1kPf")
    assert resources == Resources(registers=40, shared_static=128)
    assert not resources.uses_local_memory


def test_parse_ptxas_sees_spills() -> None:
    resources = parse_ptxas(LOG, "_Z5otherPf")
    assert (resources.stack, resources.spill_store, resources.spill_load) == (8, 4, 12)
    assert (resources.registers, resources.shared_static) == (255, 1024)
    assert resources.uses_local_memory


@pytest.mark.parametrize("log", ["", "ptxas info : nothing to see", LOG])
def test_parse_ptxas_refuses_a_log_without_the_kernel(log: str) -> None:
    with pytest.raises(CompileError, match="_Zmissing"):
        parse_ptxas(log, "_Zmissing")
