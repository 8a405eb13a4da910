# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashllm import Bitmap
from flashllm.bench import cases
from flashllm.bench.models import MODELS, PAPER_MODELS, find_model
from flashllm.bench.plan_cases import plan_work
from flashllm.errors import ArgumentError
from flashllm.gpus import find_gpu
from flashllm.matmul.auto import rank_formats, rank_formats_of
from flashllm.registry import FORMATS


def test_paper_models_are_the_twelve_shapes_of_the_figure() -> None:
    shapes = {(layer.m, layer.k) for name in PAPER_MODELS for layer in find_model(name).layers}
    assert shapes == {
        *((21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)),
        *((27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)),
        *((36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152)),
    }


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("opt-175b", 3624), ("llama-2-70b", 1711), ("llama-3.1-405b", 6375), ("qwen2.5-72b", 1755), ("qwen3-32b", 975)],
)
def test_dense_block_sizes(name: str, megabytes: int) -> None:
    assert MODELS[name].block_bytes / 1e6 == pytest.approx(megabytes, abs=1)


def test_model_names_ignore_case_and_unknown_ones_list_the_known() -> None:
    assert find_model(" OPT-30B ").name == "opt-30b"
    with pytest.raises(ArgumentError, match=r"opt-13b, opt-30b.*got 'gpt'"):
        find_model("gpt")


def test_parse_lists() -> None:
    assert cases.parse_sparsities("0.9, 0.7,0.9") == (0.7, 0.9)
    assert cases.parse_sparsities("0") == (0.0,)
    assert cases.parse_batches("64,8") == (8, 64)
    assert cases.parse_shapes(["28672x8192,16X8", "1x1"]) == ((28672, 8192), (16, 8), (1, 1))


@pytest.mark.parametrize("text", ["1.0", "-0.1", "nan", "dense", "", ",", "inf"])
def test_bad_sparsities(text: str) -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        cases.parse_sparsities(text)


def test_percent_gets_a_hint() -> None:
    with pytest.raises(ArgumentError, match=r"write 0\.8"):
        cases.parse_sparsities("80")


@pytest.mark.parametrize("text", ["0", "-1", "8.5", "", "x", "65537"])
def test_bad_batches(text: str) -> None:
    with pytest.raises(ArgumentError, match="n: expected"):
        cases.parse_batches(text)


@pytest.mark.parametrize("text", ["0x8", "8", "8x", "axb", "8x8x8", "2147483648x1", "-1x2", "", ", "])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ArgumentError, match="shape"):
        cases.parse_shapes([text])


@pytest.mark.parametrize(("name", "given"), [("shape", {"shapes": ("",)}), ("model", {"models": (",",)})])
def test_an_empty_option_is_not_the_paper_sweep(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected at least one {name} such as"):
        plan_work(backend="cuda", **given)


def test_default_work_on_a_gpu_is_the_paper_sweep() -> None:
    work = plan_work(backend="cuda", gpu=find_gpu("H100 80GB"))
    assert len(work.groups) == 12
    assert work.cases == 12 * 3 * 3


def test_without_a_gpu_to_choose_for_every_format_is_a_case() -> None:
    every = plan_work(backend="cuda")
    assert every.cases == 12 * 3 * 3 * len(FORMATS)
    assert every.groups[0].formats == tuple(FORMATS)
    named = plan_work(backend="cuda", formats="bitmap", gpu=find_gpu("H100 80GB"))
    assert named.cases == 12 * 3 * 3
    assert (named.groups[0].formats, named.groups[0].choice("tuned")) == (("bitmap",), "tuned")


def test_auto_takes_one_format_for_each_sparsity_and_n() -> None:
    gpu = find_gpu("H100 80GB")
    (group,) = plan_work(
        backend="cuda", shapes=["7168x7168"], sparsity="0.5,0.9", n="8,64", formats="auto", gpu=gpu
    ).groups
    assert group.chosen is not None
    assert group.cases == group.chosen
    for sparsity, n, name in group.cases:
        assert sparsity is not None
        assert name == rank_formats((7168, 7168), 1 - sparsity, n, gpu=gpu).best.format
    assert set(group.formats) == {name for _, _, name in group.cases} == {"bitmap", "slot24", "tiled-csl"}
    assert group.formats_for(0.5) == ("bitmap",)
    assert group.formats_for(0.9) == ("tiled-csl", "slot24")
    assert (group.choice("auto"), group.choice("tuned")) == ("auto-format", "tuned-format")


def test_auto_looks_at_the_pattern_of_zeros() -> None:
    """Dense rows at the top force slot24 to its smallest windows, and then it is not the best."""

    def taken(pattern: str) -> str:
        options = {"shapes": ["16384x4096"], "sparsity": "0.8", "n": "16", "pattern": pattern}
        (group,) = plan_work(backend="cuda", gpu=find_gpu("H100 80GB"), **options).groups  # type: ignore[arg-type]
        return group.formats[0]

    assert taken("uniform") == "slot24"
    assert taken("skewed") == "bitmap"


def test_auto_looks_into_a_file_and_leaves_a_packed_one_as_it_is(tmp_path: Path) -> None:
    gpu = find_gpu("H100 80GB")
    dense = (np.random.default_rng(0).random((512, 512)) < 0.2).astype(np.float16)
    np.save(tmp_path / "w.npy", dense)
    (group,) = plan_work(backend="cuda", weights=tmp_path / "w.npy", n="8,16", gpu=gpu).groups
    best = {n: rank_formats_of(dense, n, gpu=gpu).best.format for n in (8, 16)}
    assert group.cases == tuple((None, n, name) for n, name in best.items())
    Bitmap.from_dense(dense).save(tmp_path / "w.safetensors")
    packed = tmp_path / "w.safetensors"
    (kept,) = plan_work(backend="cuda", weights=packed, n="8", gpu=gpu).groups
    assert (kept.formats, kept.chosen) == (("bitmap",), None)
    (chosen,) = plan_work(backend="cuda", weights=packed, n="8", formats="auto", gpu=gpu).groups
    assert chosen.chosen == ((None, 8, best[8]),)


def test_default_work_without_a_gpu_is_small() -> None:
    work = plan_work(backend="reference")
    assert [(g.m, g.k) for g in work.groups] == list(cases.SMALL_SHAPES)


def test_models_are_scaled_down_without_a_gpu_and_say_so() -> None:
    work = plan_work(backend="reference", models=["opt-175b,smollm2-135m"])
    assert all(g.m * g.k <= cases.SMALL_ELEMENTS for g in work.groups)
    assert {g.model for g in work.groups} == {"opt-175b/64", "smollm2-135m/2"}
    assert work.notes


def test_explicit_shapes_are_never_scaled() -> None:
    work = plan_work(backend="reference", shapes=["4096x4096"])
    assert (work.groups[0].m, work.groups[0].k, work.notes) == (4096, 4096, ())


def test_tensor_needs_weights_and_patterns_are_known() -> None:
    with pytest.raises(ArgumentError, match="without --weights"):
        plan_work(backend="cuda", tensor="w")
    with pytest.raises(ArgumentError, match="uniform, row-equal, per-row"):
        plan_work(backend="cuda", pattern="random")
