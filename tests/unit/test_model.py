# SPDX-License-Identifier: Apache-2.0
"""The time model: its formula, its fit to the committed rows, and the choices it leads to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import fmean

import pytest
from test_matmul import A100, H100

from flashllm import ArgumentError, registry
from flashllm.gpus import GPUS, find_gpu, gpu_of
from flashllm.matmul import model
from flashllm.matmul.model import KernelTime, Load, smooth_max
from scripts import load_script

fit_model = load_script("fit_model")
GPU = find_gpu("H100 80GB")
SHAPE = {"m": 28672, "k": 8192, "density": 0.2}


@pytest.fixture(scope="module")
def rows() -> list[fit_model.Row]:
    """The newest rows of every case, of whatever format."""
    return list(fit_model.read_rows(fit_model.default_files()))


def test_times_are_close_to_every_committed_row(rows: list[fit_model.Row]) -> None:
    """From 32 columns on, the clock drops under load, which the model does not know."""
    for quality in fit_model.errors(rows, model.committed()):
        assert quality.mean < 0.06, quality
        assert quality.largest < 0.14, quality


def test_the_choice_loses_next_to_nothing(rows: list[fit_model.Row]) -> None:
    for made in (fit_model.choices(rows, model.committed()), fit_model.joint_choices(rows, model.committed())):
        assert len(made) >= 36
        assert fmean(choice.regret for choice in made) < 0.02
        assert max(choice.regret for choice in made) < 0.10


def test_regret_counts_what_a_bad_choice_loses(rows: list[fit_model.Row]) -> None:
    """A Tiled-CSL kernel that costs nothing to start is chosen everywhere, and that must show."""
    committed = model.committed()
    free = {n: replace(c, start_us=-1000.0) for n, c in committed.kernels["tiled-csl"].items()}
    rows = [row for row in rows if row.system == "cublas" or row.sparsity > 0.75]  # for which Tiled-CSL was measured
    made = fit_model.choices(rows, replace(committed, kernels={**committed.kernels, "tiled-csl": free}))
    assert {choice.taken for choice in made} == {"tiled-csl"}
    assert fmean(choice.regret for choice in made) > 0.05


def test_fitting_again_gives_the_model_of_the_package() -> None:
    committed = model.committed()
    again = fit_model.fit([fit_model.RESULTS / name for name in committed.files])
    assert (again.files, again.commits, again.gpu) == (committed.files, committed.commits, committed.gpu)
    for row in fit_model.read_rows(fit_model.RESULTS / name for name in committed.files):
        assert fit_model.predicted(row, again) == pytest.approx(fit_model.predicted(row, committed), rel=0.01)


def test_the_page_shows_what_the_script_says() -> None:
    committed = model.committed()
    rows = fit_model.read_rows(fit_model.RESULTS / name for name in committed.files)
    text = fit_model.DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(fit_model.BEGIN)[2].partition(fit_model.END)[0]
    assert shown == fit_model.report(committed, rows)


def test_every_format_and_every_width_has_constants() -> None:
    for name in registry.FORMATS:
        assert sorted(model.committed().kernels[name]) == list(fit_model.widths_of(name))
        assert model.is_modelled(name)
    assert not model.is_modelled("coordinates")


def test_a_model_survives_json() -> None:
    committed = model.committed()
    assert model.from_json(json.loads(json.dumps(model.to_json(committed)))) == committed


def test_smooth_maximum() -> None:
    assert smooth_max(3.0, 4.0, 2.0) == pytest.approx(5.0)
    assert smooth_max(4.0, 3.0, 2.0) == pytest.approx(5.0)
    assert smooth_max(1e-9, 7.0, 16.0) == pytest.approx(7.0)
    assert smooth_max(0.0, 0.0, 2.0) == 0.0
    assert smooth_max(0.0, 5.0, 2.0) == 5.0


def test_the_formula_of_a_kernel() -> None:
    constants = KernelTime(start_us=5.0, tile_cycles=100.0, value_cycles=0.5, sharpness=2.0)
    load = Load(weight_bytes=3_060_000, other_bytes=0, tiles=1320, nnz=264_000)
    gpu = replace(GPU, read_gbps=3060.0, sm_count=132, clock_mhz=1000.0)
    decode = (1320 * 100 + 264_000 * 0.5) / 132 / 1000
    once, thrice = (constants.predict(load, n_block=8, column_blocks=c, gpu=gpu) for c in (1, 3))
    assert once.us == pytest.approx(5 + math.hypot(1.0, decode))
    assert thrice.us == pytest.approx(5 + 3 * math.hypot(1.0, decode))
    assert (once.bound, replace(once, decode_us=0.9).bound) == ("decoding", "reading")


def test_small_n_takes_eight_columns_and_wide_x_several_blocks() -> None:
    def us(n: int, name: str = "bitmap") -> float:
        return model.predict(name, n=n, weight_bytes=120_000_000, gpu=GPU, **SHAPE).us

    assert us(1) == pytest.approx(us(8), rel=0.01)
    assert us(9) > us(8)
    for name in ("bitmap", "slot24"):
        start = model.committed().kernels[name][64].start_us
        assert us(65, name) == pytest.approx(us(128, name), rel=0.03)
        assert us(128, name) - start == pytest.approx(2 * (us(64, name) - start), rel=0.01)


def test_more_bytes_more_stored_elements_and_less_gpu_take_longer() -> None:
    for name in registry.FORMATS:
        base = model.predict(name, n=16, weight_bytes=200_000_000, gpu=GPU, **SHAPE).us
        more = model.predict(name, n=16, weight_bytes=400_000_000, gpu=GPU, **SHAPE).us
        assert more > 1.5 * base
        slow = replace(GPU, read_gbps=GPU.read_gbps / 4, clock_mhz=GPU.clock_mhz / 4)
        assert 3 < model.predict(name, n=16, weight_bytes=200_000_000, gpu=slow, **SHAPE).us / base < 4


def test_slots_of_small_windows_cost_decoding_too() -> None:
    """At the same density, a matrix in windows of 128 has twice as many tiles as one in windows of 256."""
    nnz = 0.05 * 4096 * 4096
    tile_bytes = model.committed().tile_bytes["slot24"]
    few, many = (int(2 * nnz + tiles * tile_bytes) for tiles in (1024, 2048))
    loads = [
        model.load_of(4096, 4096, 8, weight_bytes=size, density=0.05, tile_bytes=tile_bytes) for size in (few, many)
    ]
    assert [round(load.tiles) for load in loads] == [1024, 2048]
    assert model.load_of(130, 65, 8, weight_bytes=few, density=0.05).tiles == 4


def test_the_constant_of_slot_tiles_is_the_formats() -> None:
    from flashllm.formats import slot24

    assert model.committed().tile_bytes == {"slot24": slot24._TILE_BYTES}


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ArgumentError, match="format: expected one of tiled-csl, bitmap, slot24, got 'csr'"):
        model.predict("csr", n=8, weight_bytes=1, gpu=GPU, **SHAPE)


def test_dense_reads_everything_or_multiplies_at_the_peak() -> None:
    share = model.committed().dense.read_share
    read = 2 * (28672 * 8192 + 8 * (28672 + 8192)) / 3060e3 / share
    assert model.dense_us(28672, 8192, 8, gpu=GPU) == pytest.approx(model.committed().dense.start_us + read)
    assert GPU.tensor_flops == pytest.approx(1070.5, abs=0.1)
    wide = model.dense_us(28672, 8192, 4096, gpu=GPU)
    assert wide == pytest.approx(2 * 28672 * 8192 * 4096 / GPU.tensor_flops * 1e-6, rel=0.01)


def test_a_device_is_found_among_the_known_gpus() -> None:
    assert gpu_of(H100).read_gbps == GPUS["h100 80gb"].read_gbps
    assert gpu_of(A100).source == GPUS["a100 80gb"].source
    assert (gpu_of(A100).sm_count, gpu_of(A100).arch) == (108, "80")
    assert gpu_of(replace(H100, name="NVIDIA GeForce RTX 4090")).read_gbps == 1008.0


def test_an_unknown_device_says_what_was_assumed() -> None:
    gpu = gpu_of(replace(H100, name="NVIDIA B999", sm_count=66, clock_mhz=0.0))
    assert gpu.read_gbps == 1530.0
    assert gpu.source.startswith("unknown; assumed")
    assert gpu.clock_mhz == 1980.0


def test_an_unknown_gpu_name_lists_the_known() -> None:
    with pytest.raises(ArgumentError, match=r"^gpu: expected one of H100 80GB, .*got 'TPU'"):
        find_gpu("TPU")
    assert find_gpu("  h100   80gb ") is GPUS["h100 80gb"]
