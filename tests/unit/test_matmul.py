# SPDX-License-Identifier: Apache-2.0
"""Planning without a GPU: the stream-K split, the choice of an instance, the tuning file, the host product."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashllm import ArgumentError, TiledCSL, plan, spmm
from flashllm.device import DeviceFacts
from flashllm.jit.sources import cuda_root
from flashllm.matmul import tiled_csl, tune_cache
from flashllm.matmul.stream_k import StreamK

H100 = DeviceFacts(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    cc=(9, 0),
    arch="90a",
    sm_count=132,
    l2_bytes=50 << 20,
    shared_per_block=232448,
    shared_per_sm=233472,
    memory_bytes=80 << 30,
    clock_mhz=1980.0,
    driver=13000,
)
A100 = DeviceFacts(**{**H100.__dict__, "name": "NVIDIA A100-SXM4-80GB", "cc": (8, 0), "arch": "80", "sm_count": 108})


def packed(m: int = 256, k: int = 256, density: float = 0.2, dtype: str = "fp16") -> TiledCSL:
    rng = np.random.default_rng(0)
    return TiledCSL.from_dense((rng.random((m, k)) < density).astype(np.float16), dtype=dtype)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_stream_k_deals_every_tile_once(tiles_m: int, tiles_k: int, data: st.DataObject) -> None:
    row_cost = data.draw(st.integers(0, 6))
    most = min(tiles_m * tiles_k, tiles_m * (tiles_k + row_cost) // (row_cost + 1))
    blocks = data.draw(st.integers(1, most))
    split = StreamK(tiles_m=tiles_m, tiles_k=tiles_k, blocks=blocks, n_block=8, row_cost=row_cost)
    edges = [split.first_tile(b) for b in range(blocks + 1)]
    assert edges[0] == 0
    assert edges[-1] == tiles_m * tiles_k
    assert all(a < b for a, b in itertools.pairwise(edges)), "no block is empty"
    for block in range(blocks):
        assert split.block_of(edges[block]) == block
        assert split.block_of(edges[block + 1] - 1) == block


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_pieces_of_a_row_fit_the_slots(tiles_m: int, tiles_k: int, data: st.DataObject) -> None:
    row_cost = data.draw(st.integers(0, 6))
    most = min(tiles_m * tiles_k, tiles_m * (tiles_k + row_cost) // (row_cost + 1))
    blocks = data.draw(st.integers(1, most))
    split = StreamK(tiles_m=tiles_m, tiles_k=tiles_k, blocks=blocks, n_block=8, row_cost=row_cost)
    slots = set()
    for row in range(tiles_m):
        first = split.block_of(row * tiles_k)
        count = split.pieces(row)
        for block in range(first, first + count):
            begins_here = split.first_tile(block) // tiles_k == row
            assert begins_here or block == first, "only the first block of a row may begin before it"
            if count > 1:
                slot = (block, 0 if begins_here else 1)
                assert slot not in slots, "two rows share a piece"
                slots.add(slot)
    if slots:
        assert split.workspace_bytes >= 128 + len(slots) * 8 * 128 * 4


def test_workspace_is_empty_only_where_no_row_is_shared() -> None:
    assert StreamK(tiles_m=8, tiles_k=5, blocks=4, n_block=8).workspace_bytes == 0
    assert StreamK(tiles_m=8, tiles_k=5, blocks=3, n_block=8).workspace_bytes > 0
    for tiles_m in range(1, 12):
        for blocks in range(1, tiles_m * 3 + 1):
            split = StreamK(tiles_m=tiles_m, tiles_k=3, blocks=blocks, n_block=16)
            assert (split.workspace_bytes == 0) == all(split.pieces(row) == 1 for row in range(tiles_m))
    assert StreamK(tiles_m=8, tiles_k=5, blocks=4, n_block=8, max_chain=4).workspace_bytes > 0


def test_runs_cost_the_same() -> None:
    """Tiles plus ends of rows inside a run differ by at most one between runs, as far as the last end allows."""
    split = StreamK(tiles_m=72, tiles_k=144, blocks=396, n_block=8, row_cost=4)
    costs = []
    for block in range(split.blocks):
        first, end = split.first_tile(block), split.first_tile(block + 1)
        costs.append(end - first + 4 * ((end - 1) // 144 - first // 144))
    assert max(costs) == -(-split.cost // split.blocks)


def test_a_split_without_a_tile_for_every_block_is_refused() -> None:
    StreamK(tiles_m=3, tiles_k=9, blocks=9, n_block=8, row_cost=3)
    for blocks, row_cost in ((0, 0), (28, 0), (10, 3)):
        with pytest.raises(ArgumentError, match="blocks"):
            StreamK(tiles_m=3, tiles_k=9, blocks=blocks, n_block=8, row_cost=row_cost)


@pytest.mark.parametrize(
    ("shape", "blocks", "row_cost"),
    [
        ((7168, 7168), 392, 0),  # 7 for each of 56 rows of tiles: none spans two
        ((12288, 49152), 384, 0),  # 4 for each of 96
        ((9216, 9216), 396, 3),  # 5.5 for each of 72
        ((28672, 7168), 396, 3),
        ((576, 1536), 40, 0),  # 24 tiles in a row: 8 pieces of 3
        ((1, 1), 1, 0),
    ],
)
def test_split_of_typical_shapes(shape: tuple[int, int], blocks: int, row_cost: int) -> None:
    class Weight:
        tiles = (-(-shape[0] // 128), -(-shape[1] // 64))

    choice = plan(packed(), 8, device=H100).choice
    split = tiled_csl.split_for(cast(TiledCSL, Weight()), 8, choice, sm_count=132)
    assert (split.blocks, split.row_cost) == (blocks, row_cost)


def test_huge_weights_take_fewer_blocks() -> None:
    class Huge:
        tiles = (1 << 14, 1 << 13)

    choice = plan(packed(), 8, device=H100).choice
    split = tiled_csl.split_for(cast(TiledCSL, Huge()), 8, choice, sm_count=132)
    assert 1 <= split.blocks < 132
    assert split.cost * split.blocks < 2**32


def test_host_and_device_agree_on_the_constants() -> None:
    source = (cuda_root() / "spmm" / "tiled_csl.cu").read_text(encoding="utf-8")
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", source))
    assert int(constants["kThreads"]) == tiled_csl.THREADS
    assert int(constants["kImages"]) == tiled_csl.IMAGES
    assert int(constants["kMaxChainSteps"]) == tiled_csl.MAX_CHAIN_STEPS


def test_long_rows_are_cut_into_chains() -> None:
    wgmma, mma = (tiled_csl.split_for(packed(), n, plan(packed(), n, device=H100).choice, sm_count=1) for n in (64, 8))
    assert (wgmma.max_chain, mma.max_chain) == (96, 192)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 31, 32, 33, 64, 65, 200])
def test_plan_covers_n(n: int) -> None:
    chosen = plan(packed(), n, device=H100)
    assert chosen.choice.n_block * chosen.grid[1] >= n
    assert chosen.grid[0] <= 2 * 4
    assert "tiles over" in chosen.reason


def test_plan_takes_the_path_of_the_device() -> None:
    assert plan(packed(), 64, device=H100).choice.slices == tiled_csl.WARPGROUP
    assert plan(packed(), 64, device=A100).choice.slices > 0
    assert plan(packed(), 64, device=A100).spec.supports("80")
    wgmma = plan(packed(), 64, device=H100).choice
    with pytest.raises(ArgumentError, match="an instance for 80"):
        plan(packed(), 64, device=A100, choice=wgmma)


def test_plan_of_unaligned_k_uses_element_loads() -> None:
    assert plan(packed(64, 100), 16, device=H100).choice.aligned is False
    assert plan(packed(64, 104), 16, device=H100).choice.aligned is True


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "8", 65536 * 64, 2**31])
def test_plan_refuses_a_bad_n(n: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^n: expected"):
        plan(packed(), n, device=H100)


def test_plan_names_what_is_no_weight_and_no_device() -> None:
    with pytest.raises(ArgumentError, match=r"^w: expected a sparse weight such as flashllm\.TiledCSL, got ndarray"):
        plan(np.zeros((4, 4)), 8, device=H100)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^device: expected DeviceFacts, such as .*, got 'H200'"):
        plan(packed(), 8, device="H200")  # type: ignore[arg-type]


def test_every_plan_is_a_registered_spec() -> None:
    specs = set(tiled_csl.specs())
    for device in (H100, A100):
        for dtype in ("fp16", "bf16"):
            for density in (0.0, 0.05, 0.1, 0.2, 0.3, 0.6, 1.0):
                for k in (256, 255):
                    w = packed(256, k, density, dtype)
                    for n in (1, 16, 32, 64, 100):
                        assert plan(w, n, device=device).spec in specs
                        candidates = list(tiled_csl.candidates(w, n, arch=device.arch))
                        assert all(c.spec in specs and c.spec.supports(device.arch) for c in candidates)
                        assert len(candidates) == len(set(candidates))


def test_denser_weights_hold_more_words_in_registers() -> None:
    vectors = [tiled_csl.vectors_for(packed(density=d)) for d in (0.0, 0.1, 0.2, 0.3, 1.0)]
    assert vectors == [2, 2, 4, 5, 5]


def test_tuned_choice_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w = packed()
    heuristic = plan(w, 16, device=H100)
    assert heuristic.source == "auto"
    other = next(c for c in tiled_csl.candidates(w, 16, arch="90a") if c != heuristic.choice)
    path = tune_cache.store(w, 16, other, median_us=10.0, device=H100)
    tuned = plan(w, 16, device=H100)
    assert (tuned.source, tuned.choice) == ("tuned", other)
    assert plan(w, 8, device=H100).source == "auto"
    assert plan(packed(dtype="bf16"), 16, device=H100).source == "auto"
    assert plan(w, 16, device=A100).source == "auto", "another kind of device has another file"
    assert {p.name for p in path.parent.iterdir()} == {path.name, ".lock"}, "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 99, "choices": {}}', '{"version": 2, "choices": []}',
     '{"version": 2, "choices": {"KEY": {"vectors": 4}}}', '{"version": 2, "choices": {"KEY": 7}}'],
)  # fmt: skip
def test_damaged_tuning_file_counts_as_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    path = tune_cache.path_for(H100)
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("KEY", tune_cache.key_for(packed(), 16)))
    assert plan(packed(), 16, device=H100).source == "auto"


def test_a_tuning_file_of_another_version_counts_as_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w = packed()
    path = tune_cache.store(w, 16, plan(w, 16, device=H100).choice, median_us=10.0, device=H100)
    assert plan(w, 16, device=H100).source == "tuned"
    payload = json.loads(path.read_text())
    path.write_text(json.dumps({**payload, "version": 1}))
    assert plan(w, 16, device=H100).source == "auto"


def test_foreign_choice_in_the_tuning_file_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w = packed()
    path = tune_cache.store(w, 16, plan(w, 16, device=H100).choice, median_us=10.0, device=H100)
    payload = json.loads(path.read_text())
    payload["choices"][tune_cache.key_for(w, 16)]["choice"]["vectors"] = 77
    path.write_text(json.dumps(payload))
    assert plan(w, 16, device=H100).source == "auto"


def test_host_product_goes_through_the_reference_backend() -> None:
    w = packed(130, 70, 0.3)
    x = np.random.default_rng(1).integers(-3, 4, (5, 70)).astype(np.float16)
    want = (x.astype(np.float64) @ w.to_dense().astype(np.float64).T).astype(np.float16)
    np.testing.assert_array_equal(spmm(x, w), want)
    out = np.empty((5, 130), np.float16)
    assert spmm(x, w, out=out, backend="reference") is out
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("w", {"w": np.zeros((4, 4))}),
        ("x", {"x": np.zeros((5, 69), np.float16)}),
        ("x", {"x": np.zeros((5, 70), np.float32)}),
        ("x", {"x": [[0.0] * 70]}),
        ("x", {"x": np.zeros((0, 70), np.float16)}),
        ("x", {"x": np.zeros((70, 5), np.float16).T}),
        ("plan", {"plan": plan(packed(128, 70), 5, device=H100)}),
        ("plan", {"plan": plan(packed(130, 70), 6, device=H100)}),
        ("out", {"out": np.zeros((5, 129), np.float16)}),
        ("out", {"out": np.zeros((5, 130), np.float32)}),
        ("out", {"out": np.frombuffer(bytes(5 * 130 * 2), np.float16).reshape(5, 130)}),  # read-only
        ("backend", {"backend": "tpu"}),
    ],
)
def test_bad_host_operands_are_named(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": np.zeros((5, 70), np.float16), "w": packed(130, 70), **change}
    with pytest.raises(ArgumentError, match="expected") as caught:
        spmm(arguments.pop("x"), arguments.pop("w"), **arguments)
    assert caught.value.argument == argument
