# SPDX-License-Identifier: Apache-2.0
"""``flashllm verify`` finds what is wrong: which element, what it is and what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import fake_gpu
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from flashllm import registry
from flashllm.backends import emulator, reference
from flashllm.cli import verify as cli
from flashllm.errors import ArgumentError
from flashllm.formats.base import DTYPES
from flashllm.formats.weight import SparseWeight
from flashllm.jit.spec import ALL_ARCHS
from flashllm.matmul import plan
from flashllm.verify import cases, products, run
from flashllm.verify.operands import make_problem

Spoil = Callable[[NDArray[Any]], None]
REAL = reference.spmm
QUICK = 20 * len(registry.FORMATS)
"""Cases of ``--quick`` on the host, or of one width: two types, aligned or not, five products."""


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.command, list(arguments))


def _spoil(monkeypatch: pytest.MonkeyPatch, change: Spoil) -> None:
    def wrong(x: Any, w: Any) -> Any:
        y = REAL(x, w)
        change(y)
        return y

    monkeypatch.setattr(reference, "spmm", wrong)


def _cases(**more: Any) -> list[cases.Case]:
    return cases.build_cases(backend="reference", archs=(), **more)


def _last(all_cases: list[cases.Case]) -> run.Outcome:
    return list(run.run_cases(all_cases, products.ReferenceMultiplier()))[-1]


def test_reference_passes_everything() -> None:
    """With one of the two value types in turn: only conversions depend on them."""
    chosen = [case for i, case in enumerate(_cases()) if case.data.dtype == DTYPES[i % 2]]
    assert len({replace(case.data, dtype="fp16") for case in _cases()}) == len(chosen)
    outcomes = list(run.run_cases(chosen, products.ReferenceMultiplier()))
    assert len(outcomes) == len(chosen)
    assert all(outcome.passed for outcome in outcomes)
    data = [outcome.case.data for outcome in outcomes]
    assert {d.dtype for d in data} == set(DTYPES)
    assert {d.operands for d in data} == {"integers", "random", "special"}
    made = [registry.weight_class(name) for name in registry.FORMATS]
    assert {d.encoding for d in data} == {encoding for one in made for encoding in one.ENCODINGS}
    assert {(d.pattern, d.sparsity) for d in data} == set(cases.PATTERNS)


def test_first_wrong_element_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(y: NDArray[Any]) -> None:
        if y.shape[1] == 200:
            y[2, 17] += 8
            y[3, 5] += 8

    _spoil(monkeypatch, change)
    outcome = _last(_cases(quick=True))
    problem = make_problem(outcome.case.data)
    assert outcome.case.data.operands == "integers"
    assert outcome.wrong == run.WrongElement(
        n=2,
        m=17,
        got=problem.expected[2, 17] + 8,
        expected=problem.expected[2, 17],
        bound=0.0,
        wrong=2,
        elements=problem.expected.size,
    )


def test_one_unit_in_the_last_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(y: NDArray[Any]) -> None:
        y.view(np.uint16)[0, -1] ^= 1

    _spoil(monkeypatch, change)
    outcome = _last(_cases(quick=True))
    assert outcome.wrong is not None
    assert (outcome.wrong.n, outcome.wrong.m, outcome.wrong.wrong) == (0, 199, 1)


@pytest.mark.parametrize("operands", ["integers", "random", "special"])
def test_elements_nobody_writes_are_caught(monkeypatch: pytest.MonkeyPatch, operands: str) -> None:
    """The element reported is not one that special values make NaN anyway."""

    def change(y: NDArray[Any]) -> None:
        y[:, 20] = np.nan

    _spoil(monkeypatch, change)
    outcome = _last([case for case in _cases(quick=True) if case.data.operands == operands])
    assert outcome.wrong is not None
    assert outcome.wrong.m == 20
    assert np.isnan(outcome.wrong.got)
    assert np.isfinite(outcome.wrong.expected)


def test_random_values_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, lambda y: np.multiply(y, 1 + 2.0**-8, out=y, casting="unsafe"))
    outcome = _last([case for case in _cases(quick=True) if case.data.operands == "random"])
    assert outcome.wrong is not None
    assert outcome.error_over_bound is not None
    assert outcome.error_over_bound > 1
    assert 0 < outcome.wrong.bound < abs(outcome.wrong.got - outcome.wrong.expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: np.nan_to_num(y, copy=False, nan=0.0, posinf=np.inf, neginf=-np.inf),
        lambda y: np.nan_to_num(y, copy=False, nan=np.nan),  # infinities become the largest finite values
        lambda y: np.negative(y, out=y, where=np.isinf(y)),
    ],
    ids=["lost NaN", "lost infinity", "wrong sign"],
)
def test_nan_and_infinity_are_asked_for(monkeypatch: pytest.MonkeyPatch, change: Spoil) -> None:
    special = [case for case in _cases() if case.data.operands == "special"]
    assert _last(special).passed
    _spoil(monkeypatch, change)
    assert not _last(special).passed


def test_special_operands_hold_what_they_should() -> None:
    for case in _cases():
        if case.data.operands == "special":
            expected = make_problem(case.data).expected
            assert np.isnan(expected).any()
            assert np.isfinite(expected).any()
            assert np.isposinf(expected).any()
            assert np.isneginf(expected).any()
            infinite_row = case.data.n // 2
            assert np.isnan(expected[infinite_row]).any()


@pytest.mark.parametrize("name", registry.FORMATS)
def test_zeros_may_be_left_out_where_the_format_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Any of them, and nothing else: the product of the stored elements passes, one that lost an infinity does not."""
    case = next(c for c in _cases(formats=(name,)) if c.data.operands == "special" and c.data.sparsity == 0.8)
    problem = make_problem(case.data)
    w, x = problem.w.to_dense().astype(np.float64), problem.x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        terms = np.where(w != 0, x[:, None] * w, 0.0)
        stored = terms.sum(axis=-1).astype(problem.x.dtype)
        finite = np.where(np.isinf(x[:, None]), 0.0, terms).sum(axis=-1).astype(problem.x.dtype)
        dense = (x @ w.T).astype(problem.x.dtype)
    fewer = np.where(np.arange(len(w)) % 2 == 0, stored, dense)
    for y, passes in ((dense, True), (stored, None), (fewer, None), (finite, False)):
        monkeypatch.setattr(reference, "spmm", lambda x, w, y=y: y.copy())
        expected = not registry.weight_class(name).MULTIPLIES_ZEROS if passes is None else passes
        assert run.run_case(case, products.ReferenceMultiplier()).passed == expected


def test_a_misbehaving_kernel_is_a_failed_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def deadlock(*_: Any, **__: Any) -> Any:
        raise emulator.EmulationError("block 3: warp 1 waits forever")

    monkeypatch.setattr(emulator, "spmm", deadlock)
    monkeypatch.setattr(emulator, "preload", lambda *_, **__: None)
    (outcome,) = run.run_cases(
        cases.build_cases(backend="emulator", archs=("90a",), quick=True), products.EmulatorMultiplier()
    )
    assert not outcome.passed
    assert "block 3: warp 1 waits forever" in outcome.text


@pytest.mark.parametrize("name", registry.FORMATS)
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_every_instance_of_an_architecture_is_covered(arch: str, name: str) -> None:
    found = cases.build_cases(backend="cuda", archs=(arch,), formats=(name,))
    covered = {case.choice.spec for case in found if case.choice}
    assert covered == {spec for spec in registry.kernel(name).specs() if spec.supports(arch)}
    for case in found:
        assert case.choice is not None
        assert (case.data.k % 8 == 0) == case.choice.aligned
        assert case.data.dtype == case.choice.dtype
        assert all(getattr(case.choice, field) == value for field, value in case.data.layout)
    quick = {case.choice for case in cases.build_cases(backend="cuda", archs=(arch,), formats=(name,), quick=True)}
    widths = {choice.n_block for choice in registry.kernel(name).typical(arch)}
    layouts = {
        tuple(getattr(choice, field) for field in registry.weight_class(name).LAYOUT)
        for choice in registry.kernel(name).instances()
    }
    assert len(quick) == 4 * len(widths) * len(layouts)  # 2 types, aligned or not


@pytest.mark.parametrize("arch", cases.EMULATED_ARCHS)
def test_one_block_has_a_row_of_several_chains(arch: str) -> None:
    device = emulator.emulated_device(arch, sm_count=1)
    found = [case for case in cases.build_cases(backend="emulator", archs=(arch,)) if case.sm_count == 1]
    choices = [choice for name in registry.FORMATS for choice in registry.kernel(name).instances()]
    assert len(found) == sum(choice.spec.supports(arch) for choice in choices)
    packed = cache(lambda data: make_problem(data).w)  # which the number of columns of x does not change
    for case in found:
        w = packed(replace(case.data, n=1))
        split = plan(w, case.data.n, device=device, choice=case.choice).split
        assert split.blocks == 1
        assert split.max_chain < split.tiles_k


def test_kernels_are_chosen_by_their_label() -> None:
    found = cases.build_cases(backend="emulator", archs=("90a",), kernel="kN=16, kSlices=0")
    assert {(case.choice.n_block, case.choice.slices) for case in found if case.choice} == {(16, 0)}
    with pytest.raises(ArgumentError, match="kernel: expected part of the label of a kernel for sm_90a, got 'kN=17'"):
        cases.build_cases(backend="emulator", archs=("90a",), kernel="kN=17")


def test_another_seed_is_another_case() -> None:
    first, second = (make_problem(_cases(seed=seed)[0].data) for seed in (0, 1))
    assert first.w.words.tobytes() != second.w.words.tobytes()


def test_command_passes_and_prints_a_table() -> None:
    result = _run("--backend", "reference", "--quick")
    assert result.exit_code == 0
    assert "NumPy reference only, no kernels" in result.stderr
    assert f"{QUICK} of {QUICK} cases right" in result.stdout
    assert "skewed:0.7" in result.stdout


def test_command_fails_at_the_first_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, lambda y: y.__setitem__((1, 3), 77))
    result = _run("--backend", "reference", "--quick")
    assert result.exit_code == 1
    assert "WRONG numpy: 200x456 N=8 fp16 uniform 0.8 integers, tiled-csl: y[1, 3]: got 77, expected " in result.stderr
    assert "bound 0 (1 of 1,600 elements are wrong)" in result.stderr
    assert f"{QUICK - 1} of {QUICK} cases not run" in result.stderr
    assert "0 of 1 cases right" in result.stdout


def test_json_is_one_object_per_case(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, lambda y: y.__setitem__((1, 3), np.nan))
    result = _run("--backend", "reference", "--quick", "--json")
    assert result.exit_code == 1
    (found,) = (json.loads(line) for line in result.stdout.splitlines())
    assert (found["check"], found["at"], found["got"], found["bound"]) == ("fail", [1, 3], "nan", 0.0)
    assert (found["kernel"], found["M"], found["K"], found["N"], found["operands"]) == (
        "numpy", 200, 456, 8, "integers"
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("--backend", "tpu"),
        ("--backend", "reference", "--kernel", "tiled"),
        ("--backend", "reference", "--arch", "90a"),
        ("--backend", "emulator", "--arch", "75"),
        ("--backend", "emulator", "--kernel", "no-such"),
        ("--seed", "-1"),
    ],
)
def test_bad_usage_is_status_2(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "available", lambda: None)
    result = _run(*arguments)
    assert result.exit_code == 2
    assert sum(line.startswith("Error:") for line in result.stderr.splitlines()) == 1


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    fake_gpu.install(monkeypatch, **more)
    monkeypatch.setattr("flashllm.jit.compile.compile_many", lambda jobs, **_: [])
    monkeypatch.setattr(SparseWeight, "to_device", lambda self: self)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch)
    result = _run("--quick", "--kernel", "kN=16,")
    assert result.exit_code == 0, result.output
    # Two types, aligned or not; slot24 has four layouts, and one kernel for any K.
    choices, kernels = 4 * (len(registry.FORMATS) - 1 + 4), 4 * (len(registry.FORMATS) - 1) + 2 * 4
    assert f"{5 * choices} of {5 * choices} cases right, {kernels} kernels" in result.stdout
    assert _run("--arch", "80").exit_code == 2


def test_on_a_gpu_a_wrong_column_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, wrong_column=5)
    result = _run("--quick", "--kernel", "kN=16,")
    assert result.exit_code == 1
    assert "y[0, 5]" in result.stderr
