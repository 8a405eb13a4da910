# SPDX-License-Identifier: Apache-2.0
"""Systems besides cuBLAS in a run, on a fake GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import fake_gpu
import numpy as np
import pytest

from flashllm import baselines
from flashllm.baselines import SystemEntry, parse_systems
from flashllm.baselines.baseline import Way
from flashllm.bench import comparisons, environment, systems, timing
from flashllm.bench.cases import Group
from flashllm.bench.results import Row, latest
from flashllm.bench.runner import CudaRunner, Settings, required_bytes
from flashllm.bench.sources import RandomSource
from flashllm.errors import ArgumentError

GROUP = Group(m=96, k=72, sparsities=(0.7, 0.9), batches=(4, 8))
FACTS = environment.Environment(
    run_id="r", sweep_id="s", commit=None, dirty=None, command="flashllm bench", backend="cuda", gpu="NVIDIA Pretend"
)
seen: list[Any] = []


@dataclass(frozen=True)
class Given:
    """Multiplies in NumPy; its second way is wrong, but slower."""

    SYSTEM: ClassVar[str] = "given"
    FORMAT: ClassVar[str] = "csr"
    w: Any
    spoilt: bool = False

    @property
    def nbytes(self) -> int:
        return int(self.w.nbytes)

    @classmethod
    def from_dense(cls, dense: Any) -> Any:
        seen.append(dense)
        return cls(dense)

    def copy(self) -> Any:
        return type(self)(self.w.copy())

    @classmethod
    def ways(cls, weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        y = np.zeros((x.shape[0], weights[0].w.shape[0]), np.float16)

        def launch(copy: int, stream: Any) -> None:
            def run() -> None:
                y[...] = x.astype(np.float32) @ weights[copy].w.astype(np.float32).T
                y[:, 5] += cls.wrong()

            stream.do(run)

        return [
            Way(
                label="ours", deterministic=True, copies=len(weights), launch=launch, buffer=lambda: y, output=lambda: y
            )
        ]

    @classmethod
    def wrong(cls) -> float:
        return 0.0


class Wrong(Given):
    SYSTEM = "wrong"

    @classmethod
    def wrong(cls) -> float:
        return 1.0


class TwoOfFour(Given):
    SYSTEM, FORMAT = "pruned", "2:4"


class Halved(Given):
    """Stores and multiplies a different matrix and different inputs than it is given."""

    SYSTEM, FORMAT = "halved", "int4"

    @classmethod
    def from_dense(cls, dense: Any) -> Any:
        return cls((dense / 2).astype(np.float16))

    def multiplied(self) -> Any:
        return self.w

    @classmethod
    def inputs(cls, x: Any) -> Any:
        return x


class Refusing(Given):
    SYSTEM = "refusing"

    @classmethod
    def from_dense(cls, dense: Any) -> Any:
        raise ArgumentError("dense", expected="another shape", got="this one")


@pytest.fixture(autouse=True)
def blas(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.Blas:
    """The fake cuBLAS of a fake GPU, with the systems above registered."""
    found = fake_gpu.install(monkeypatch)
    seen.clear()
    monkeypatch.setattr(timing, "BATCH_MS", 0.01)
    monkeypatch.setattr(timing, "COLD_BYTES", 20_000)
    monkeypatch.setattr(timing, "MIN_SAMPLES", 3)
    module: Any = types.ModuleType("pretended_systems")
    classes = {"given": Given, "wrong": Wrong, "pruned": TwoOfFour, "halved": Halved, "refusing": Refusing}
    for name, made in classes.items():
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "pretended_systems", module)
    matrices: dict[str, Any] = {"pruned": "2:4", "halved": "dense", "refusing": "dense"}
    entries = {
        name: SystemEntry(
            weight=f"pretended_systems:{name}",
            matrix=matrices.get(name, "given"),
            bytes_per_element=lambda density: 2.0,
        )
        for name in classes
    }
    for place in (baselines, comparisons, sys.modules["flashllm.bench.runner"]):
        monkeypatch.setattr(place, "SYSTEMS", {"cublas-notc": baselines.SYSTEMS["cublas-notc"], **entries})
    return found


def _run(*names: str, **group: Any) -> list[Row]:
    rows: list[Row] = []
    settings = Settings(method=timing.Method(warmup_ms=0.01, cap_s=0.001), check_rows=16, compared=names)
    runner = CudaRunner(FACTS, settings, RandomSource(), rows.append)
    done: list[int] = []
    groups = [Group(**{**GROUP.__dict__, **group})]
    runner.run(groups, wanted=lambda *case: True, advance=lambda title, cases: done.append(cases))
    assert sum(done) == sum(row.system == "flashllm" for row in rows)
    return rows


def test_systems_run_beside_ours_a_sparsity_at_a_time() -> None:
    rows = _run("given", "pruned", "halved", batches=(8,))
    assert [(r.system, r.sparsity) for r in rows] == [
        ("cublas", 0.7), ("flashllm", 0.7), ("given", 0.7), ("pruned", 0.5), ("halved", 0.0),
        ("cublas", 0.9), ("flashllm", 0.9), ("given", 0.9),
    ]  # fmt: skip
    assert all(r.check == "pass" and r.speedup and r.median_us for r in rows)
    assert len(latest(rows)) == len(rows)
    by_name = {r.system: r for r in rows}
    assert (by_name["given"].format, by_name["given"].kernel, by_name["given"].choice) == ("csr", "ours", "tuned")
    assert (by_name["pruned"].format, by_name["pruned"].pattern) == ("2:4", "2:4")
    assert (by_name["halved"].format, by_name["halved"].pattern) == ("int4", "uniform")
    assert by_name["given"].bytes == 2 * (96 * 72 + 8 * 72 + 8 * 96)
    whole = next(matrix for matrix in seen if np.count_nonzero(matrix) == 96 * 36)
    assert (np.count_nonzero(whole.reshape(-1, 4), axis=1) == 2).all()


def test_their_results_are_checked() -> None:
    assert {r.system: r.check for r in _run("given", "wrong", batches=(4,))} == {
        "cublas": "pass", "flashllm": "pass", "given": "pass", "wrong": "fail",
    }  # fmt: skip


def test_a_system_that_multiplies_another_matrix_is_held_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Halved, "multiplied", lambda self: self.w * np.float16(2))
    assert {r.system: r.check for r in _run("halved", batches=(4,), sparsities=(0.8,))}["halved"] == "fail"


def test_a_shape_that_does_not_suit_a_dense_system_is_left_out() -> None:
    assert {r.system for r in _run("refusing", batches=(4,))} == {"cublas", "flashllm"}


def test_a_refusal_of_the_matrix_of_the_case_is_told_but_for_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "from_dense", Refusing.from_dense)
    with pytest.raises(ArgumentError, match="another shape"):
        _run("given", batches=(4,))
    entry = replace(comparisons.SYSTEMS["given"], needs=("numpy",))
    monkeypatch.setattr(comparisons, "SYSTEMS", {**comparisons.SYSTEMS, "given": entry})
    assert {r.system for r in _run("given", batches=(4,))} == {"cublas", "flashllm"}


def test_cublas_without_tensor_cores(blas: fake_gpu.Blas) -> None:
    rows = _run("cublas-notc", batches=(8,))
    assert {68, 69} == set(blas.computed)
    assert [(r.system, r.sparsity) for r in rows if "cublas" in r.system] == [
        ("cublas", 0.7), ("cublas-notc", 0.7), ("cublas", 0.9),
    ]  # fmt: skip
    without = next(r for r in rows if r.system == "cublas-notc")
    assert without.kernel.startswith("GemmEx pedantic")
    assert (without.format, without.check) == ("dense", "pass")


def test_the_fastest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(weights: Sequence[Any], x: Any, stream: Any) -> list[Way]:
        y = np.zeros((x.shape[0], 96), np.float16)
        make = lambda label: Way(  # noqa: E731
            label=label, deterministic=None, copies=2, launch=lambda *_: None, buffer=lambda: y, output=lambda: y
        )
        return [make("slow"), make("fast"), make("slower")]

    times = {"slow": 3.0, "fast": 2.0, "slower": 4.0}
    monkeypatch.setattr(Given, "ways", ways)
    monkeypatch.setattr(systems, "glance", lambda way, stream: times.get(getattr(way, "label", ""), 1.0))
    rows = _run("given", batches=(8,), sparsities=(0.7,))
    assert next(r for r in rows if r.system == "given").kernel == "fast"


def test_memory_counts_the_systems() -> None:
    settings = Settings(compared=("given", "pruned"))
    group = Group(**{**GROUP.__dict__, "m": 49152, "k": 12288})
    plain = required_bytes(group, RandomSource(), Settings(), 1000)
    # Sparsities come one after the other, each system's weights at least twice.
    one = required_bytes(Group(**{**group.__dict__, "sparsities": (0.7,)}), RandomSource(), Settings(), 1000)
    assert one < plain
    assert required_bytes(group, RandomSource(), settings, 1000) >= one + 2 * 2 * 2 * group.m * group.k


def test_only_fp16() -> None:
    comparisons.check_group(GROUP, ())
    with pytest.raises(ArgumentError, match="systems: expected fp16"):
        comparisons.check_group(Group(m=8, k=8, sparsities=(0.5,), batches=(1,), dtype="bf16"), ("given",))


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert parse_systems(" sputnik , cusparse,sputnik") == ("cusparse", "sputnik")
    with pytest.raises(ArgumentError, match=r"systems: expected all, or some of cublas-notc, .*'spudnik'"):
        parse_systems("spudnik")
    with pytest.raises(ArgumentError, match="at least one"):
        parse_systems(" , ")
    monkeypatch.setattr(baselines, "_is_installed", lambda package: False)
    assert parse_systems("all") == tuple(n for n, entry in baselines.SYSTEMS.items() if not entry.needs)
    monkeypatch.setattr(baselines, "_is_installed", lambda package: True)
    assert parse_systems("all") == tuple(baselines.SYSTEMS)
