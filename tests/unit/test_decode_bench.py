# SPDX-License-Identifier: Apache-2.0
"""Decoding benchmark: its memory plan, its random weights, its rows, and the command, on a tiny model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from experiments.figures import decode as figure
from experiments.figures import fit
from flashllm import graphs
from flashllm.bench import decode, decode_rows
from flashllm.bench.decode import Case
from flashllm.bench.decode_memory import check_memory, plan_memory
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_session import Sweep
from flashllm.bench.decode_weights import DENSE, PARTS, random_weights, stored_share
from flashllm.bench.models import MODELS
from flashllm.bench.rows import Row
from flashllm.cli.main import command
from flashllm.engine.forward import Activations, Residual
from flashllm.engine.parallel import alone
from flashllm.engine.shard import WHOLE, Shard
from flashllm.errors import ArgumentError, DeviceMemoryError, FormatError
from flashllm.formats.weight import SparseWeight
from flashllm.models import known
from flashllm.models.known import CONFIGS, known_config

ROOT = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"vocab_size": 90, "max_position_embeddings": 40}
    monkeypatch.setitem(known.CONFIGS, "tiny-opt", {**CONFIGS["opt-13b"], **sizes, "num_hidden_layers": 2,
        "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32})  # fmt: skip
    monkeypatch.setitem(known.CONFIGS, "tiny-llama", {**CONFIGS["llama-2-7b"], **sizes, "num_hidden_layers": 1,
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48})  # fmt: skip


def a_row(**changes: Any) -> DecodeRow:
    file = sorted((ROOT / "results" / "decode").glob("*-h200-opt-30b.jsonl"))[0]
    return replace(decode_rows.read(file)[0], **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_those_of_the_kernel_benchmark(name: str) -> None:
    config, model = known_config(name), MODELS[name]
    assert config.layers == model.blocks
    assert [WHOLE.shape(config, part) for part in PARTS] == [(layer.m, layer.k) for layer in model.layers]


def test_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="model: expected one of opt-13b"):
        known_config("gpt-5")


@pytest.mark.parametrize("name", ["opt-66b", "llama-3.1-70b"])
def test_plan_is_what_is_counted_by_hand(name: str) -> None:
    """For dense weights: all tensors that a checkpoint has, and the cache."""
    from flashllm.models.config import bias_shapes, tensor_shapes

    config = known_config(name)
    plan = plan_memory(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, batch=8, prompt=64, output=512, shard=WHOLE)
    shapes = tensor_shapes(config)
    assert not set(shapes) & set(bias_shapes(config))
    tensors = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert plan.matrices == 2 * config.layers * sum(m * k for m, k in (WHOLE.shape(config, part) for part in PARTS))
    assert tensors <= plan.matrices + plan.other_weights < 1.001 * tensors
    assert plan.cache == 2 * 2 * 8 * 576 * config.layers * config.kv_heads * config.head_dim
    assert plan.needed >= plan.matrices + plan.other_weights + plan.cache + plan.activations + plan.workspace


@pytest.mark.parametrize("file", sorted((ROOT / "results" / "decode").glob("*.jsonl")), ids=lambda file: file.stem)
def test_plan_covers_what_was_measured(file: Path) -> None:
    for row in decode_rows.read(file):
        if row.system not in map(decode.SYSTEMS.get, decode.OURS) or row.peak_gb is None:
            continue
        config = known_config(row.model)
        formats = dict.fromkeys(PARTS, row.format)
        plan = plan_memory(config, formats, sparsity=row.sparsity, batch=row.batch, prompt=row.prompt,
            output=row.output, shard=Shard(count=row.tp))  # fmt: skip
        assert 0.98 * row.peak_gb < plan.needed / 1e9 < 1.06 * row.peak_gb + 0.5, (row.model, row.batch, row.format)


def test_what_does_not_fit_is_refused_with_the_sum() -> None:
    config = known_config("opt-66b")
    plan = plan_memory(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, batch=8, prompt=64, output=512, shard=WHOLE)
    check_memory(plan, plan.needed, "opt-66b")
    with pytest.raises(DeviceMemoryError, match=r"opt-66b: matrices 130\.46 \+ other weights 0\.98 \+ keys and values"):
        check_memory(plan, plan.needed - 1, "opt-66b")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("shard", [WHOLE, Shard(index=1, count=2)], ids=["whole", "half"])
@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_random_weights_have_the_shapes_and_zeros_asked_for(name: str, shard: Shard) -> None:
    config = known_config(name)
    formats = {**dict.fromkeys(PARTS, "bitmap"), "out": DENSE}
    weights = random_weights(config, formats, sparsity=0.75, xp=np, dtype="bf16", shard=shard)
    for block in weights.blocks:
        for part, w in zip(PARTS, block.matrices, strict=True):
            assert w.shape == shard.shape(config, part)
            dense = w.to_dense() if isinstance(w, SparseWeight) else w
            assert isinstance(w, SparseWeight) == (part != "out")
            assert abs(np.count_nonzero(dense.view(np.uint16)) / dense.size - 0.25) < 0.06
    assert abs(stored_share(weights) - 0.25) < 0.04
    plan = plan_memory(config, formats, sparsity=0.75, batch=2, prompt=3, output=1, shard=shard)
    keys_and_values = 2 * 6 * 2 * shard.kv_heads(config) * config.head_dim  # which are planned twice
    own = Activations(np, weights, 6).nbytes + Residual(np, weights, 2).nbytes
    assert plan.activations == own + keys_and_values + 4 * 2 * config.vocab
    assert weights.nbytes > weights.matrix_bytes > 0
    again = random_weights(config, formats, sparsity=0.75, xp=np, dtype="bf16", shard=shard)
    assert np.array_equal(again.blocks[0].qkv.to_dense(), weights.blocks[0].qkv.to_dense())
    assert not np.array_equal(weights.blocks[0].qkv.to_dense(), weights.blocks[-1].down.to_dense())


@pytest.mark.usefixtures("tiny")
def test_command_runs_on_the_emulator_and_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("flashllm.backends.emulator")
    out = tmp_path / "rows.jsonl"
    arguments = ["decode-bench", "--model", "tiny-llama", "--batch", "2", "--prompt", "3", "--output", "4", "--out",
        str(out), "--backend", "reference"]  # fmt: skip
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "80% zeros" in done.output
    assert "no times without a GPU" in done.output
    rows = decode_rows.read(out)
    assert [(row.system, row.format == DENSE, row.batch, row.seconds) for row in rows] == [
        ("flashllm", False, 2, None),
        ("flashllm-dense", True, 2, None),
    ]
    assert rows[0].matrices_gb <= rows[1].matrices_gb
    assert rows[0].launches == rows[1].launches == 1 + 9 + 3  # embedding; a block; norm, head, next token


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody"], "model: expected one of"),
        (["--sparsity", "1"], "--sparsity: expected numbers in 0.0..0.99"),
        (["--sparsity", "x"], "--sparsity: expected numbers with commas"),
        (["--batch", "0"], "--batch: expected numbers in 1..65535"),
        (["--systems", "fast"], "--systems: expected"),
        (["--format", "csr"], "--format: expected auto or one of"),
        (["--layers", "3"], "layers: expected at most 2"),
        (["--prompt", "30", "--output", "30"], "output: expected at most 40, the positions of tiny-opt, got 30 + 30"),
    ],
)
def test_bad_options_end_with_two(arguments: list[str], message: str) -> None:
    given = ["decode-bench", "--backend", "reference"]
    for option, value in (("--model", "tiny-opt"), ("--prompt", "2"), ("--output", "2")):
        given += [] if option in arguments else [option, value]
    done = CliRunner().invoke(command, [*given, *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_without_a_gpu_what_does_not_fit_this_machine_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 5_000_000}[name])
    given = ["--model", "opt-30b", "--systems", "dense", "--batch", "8,16"]
    done = CliRunner().invoke(command, ["decode-bench", "--backend", "reference", *given])
    assert done.exit_code == 2
    assert done.stderr.count("GB; this machine has 20.48 GB") == 2
    assert "all cases are left out" in done.stderr


def test_list_of_models_names_all() -> None:
    done = CliRunner().invoke(command, ["decode-bench", "--list-models"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == list(CONFIGS)


def test_rows_are_read_back_and_checked(tmp_path: Path) -> None:
    row = a_row()
    decode_rows.append(tmp_path / "a.jsonl", row)
    assert decode_rows.read(tmp_path / "a.jsonl") == [row]
    (tmp_path / "b.jsonl").write_text(json.dumps({**asdict(row), "batch": 8.5}) + "\n")
    with pytest.raises(FormatError, match=r"b\.jsonl:1: batch: expected int, got 8\.5"):
        decode_rows.read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text(json.dumps({**asdict(row), "kind": "kernel"}) + "\n")
    with pytest.raises(FormatError, match="kind e2e"):
        decode_rows.read(tmp_path / "c.jsonl")


def test_a_step_and_its_kinds_are_timed_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay begins in the middle of the output, and the first round does not count. A part is the mean of the
    time that its launches take alone and the time that they add to the step; for a kind without launches it is 0.
    """
    state = SimpleNamespace(**{name: np.zeros(3, np.int32) for name in ("positions", "counts", "finished")})
    step = {"p": "linear", "n": "other", "q": "linear"}
    engine: Any = SimpleNamespace(
        state=state,
        runtime=SimpleNamespace(stream="stream", active=nullcontext),
        decode_operations=lambda kinds: [launch for launch, kind in step.items() if kind in kinds],
    )
    taken = {"pnq": 10e3, "pq": 6e3, "n": 2e3}
    replayed: list[str] = []

    def replay_us(graph: str, stream: str, launches: int) -> float:
        assert (stream, launches) == ("stream", 1)
        assert [set(array) for array in vars(state).values()] == [{12 + 5}, {5}, {0}]
        for array in vars(state).values():
            array += 1
        replayed.append(graph)
        return 1e6 if len(replayed) <= len(taken) else taken[graph]

    monkeypatch.setattr(graphs, "capture", lambda launches, stream: "".join(launches.args[0]))
    monkeypatch.setattr(graphs, "replay_us", replay_us)
    case = Case(batch=3, prompt=12, output=10)
    parts = {"linear": 7.0, "attention": 0.0, "communication": 0.0, "other": 3.0}
    assert decode._replayed_ms(engine, case) == (10.0, parts)
    assert replayed[:6] == ["pnq", "pq", "n"] * 2


def test_committed_rows_say_what_the_design_asks_of_them() -> None:
    for file in (ROOT / "results" / "decode").glob("*.jsonl"):
        for row in decode_rows.read(file):
            assert row.commit is not None
            assert row.dirty is False
            assert row.layers == known_config(row.model).layers
            if row.linear_ms is None:
                continue
            assert row.attention_ms
            assert row.other_ms is not None
            assert row.comm_ms is not None
            assert row.step_ms
            parts = row.linear_ms + row.attention_ms + row.other_ms + row.comm_ms
            assert abs(parts / row.step_ms - 1) < 0.05, (file.name, row.batch, parts, row.step_ms)
            assert row.tokens_per_s
            assert row.seconds
            assert row.tokens_per_gpu_s
            assert row.tokens_per_s == pytest.approx(row.batch * row.output / row.seconds, rel=1e-3)
            assert row.tokens_per_gpu_s == pytest.approx(row.tokens_per_s / row.gpus, rel=1e-4)


def test_results_say_what_their_keys_are() -> None:
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    own = {one.name for one in fields(DecodeRow)} - {one.name for one in fields(Row)}
    assert {"linear_ms", "attention_ms", "comm_ms", "other_ms"} < own
    assert [name for name in sorted(own) if f"`{name}`" not in text] == []


@pytest.mark.usefixtures("tiny")
def test_bound_counts_what_must_be_read() -> None:
    config = known_config("tiny-llama")
    weights = random_weights(config, dict.fromkeys(PARTS, DENSE), sparsity=0.0, xp=np)
    case = Case(batch=2, prompt=4, output=8)
    cached = 2 * (4 + 4 + 1) * 2 * config.kv_heads * config.head_dim * 2 * config.layers
    expected = (weights.matrix_bytes + 2 * config.vocab * config.hidden + cached) / 1000 * 1e-6
    assert decode.bound_ms(weights, case, 1000.0) == pytest.approx(expected)


@pytest.mark.usefixtures("tiny")
def test_sweep_refuses_a_shard_that_heads_cannot_be_divided_into() -> None:
    sweep = Sweep(model="tiny-llama", sparsities=[0.8], systems=["sparse"], batches=[1], prompt=2, output=2,
        backend="reference", group=replace(alone(), count=4))  # fmt: skip
    with pytest.raises(ArgumentError, match="KV heads"):
        list(sweep.rows())


def test_figure_takes_newest_clean_rows_and_their_dense_of_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    for name in ("published_figures.json",):
        (tmp_path / "reference" / name).write_text((ROOT / "reference" / name).read_text())
    folder = tmp_path / "results" / "decode"
    folder.mkdir(parents=True)
    sparse = a_row(
        model="opt-66b", layers=64, system="flashllm", sparsity=0.8, batch=8, run_id="a", tokens_per_gpu_s=300.0
    )
    dense = replace(sparse, system="flashllm-dense", sparsity=0.0, tokens_per_gpu_s=100.0)
    for name, rows in {
        "1.jsonl": [replace(sparse, tokens_per_gpu_s=1.0), replace(dense, run_id="b", batch=16)],
        "2.jsonl": [sparse, dense, replace(sparse, batch=16)],
        "3.jsonl": [replace(sparse, dirty=True), replace(sparse, output=7), replace(sparse, model="opt-13b")],
    }.items():
        for row in rows:
            decode_rows.append(folder / name, row)
    text = figure.table(figure.load(tmp_path))
    lines = [line for line in text.splitlines() if line.startswith("| opt-66b")]
    ratios = {(cells[2].split(",")[0], cells[3]): (cells[4], cells[5]) for cells in map(_cells, lines)}
    assert ratios == {
        ("80% zeros", "8"): ("300", "3.00"),
        ("80% zeros", "16"): ("300", ""),
        ("dense", "8"): ("100", "1.00"),
        ("dense", "16"): ("100", "1.00"),
    }


@pytest.mark.parametrize("gpus", [("NVIDIA H200",), ("NVIDIA H200", "NVIDIA H100 80GB HBM3")], ids=["one", "two"])
def test_systems_of_others_can_be_told_apart(gpus: tuple[str, ...]) -> None:
    """Each line of a panel has its own look and name, and none runs through the legend."""
    pytest.importorskip("matplotlib")
    systems = [(system, 0.8 if system == "flashllm" else 0.0) for system in decode.SYSTEMS.values()]
    rows = tuple(
        a_row(
            model="opt-66b",
            layers=64,
            gpu=gpu,
            system=system,
            sparsity=zeros,
            batch=batch,
            tokens_per_gpu_s=9.0 * batch,
        )
        for gpu in gpus
        for system, zeros in systems
        for batch in (8, 64)
    )
    published = figure.load(ROOT).published
    axes = figure.plot(figure.Decoded(rows=rows, dense={}, published=published))["decode-throughput"].axes[1]
    looks = {(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == len(gpus) * len(systems)
    assert len({line.get_color() for line in axes.lines}) == len(systems)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(set(texts)) == len(texts) == len(systems) + len(gpus)
    axes.figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert all(legend.y0 > axes.transData.transform(line.get_xydata())[:, 1].max() for line in axes.lines)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def test_fewer_gpus_are_enough_for_sparse_weights() -> None:
    found = {(one.model, one.zeros): one for one in fit.load(ROOT)}
    assert found["opt-66b", 0.0].needed["H100 80GB"] == 2
    assert found["opt-66b", 0.8].needed["H100 80GB"] == 1
    assert found["opt-175b", 0.8].needed["H200"] == 1
    assert found["opt-175b", 0.0].needed["H200"] == 3
    for one in found.values():
        assert all(one.batch[gpu] is None for gpu, count in one.needed.items() if count is None)


@pytest.mark.parametrize(("name", "module"), [("decode", figure), ("fit", fit)])
def test_document_has_the_tables_of_the_figures(name: str, module: Any) -> None:
    text = (ROOT.parent / "docs" / "end_to_end.md").read_text(encoding="utf-8")
    shown = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    lines = module.table(module.load(ROOT)).splitlines()
    assert shown == "".join(f"{line}\n" for line in lines if line.startswith("|"))
