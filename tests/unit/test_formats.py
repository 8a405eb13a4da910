# SPDX-License-Identifier: Apache-2.0
"""What every registered format fulfils, and a test format that needs only its registry line, from file to output."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_matmul import H100

import coordinates
from coordinates import Coordinates
from flashllm import ArgumentError, FormatError, TiledCSL, plan, registry, spmm
from flashllm.formats.base import DTYPES
from flashllm.io.container import load_weight, load_weights, save_weights
from flashllm.jit.spec import ALL_ARCHS
from flashllm.matmul import product, tiled_csl, tune_cache
from flashllm.matmul.kernel import Kernel, KernelChoice, Split
from products import exact, integers, weight

FORMATS = [*registry.FORMATS, coordinates.NAME]


@pytest.fixture(autouse=True)
def _second_format(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates.register(monkeypatch)


def _dense(dtype: str = "fp16", shape: tuple[int, int] = (130, 72)) -> NDArray[Any]:
    return weight("uniform", shape, 0.2, dtype)


def _members(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


@pytest.mark.parametrize("name", FORMATS)
def test_kernel_modules_offer_all_that_is_asked(name: str) -> None:
    module: Any = registry.kernel(name)
    for member in _members(Kernel) - {"Choice"}:
        asked = list(inspect.signature(getattr(Kernel, member)).parameters.values())[1:]
        offered = inspect.signature(getattr(module, member)).parameters.values()
        assert [(p.name, p.kind) for p in offered] == [(p.name, p.kind) for p in asked], member
    assert {field.type for field in fields(module.Choice)} <= {"int", "bool", "str"}
    assert _members(KernelChoice) - {"spec"} <= {field.name for field in fields(module.Choice)}


@pytest.mark.parametrize("name", FORMATS)
def test_kernel_modules_agree_with_themselves(name: str) -> None:
    module = registry.kernel(name)
    specs = set(module.specs())
    assert {choice.spec for choice in module.instances()} == specs
    assert specs <= set(registry.all_specs())
    w = registry.weight_class(name).from_dense(_dense())
    for arch in ALL_ARCHS:
        typical = [choice for choice in module.typical(arch) if choice.spec.supports(arch)]
        assert {choice.dtype for choice in typical} == set(DTYPES)
        assert {choice.spec for choice in typical} <= specs
        candidates = list(module.candidates(w, 16, arch=arch))
        assert candidates[0] == module.default_choice(w, 16, arch=arch)
        assert all(module.usable(choice) and choice.spec in specs for choice in candidates)
        for choice in candidates:
            split = module.split_for(w, 16, choice, sm_count=132)
            assert all(hasattr(split, member) for member in _members(Split))
            assert split.workspace_bytes >= 0
            assert all(variant.spec in specs for variant in module.ablation(choice).values())


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_base_class_says(name: str, tmp_path: Path) -> None:
    made = registry.weight_class(name)
    a = _dense()
    assert "default" in made.ENCODINGS
    for options in made.ENCODINGS.values():
        w = made.from_dense(a, **options)
        assert (w.format, w.shape, w.dtype, w.nnz) == (name, a.shape, "fp16", np.count_nonzero(a))
        assert (w.density, w.sparsity) == (w.nnz / a.size, 1 - w.nnz / a.size)
        assert w.nbytes == sum(array.nbytes for array in w.arrays().values())
        assert tuple(w.arrays()) == made.BUFFERS
        assert not w.is_device
        w.validate()
        np.testing.assert_array_equal(w.to_dense(), a)
        np.testing.assert_array_equal(w.to_scipy().toarray(), a.astype(np.float32))
        again = made.from_parts(json.loads(json.dumps(w.metadata())), w.arrays())
        assert again.metadata() == w.metadata()
        assert again.shape == a.shape
        w.save(tmp_path / "w")
        np.testing.assert_array_equal(made.load(tmp_path / "w").to_dense(), a)
        with pytest.raises(FrozenInstanceError):
            w.nnz = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", registry.FORMATS)
def test_plans_fit_a_grid_up_to_the_largest_n(name: str) -> None:
    w = registry.weight_class(name).from_dense(_dense())
    most = 65535 * plan(w, 200, device=H100).choice.n_block
    assert plan(w, most, device=H100).grid[1] == 65535
    with pytest.raises(ArgumentError, match=f"n: expected columns for at most 65535 blocks of [0-9]+, got {most + 1}"):
        plan(w, most + 1, device=H100)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.6])
def test_bytes_are_estimated(name: str, density: float) -> None:
    a = weight("uniform", (1024, 1280), density, "fp16")
    made = registry.weight_class(name)
    assert 0.8 < made.from_dense(a).nbytes / made.estimated_bytes(a.shape, density) < 1.02


@pytest.mark.parametrize("name", FORMATS)
def test_a_copy_has_buffers_of_its_own(name: str) -> None:
    w = registry.weight_class(name).from_dense(_dense())
    copy = w.copy()
    assert copy.metadata() == w.metadata()
    for buffer, array in copy.arrays().items():
        np.testing.assert_array_equal(array, w.arrays()[buffer])
        assert not np.shares_memory(array, w.arrays()[buffer])


@pytest.mark.parametrize("name", FORMATS)
def test_absent_parts_are_named(name: str) -> None:
    w = registry.weight_class(name).from_dense(_dense())
    optional = {field.name for field in fields(w) if field.default is not MISSING}
    for missing in w.metadata().keys() - optional:
        with pytest.raises(FormatError, match=rf"^file: {missing}: expected an entry in the metadata, got none"):
            w.from_parts({k: v for k, v in w.metadata().items() if k != missing}, w.arrays(), path="file")
    for missing in w.BUFFERS:
        with pytest.raises(FormatError, match=f"^{missing}: expected a buffer, got none"):
            w.from_parts(w.metadata(), {k: v for k, v in w.arrays().items() if k != missing})


def test_buffers_on_two_sides_are_refused() -> None:
    class Device(np.ndarray[Any, Any]):
        """Passes for a CuPy array."""

    Device.__module__ = "cupy"
    w = Coordinates.from_dense(_dense())
    with pytest.raises(FormatError, match="values: expected on the side of rows, got host and device"):
        w.with_arrays({"values": w.values.view(Device)})


def test_unknown_formats_are_refused_with_the_known_ones() -> None:
    for look_up in (registry.entry, registry.weight_class, registry.kernel):
        with pytest.raises(ArgumentError, match=r"format: expected one of tiled-csl.*, coordinates, got 'csr'"):
            look_up("csr")


def test_files_hold_weights_of_several_formats(tmp_path: Path) -> None:
    a = _dense()
    weights = {name: registry.weight_class(name).from_dense(a) for name in FORMATS}
    save_weights(tmp_path / "w", weights)
    read = load_weights(tmp_path / "w")
    assert {name: w.format for name, w in read.items()} == {name: name for name in FORMATS}
    for name in FORMATS:
        np.testing.assert_array_equal(read[name].to_dense(), a)
    with pytest.raises(FormatError, match="format: expected tiled-csl, got coordinates"):
        TiledCSL.load(tmp_path / "w", name="coordinates")


def test_files_are_validated_by_their_format(tmp_path: Path) -> None:
    w = Coordinates.from_dense(_dense())
    rows = w.rows.copy()
    rows[5] = 130
    w.with_arrays({"rows": rows}).save(tmp_path / "w")
    with pytest.raises(FormatError, match=r"rows\[5\]: expected 0..129"):
        load_weight(tmp_path / "w")


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_on_the_host(dtype: str) -> None:
    a = _dense(dtype)
    x = integers(np.random.default_rng(1), (5, 72), dtype)
    np.testing.assert_array_equal(spmm(x, Coordinates.from_dense(a)), exact(x, a, dtype))


def test_plans_are_of_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w, other = Coordinates.from_dense(_dense()), TiledCSL.from_dense(_dense())
    made = plan(w, 5, device=H100)
    assert (made.format, made.grid, made.workspace_bytes, made.source) == ("coordinates", (3, 5), 0, "auto")
    assert made.reason == f"auto: {w.nnz} coordinates, 1 times"
    with pytest.raises(ArgumentError, match=r"choice: expected one of the kernel for tiled-csl, .*got coordinates"):
        plan(other, 5, device=H100, choice=made.choice)
    with pytest.raises(ArgumentError, match=r"plan: expected .* tiled-csl of fp16, N = 5, got .* coordinates of fp16"):
        product._checked_plan(made, other, 5)


def test_measured_choices_are_kept_by_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w, other = Coordinates.from_dense(_dense()), TiledCSL.from_dense(_dense())
    twice = list(coordinates.candidates(w, 16, arch="90a"))[1]
    tuned = list(tiled_csl.candidates(other, 16, arch="90a"))[1]
    path = tune_cache.store(w, 16, twice, median_us=10.0, device=H100)
    assert plan(other, 16, device=H100).source == "auto"
    tune_cache.store(other, 16, tuned, median_us=10.0, device=H100)
    assert plan(w, 16, device=H100).choice == twice
    assert plan(other, 16, device=H100).choice == tuned
    assert plan(w, 8, device=H100).source == "auto"

    payload = json.loads(path.read_text())
    keys = list(payload["choices"])
    assert [key.split()[0] for key in keys] == ["coordinates", "tiled-csl"]
    good = payload["choices"][keys[0]]
    choices = [{**good["choice"], "repeat": value} for value in (3, True)]
    numbers = [{"median_us": 0.0}, {"median_us": 7}, {"n": 0}, {"density": 1.5}, {"weight_bytes": -1}, {"expanded": 1}]
    wrong = [{**good, **change} for change in (*({"choice": choice} for choice in choices), *numbers, {"more": 1})]
    for bad in (payload["choices"][keys[1]], *wrong, good["choice"], {}, None):
        payload["choices"][keys[0]] = bad
        path.write_text(json.dumps(payload))
        assert plan(w, 16, device=H100).source == "auto"
        assert plan(other, 16, device=H100).source == "tuned"


def test_a_choice_of_a_format_that_is_not_there_is_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLLM_CACHE_DIR", str(tmp_path))
    w, other = Coordinates.from_dense(_dense()), TiledCSL.from_dense(_dense())
    tune_cache.store(w, 16, coordinates.default_choice(w, 16, arch="90a"), median_us=10.0, device=H100)
    tune_cache.store(other, 16, tiled_csl.default_choice(other, 16, arch="90a"), median_us=10.0, device=H100)
    monkeypatch.delitem(registry.FORMATS, coordinates.NAME)
    tune_cache._loaded.clear()
    assert plan(other, 16, device=H100).source == "tuned"
