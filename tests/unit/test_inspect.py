# SPDX-License-Identifier: Apache-2.0
"""`flashllm inspect`: packed files, dense files and shapes, for GPUs that are not present."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from test_matmul import A100, H100

import coordinates
from coordinates import Coordinates
from flashllm import TiledCSL, inspection, pack, plan, registry
from flashllm.cli import inspect
from flashllm.gpus import facts_of, find_gpu, gpu_of
from flashllm.io.container import ContainerWriter, save_weights
from flashllm.matmul import tune_cache
from flashllm.matmul.auto import rank_formats, rank_formats_of

GPU = find_gpu("H100 80GB")
DENSE = (np.random.default_rng(0).random((640, 512)) < 0.2).astype(np.float16)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    save_weights(path, {f"layer.{name}": pack(DENSE, format=name) for name in registry.FORMATS})
    return path


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(inspect.command, [str(argument) for argument in arguments])


def _json(*arguments: Any) -> list[dict[str, Any]]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_weight_of_a_packed_file(packed: Path) -> None:
    found = _json(packed, "--n", "8,64")
    assert [one["format"] for one in found] == list(registry.FORMATS)
    for one in found:
        w = registry.weight_class(one["format"]).load(packed, name=one["name"])
        assert (one["nnz"], one["bytes"], one["M"], one["K"], one["dtype"]) == (w.nnz, w.nbytes, 640, 512, "fp16")
        assert not one["packed_here"]
        own = next(c for c in one["ranking"] if c["format"] == one["format"])
        assert own["bytes"] == w.nbytes
        for n in (8, 64):
            want, got = plan(w, n, device=H100), one["plans"][str(n)]
            assert (got["kernel"], tuple(got["grid"]), got["workspace_bytes"]) == (
                want.spec.label, want.grid, want.workspace_bytes,
            )  # fmt: skip
            assert got["predicted"]["us"] == pytest.approx(own["us"][str(n)])
        assert [c["format"] for c in one["ranking"]][-1] == "dense"
        assert {c["format"] for c in one["ranking"]} == {*registry.FORMATS, "dense"}


def test_one_tensor_of_a_packed_file(packed: Path) -> None:
    assert [one["name"] for one in _json(packed, "--tensor", "layer.bitmap")] == ["layer.bitmap"]
    result = _run(packed, "--tensor", "absent")
    assert result.exit_code == 2
    assert "layer.bitmap" in result.stderr


def test_a_dense_matrix_beside_packed_weights(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"  # as `flashllm convert` writes it
    with ContainerWriter(path, weights=["sparse"], tensors=["dense.weight", "norm.weight"]) as writer:
        writer.add_weight("sparse", pack(DENSE, format="bitmap"))
        writer.add_tensor("dense.weight", DENSE[:256])
        writer.add_tensor("norm.weight", DENSE[0])
    assert [one["name"] for one in _json(path)] == ["sparse"]
    (one,) = _json(path, "--tensor", "dense.weight")
    assert (one["name"], one["M"], one["packed_here"]) == ("dense.weight", 256, True)
    assert "norm.weight: expected a matrix" in _run(path, "--tensor", "norm.weight").stderr
    refused = _run(path, "--tensor", "sparse.words")
    assert "tensor: expected one of 'dense.weight', 'norm.weight', 'sparse', got 'sparse.words'" in refused.stderr


def test_a_file_of_dense_tensors_alone_is_not_shown_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    with ContainerWriter(path, weights=[], tensors=["a.weight", "b.weight"]) as writer:
        writer.add_tensor("a.weight", DENSE[:128])
        writer.add_tensor("b.weight", DENSE[:256])
    result = _run(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tensor: expected a name, as block.safetensors holds several: 'a.weight', 'b.weight'" in result.stderr
    assert [one["M"] for one in _json(path, "--tensor", "b.weight")] == [256]


def test_a_sample_of_a_packed_weight_shows_what_other_formats_would_take(tmp_path: Path) -> None:
    uneven = DENSE.copy()
    uneven[77] = 1
    path = tmp_path / "w.safetensors"
    TiledCSL.from_dense(uneven).save(path)

    def slots(*arguments: str) -> int:
        (one,) = _json(path, "--n", "8", *arguments)
        return int(next(c["bytes"] for c in one["ranking"] if c["format"] == "slot24"))

    assert slots("--sample") == pytest.approx(pack(uneven, format="slot24").nbytes, abs=1)
    assert slots("--sample") > 1.05 * slots()


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
def test_a_dense_matrix_is_packed_in_the_best_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "npy":
        np.save(path, DENSE)
    elif suffix == "npz":
        scipy.sparse.save_npz(path, scipy.sparse.csr_array(DENSE.astype(np.float32)))
    else:
        save_file({"w": DENSE, "b": DENSE[0]}, path)
    (one,) = _json(path, "--n", "16", *(("--tensor", "w") if suffix == "safetensors" else ()))
    ranking = rank_formats_of(DENSE, 16, gpu=GPU)
    assert (one["format"], one["packed_here"]) == (ranking.best.format, True)
    assert one["nnz"] == np.count_nonzero(DENSE)
    assert one["rows_packed_to_estimate"] == 640


def test_shapes_and_sparsities() -> None:
    found = _json("--shape", "28672x8192", "--sparsity", "0.5,0.8", "--n", "8", "--dtype", "bf16")
    assert [(one["M"], one["K"], round(one["sparsity"], 6), one["dtype"]) for one in found] == [
        (28672, 8192, 0.5, "bf16"),
        (28672, 8192, 0.8, "bf16"),
    ]
    for one in found:
        ranking = rank_formats((28672, 8192), 1 - one["sparsity"], 8, dtype="bf16", gpu=GPU)
        assert [c["format"] for c in one["ranking"]] == [*(c.format for c in ranking.candidates), "dense"]
        assert (one["format"], one["plans"], one["tile_fill"]) == (None, {}, None)


def test_tiles_filled() -> None:
    dense = np.zeros((256, 128), np.float16)
    dense[:128, :64] = 1
    dense[128, 0] = 1
    for name in registry.FORMATS:
        fill = inspection.tile_fill(pack(dense, format=name))
        assert fill is not None
        assert (fill.least, fill.most) == (0.0, 1.0)
        assert 0.25 <= fill.mean <= 0.27
    assert inspection.tile_fill(Coordinates.from_dense(dense)) is None


def test_the_tables_fit_100_columns(packed: Path) -> None:
    result = _run(packed, "--n", "1,8,16,32,64")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "for H100 80GB: 132 multiprocessors, 1980 MHz, 3060 GB/s (measured, pure read)" in result.stdout
    assert "layer.slot24: 640x512 fp16" in result.stdout
    assert "better, by the geometric mean over N: tiled-csl, " in result.stdout
    assert "best, by the geometric mean over N: tiled-csl, slower than dense" in result.stdout
    shape = _run("--shape", "28672x8192", "--gpu", "l40s").stdout
    assert "for L40S: 142 multiprocessors" in shape
    assert "plans" not in shape


def test_an_expansion_is_shown_as_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    w = pack((np.random.default_rng(0).random((4096, 2048)) < 0.1).astype(np.float16), format="bitmap")
    w.save(path)
    (one,) = _json(path, "--n", "64,2048")
    assert [one["plans"][n]["expand"] for n in ("64", "2048")] == [False, True]
    wide = one["plans"]["2048"]
    assert wide["workspace_bytes"] == 2 * 4096 * 2048
    assert wide["predicted"]["expand_us"] < 0.9 * wide["predicted"]["us"]
    own = next(c for c in one["ranking"] if c["format"] == "bitmap")
    assert own["us"]["2048"] == pytest.approx(wide["predicted"]["expand_us"])
    text = _run(path, "--n", "2048").stdout
    assert "expand, cublas" in text
    assert "16,777,216" in text


def test_another_gpu_changes_plans_and_times(packed: Path) -> None:
    (here,) = _json(packed, "--tensor", "layer.tiled-csl", "--n", "64")
    (there,) = _json(packed, "--tensor", "layer.tiled-csl", "--n", "64", "--gpu", "A100 80GB")
    assert "kSlices=0" in here["plans"]["64"]["kernel"]
    assert "kSlices=1" in there["plans"]["64"]["kernel"]
    assert there["gpu"]["sm_count"] == 108
    assert there["plans"]["64"]["predicted"]["us"] > here["plans"]["64"]["predicted"]["us"]


def test_times_measured_on_the_gpu_in_use_are_marked(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = TiledCSL.load(packed, name="layer.tiled-csl")
    choice = registry.kernel("tiled-csl").default_choice(w, 8, arch="90a")
    tune_cache.store(w, 8, choice, median_us=1.25, device=H100)
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: None)
    monkeypatch.setattr("flashllm.device.device_facts", lambda: H100)
    text = _run(packed, "--tensor", "layer.tiled-csl", "--n", "8").stdout
    assert "for NVIDIA H100 80GB HBM3" in text
    assert " 1.2* " in text
    assert "* measured by `flashllm tune` on this GPU" in text
    (one,) = _json(packed, "--tensor", "layer.tiled-csl", "--n", "8")
    assert one["ranking"][0]["source"] == "measured"
    assert one["plans"]["8"]["source"] == "tuned"


def test_a_format_without_constants_is_shown_without_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)
    path = tmp_path / "w.safetensors"
    Coordinates.from_dense(DENSE).save(path)
    (one,) = _json(path, "--n", "8")
    assert (one["format"], one["plans"]["8"]["predicted"]) == ("coordinates", None)
    assert "coordinates" not in {c["format"] for c in one["ranking"]}
    assert "better, by the geometric mean over N: " in _run(path, "--n", "8").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("w.npy", "--shape", "8x8"),
        ("absent.npy",),
        ("absent.safetensors",),
        ("w.npy", "--sparsity", "0.8"),
        ("w.npy", "--dtype", "bf16"),
        ("--shape", "8x8", "--tensor", "w"),
        ("--shape", "8x8", "--sample"),
        ("--shape", "8"),
        ("--shape", "8x8", "--sparsity", "80"),
        ("--shape", "8x8", "--dtype", "fp8"),
        ("--shape", "8x8", "--n", "0"),
        ("--shape", "8x8", "--gpu", "TPU"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(arguments: tuple[str, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert sum(line.startswith("Error:") for line in result.stderr.splitlines()) == 1


def test_a_described_gpu_can_be_planned_for() -> None:
    assert gpu_of(facts_of(GPU)) == GPU
    facts = facts_of(find_gpu("A100 80GB"))
    assert (facts.cc, facts.arch, facts.sm_count) == (A100.cc, A100.arch, A100.sm_count)
    w = TiledCSL.from_dense(DENSE)
    assert plan(w, 8, device=facts).choice == plan(w, 8, device=A100).choice
