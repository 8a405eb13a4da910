# SPDX-License-Identifier: Apache-2.0
"""The script that times variants of a kernel: how a variant is written, planned and reported."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from flashllm import TiledCSL
from flashllm.cli._cases import BadUsage
from scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("kernel_variants")


@pytest.fixture(scope="module")
def weight() -> TiledCSL:
    return TiledCSL.from_dense((np.random.default_rng(0).random((1280, 1664)) < 0.2).astype(np.float16))


def test_variants_change_the_default_plan(script: ModuleType, weight: TiledCSL) -> None:
    def plan(text: str) -> tuple[dict[str, str], int, int, str]:
        spec, split = script.parse_variant(text).plan(weight, 16, arch="90a", sm_count=4)
        return dict(spec.template), split.blocks, split.row_cost, spec.source

    base, blocks, row_cost, source = plan("base")
    assert (blocks, row_cost, source) == (12, 3, "spmm/tiled_csl.cu")
    assert plan("p0:kPrefetch=0") == ({**base, "kPrefetch": "0"}, 12, 3, source)
    assert plan("even:blocks=9,row_cost=2") == (base, 9, 2, source)
    assert plan("idea:source=spmm/idea.cu")[3] == "spmm/idea.cu"
    assert plan("w:slices=0,overlap=1")[0] == {**base, "kSlices": "0"}
    assert plan("v:vectors=2,undo=0")[0]["kUndo"] == "false"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":blocks=3", "expected NAME"),
        ("a:blocks", "expected KEY=VALUE, got 'blocks'"),
        ("a:blocks=many", "blocks: expected a number"),
        ("a:kSlices=1", "kSlices follows from the case and the choice"),
        ("a:kN=8", "kN follows from the case and the choice"),
        ("a:color=3", "expected vectors, slices, .* or a template parameter, got 'color'"),
    ],
)
def test_what_makes_no_variant_is_named(script: ModuleType, text: str, message: str) -> None:
    with pytest.raises(BadUsage, match=message):
        script.parse_variant(text)


def test_unknown_template_parameters_are_named(script: ModuleType, weight: TiledCSL) -> None:
    with pytest.raises(BadUsage, match="no template parameter 'kColor'"):
        script.parse_variant("a:kColor=3").plan(weight, 8, arch="90a", sm_count=132)


def test_variants_that_spill_are_left_out(
    script: ModuleType, weight: TiledCSL, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [script.parse_variant(text) for text in ("base", "tight:kMinBlocks=6")]
    plans = script.build(variants, weight, [8], arch="90a", sm_count=132)
    assert list(plans[8]) == ["base"]
    assert "tight, N=8: left out" in capsys.readouterr().err


def test_lines_compare_with_the_first(script: ModuleType) -> None:
    case = {"M": 128, "K": 64, "N": 8, "sparsity": 0.8}
    rows = [
        {**case, "variant": "base", "median_us": 10.0, "right": True},
        {**case, "variant": "half", "median_us": 9.5, "right": False},
    ]
    assert script.line(rows) == "128x64 N=8 0.8: base 10.00  half! 9.50 (-5.0 %)"


def test_without_a_gpu_it_says_so(script: ModuleType) -> None:
    from flashllm.device import gpu_problem

    if gpu_problem() is None:
        pytest.skip("there is a gpu")
    done = CliRunner().invoke(script.main, ["--shape", "128x64"])
    assert done.exit_code == 2
    assert "GPU" in done.output or "CuPy" in done.output
    twice = CliRunner().invoke(script.main, ["--shape", "128x64", "--variant", "a", "--variant", "a"])
    assert twice.exit_code == 2
    assert "a name of its own" in twice.output
