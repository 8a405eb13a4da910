# SPDX-License-Identifier: Apache-2.0
"""Which systems a decoding sweep opens and what it leaves out, tested with systems that decode nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from flashllm.bench import decode, decode_rows
from flashllm.bench.decode import Case, Sizes, Times
from flashllm.bench.decode_hf import HfSystem
from flashllm.bench.decode_memory import MemoryPlan, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_session import Sweep
from flashllm.bench.decode_systems import LeftOut, Subject, System
from flashllm.bench.decode_torch import prefill_rows
from flashllm.bench.decode_torch_system import TorchSystem, leaving_out, torch_plan
from flashllm.bench.decode_weights import DENSE, PARTS
from flashllm.bench.environment import Environment
from flashllm.cli.decode_bench import _line
from flashllm.cli.main import command
from flashllm.engine.parallel import alone
from flashllm.engine.shard import WHOLE
from flashllm.errors import ArgumentError, MissingDependencyError
from flashllm.models.known import known_config
from flashllm.progress import Advance

GIB = 1 << 30
SUBJECT = Subject(
    facts=Environment(run_id="a", sweep_id="b", commit=None, dirty=None, command="", backend="cuda"),
    model="opt-13b",
    config=known_config("opt-13b"),
    dtype="fp16",
    read_gbps=4000.0,
)
EVERY = tuple(decode.SYSTEMS)


class Fake:
    """Takes a GiB for each sequence; cannot decode what ``fails`` names, ``load`` or a batch."""

    label = "fake"

    def __init__(self, fails: object = None) -> None:
        self.calls: list[object] = []
        self._fails = fails

    def plan(self, case: Case) -> MemoryPlan:
        return MemoryPlan(
            matrices=0, other_weights=0, making=0, cache=case.batch * GIB, activations=0, workspace=0, rests=0
        )

    def load(self, advance: Advance) -> None:
        self._call("load")
        advance("block", 40)

    def row(self, case: Case) -> Any:
        self._call(case.batch)
        return case.batch

    def close(self) -> None:
        self.calls.append("close")

    def _call(self, what: object) -> None:
        self.calls.append(what)
        if what == self._fails:
            raise LeftOut("no kernel")


def sweep(**changes: Any) -> Sweep:
    made = Sweep(model="opt-13b", sparsities=[0.7, 0.8], systems=EVERY, batches=[1, 2, 3], prompt=64, output=32)
    return replace(made, **changes)


def a_row(**changes: Any) -> DecodeRow:
    return decode.fill_row(
        SUBJECT.facts,
        Case(batch=2, prompt=64, output=32),
        Sizes(matrices=3_000_000_000, head=1_000_000_000, weights=5_000_000_000, cache=7, workspace=9),
        model="opt-13b",
        config=SUBJECT.config,
        dtype="fp16",
        shard=WHOLE,
        system="torch-compile",
        format=DENSE,
        choice="forced",
        sparsity=0.0,
        sparsity_real=0.0,
        kernels="torch",
        launch="graph",
        times=Times(total=70.0, first=8.0),
        read_gbps=1000.0,
        peak_bytes=6_000_000_000,
        **changes,
    )


@pytest.fixture
def _two_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.free_memory", lambda: 2 * GIB)


@pytest.mark.usefixtures("_two_gib")
@pytest.mark.parametrize(
    ("batches", "fails", "rows", "calls", "notes"),
    [
        ([1, 2], None, [1, 2], ["load", 1, 2, "close"], []),
        ([1, 2, 3], None, [1, 2], ["load", 1, 2, "close"], ["opt-13b, fake, batch 3: matrices 0.00"]),
        ([3], None, [], [], ["opt-13b, fake, batch 3: matrices 0.00"]),
        ([1, 2], 1, [2], ["load", 1, 2, "close"], ["opt-13b, fake, batch 1: no kernel"]),
        ([1, 2], "load", [], ["load", "close"], ["opt-13b, fake: no kernel"]),
    ],
)
def test_what_does_not_run_is_left_out_with_the_reason(
    batches: list[int], fails: object, rows: list[int], calls: list[object], notes: list[str]
) -> None:
    fake, said = Fake(fails), list[str]()
    system: System = fake
    found: Iterator[Any] = sweep(batches=batches)._measure(system, lambda title, done: None, said.append)
    assert list(found) == rows
    assert fake.calls == calls
    assert len(said) == len(notes)
    for text, wanted in zip(said, notes, strict=True):
        assert text.startswith(f"left out: {wanted}")


@pytest.mark.usefixtures("_two_gib")
def test_a_system_is_closed_when_nobody_wants_more_rows() -> None:
    fake = Fake()
    rows = sweep()._measure(fake, lambda title, done: None, lambda text: None)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert fake.calls == ["load", 1, "close"]


def test_variants_are_sparse_ones_by_sparsity_and_one_of_each_other_system() -> None:
    wanted = [("sparse", 0.7), ("sparse", 0.8), ("dense", 0.0), ("torch-compile", 0.0), ("hf-static", 0.0)]
    assert sweep().variants == [*wanted, ("torch-2:4", 0.0)]
    assert sweep(systems=("torch-2:4", "sparse"), sparsities=[0.8]).variants == [("sparse", 0.8), ("torch-2:4", 0.0)]


@pytest.mark.parametrize("name", ["torch-compile", "hf-static", "torch-2:4"])
def test_others_need_one_gpu_and_their_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="systems: expected sparse or dense, on several GPUs, got"):
        sweep(group=replace(alone(), count=2))._open(name, 0.0, SUBJECT)
    with pytest.raises(ArgumentError, match="systems: expected sparse or dense, without a GPU, got"):
        next(sweep(systems=["dense", name], backend="reference").rows())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "flashllm\[finetune\]"'):
        sweep()._open(name, 0.0, SUBJECT)


def test_command_knows_all_systems() -> None:
    given = ["decode-bench", "--backend", "reference", "--systems"]
    done = CliRunner().invoke(command, [*given, ",".join(EVERY)])
    assert done.exit_code == 2
    assert "systems: expected sparse or dense, without a GPU, got torch-compile" in " ".join(done.output.split())
    done = CliRunner().invoke(command, [*given, "torch"])
    assert "--systems: expected some of sparse, dense, torch-compile, hf-static, torch-2:4" in done.output


@pytest.mark.parametrize("name", ["opt-66b", "llama-3.1-8b"])
def test_plans_of_pytorch_are_dense_ones_with_more_room(name: str) -> None:
    config, case = known_config(name), Case(batch=8, prompt=100, output=250)
    plan = torch_plan(config, case, rows=prefill_rows(case.batch, case.prompt))
    ours = plan_memory(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, batch=8, prompt=100, output=250, shard=WHOLE)
    assert (plan.matrices, plan.other_weights) == (ours.matrices, ours.other_weights)
    assert plan.cache == ours.cache // 350 * 352
    assert plan.activations == 2 * ours.activations
    long = Case(batch=8, prompt=1600, output=16)
    short, whole = (torch_plan(config, long, rows=rows) for rows in (prefill_rows(8, 1600), 8 * 1600))
    assert whole.activations > 6 * short.activations


def test_pruned_matrices_take_nine_sixteenths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.bench.decode_torch_system.torch_on_gpu", lambda: None)
    case = Case(batch=8)
    dense, pruned = (TorchSystem(SUBJECT, pruned=pruned).plan(case) for pruned in (False, True))
    assert pruned.matrices * 16 == dense.matrices * 9
    assert pruned.making == 2 * dense.matrices // SUBJECT.config.layers
    monkeypatch.setattr("flashllm.bench.decode_hf.torch_on_gpu", lambda: None)
    monkeypatch.setattr("flashllm.bench.decode_hf.import_transformers", lambda: None)
    assert HfSystem(SUBJECT).plan(case) == dense


def test_pruned_matrices_are_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.bench.decode_torch_system.torch_on_gpu", lambda: None)
    monkeypatch.setattr("flashllm.device.free_memory", lambda: GIB)
    with pytest.raises(LeftOut, match="2:4 matrices are made of fp16 alone"):
        TorchSystem(replace(SUBJECT, dtype="bf16"), pruned=True).load(lambda title, done: None)


def test_rows_of_others_have_no_parts_of_a_step(tmp_path: Any) -> None:
    row = a_row()
    assert (row.seconds, row.ttft_ms, row.tpot_ms, row.tokens_per_s) == (0.07, 8.0, 2.0, 914.29)
    cached = 2 * (64 + 16 + 1) * 40 * 2 * 5120 * 2
    assert row.bound_ms == round((4e9 + cached) / 1e9, 4)
    parts = (row.step_ms, row.linear_ms, row.attention_ms, row.comm_ms, row.other_ms, row.bound_fraction, row.launches)
    assert parts == (None,) * 7
    assert _line(row) == (
        "opt-13b, torch-compile, batch 2: 5.0 GB of weights, 0.0 GB cache, 6.0 GB in all; 914 tokens/GPU-s, TTFT 8 ms, "
        "TPOT 2.00 ms"
    )
    decode_rows.append(tmp_path / "a.jsonl", row)
    assert decode_rows.read(tmp_path / "a.jsonl") == [row]


def test_errors_of_pytorch_say_their_first_line() -> None:
    with pytest.raises(LeftOut, match=r"^NotImplementedError: no such kernel$"), leaving_out():
        raise NotImplementedError("\n  no such kernel\nbacktrace")
    with pytest.raises(LeftOut, match=r"^RuntimeError: no more is said$"), leaving_out():
        raise RuntimeError
    with pytest.raises(KeyError), leaving_out():
        raise KeyError("a fault of ours")
