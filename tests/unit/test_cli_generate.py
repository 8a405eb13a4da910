# SPDX-License-Identifier: Apache-2.0
"""`flashllm generate`: what is read besides weights, and what is refused before any weight is read."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from flashllm.cli.main import command
from flashllm.convert.run import convert
from flashllm.engine import generate
from flashllm.engine.generate import Generation, LoadedModel, ModelFiles, ModelText, Report
from flashllm.engine.parallel import Group
from flashllm.engine.rendezvous import Place, Rendezvous
from flashllm.engine.sampling import SamplingOptions
from flashllm.errors import FormatError, MissingDependencyError
from model_cases import VOCAB, write_checkpoint, write_tokenizer


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture
def tokens_only(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1, head_dim=8)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, ["generate", *(str(argument) for argument in arguments)])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
    return line


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        (2, None, (2,)),
        (2, {}, (2,)),
        (2, {"eos_token_id": 5}, (5,)),
        (2, {"eos_token_id": [7, 5, 7]}, (7, 5)),
        ([3, 4], {"eos_token_id": None}, (3, 4)),
        (None, None, ()),
        ([-1, 9, VOCAB], None, (9,)),
    ],
)
def test_stop_tokens(tmp_path: Path, config: Any, generation: Any, stops: tuple[int, ...]) -> None:
    path = write_checkpoint(tmp_path / "m", "opt", eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    convert(path, tmp_path / "s", format="dense")
    for folder in (path, tmp_path / "s"):
        with ModelFiles(folder) as files:
            assert files.text.stop_tokens == stops


@pytest.mark.parametrize("value", ["</s>", [2, None], True, 2.0])
def test_stop_tokens_that_are_none(tmp_path: Path, value: Any) -> None:
    path = write_checkpoint(tmp_path / "m", "opt")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id: expected a token, or a list of"):
        ModelFiles(path)


def test_stop_token_of_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import gguf_models

    tensors, _ = gguf_models.model()
    with ModelFiles(gguf_models.write(tmp_path / "m.gguf", tensors)) as files:
        assert files.text.stop_tokens == (2,)
        assert files.config.vocab == gguf_models.VOCAB


def test_why_there_is_no_tokenizer(tokens_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelFiles(tokens_only) as files:
        assert files.text.tokenizer is None
        with pytest.raises(FormatError, match=r"tokenizer\.json: expected a file beside the weights, got none"):
            files.text.encode("a")

    def absent(_: Any) -> None:
        raise MissingDependencyError("the package tokenizers is not installed")

    monkeypatch.setattr(generate, "load_tokenizer", absent)
    with ModelFiles(tokens_only) as files, pytest.raises(MissingDependencyError, match="tokenizers is not installed"):
        files.text.encode("a")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_checkpoint(tmp_path / "m", "llama", vocab_size=90)
    write_tokenizer(path)
    with ModelFiles(path) as files:
        assert files.text.encode("a")[0] == 1
        with pytest.raises(FormatError, match=r"^tokenizer: expected one with the model's vocabulary of 90, got token"):
            files.text.encode("~")


class Words:
    """A tokenizer whose tokens are words with a leading space, except for the first word of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)


class Steps:
    """An engine that has chosen its tokens."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """For any model."""

    def stream(self, *_: Any) -> Iterator[list[tuple[int, int]]]:
        yield [(0, 5), (1, 6)]
        yield [(0, 2)]
        yield [(1, 7)]


def test_text_goes_on_where_the_prompt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "Engine", Steps)
    text = ModelText(vocab=9, stop_tokens=(), tokenizer=cast("Any", Words()))
    model = LoadedModel(weights=cast("Any", None), runtime=cast("Any", None), text=text)
    generation = Generation(model, [[3], [4] * 20], [SamplingOptions()] * 2, stop_tokens=(2, 7), communicator=None)
    pieces = [(piece.sequence, piece.token, piece.text) for piece in generation]
    assert pieces == [(0, 5, " w5"), (1, 6, " w6"), (0, 2, ""), (1, 7, "")]
    assert generation.texts == [" w5", " w6"]
    assert generation.stopped(0)
    assert generation.report.new_tokens == (2, 2)
    assert len(generation.report.step_seconds) == 2


def test_times_of_a_batch() -> None:
    counts = {"prompt_tokens": (3, 4), "new_tokens": (4, 2)}
    report = Report(**counts, first_token_seconds=2.0, step_seconds=(1.0, 0.25, 0.75))
    assert (report.token_seconds, report.seconds, report.tokens_per_second) == (0.5, 4.0, 1.5)
    assert Report(**counts, first_token_seconds=2.0, step_seconds=(1.0,)).token_seconds is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--prompt: expected at least one, or some in the file of --prompts, got none"),
        (("--prompt", "a", "--temperature", "-1"), "temperature: expected a finite number >= 0, got -1.0"),
        (("--prompt", "a", "--top-p", "0"), "top_p: expected a number above 0 and up to 1, got 0.0"),
        (("--prompt", "3 x", "--raw-tokens"), "--prompt: expected numbers of tokens with --raw-tokens, got '3 x'"),
        (("--prompt", "3", "--prompt", "3 101", "--raw-tokens"), "prompts[1]: expected tokens in 0..100, got 101"),
        (("--prompt", "", "--raw-tokens"), "prompts[0]: expected at least one token, got none"),
        (
            ("--prompt", "3 4", "--raw-tokens", "--max-new-tokens", "319"),
            "prompts[0]: expected at most 320 tokens, prompt and output together, got 2 + 319",
        ),
        (("--prompt", "a"), "tokenizer.json: expected a file beside the weights, got none"),
        (("--prompt", "3", "--raw-tokens", "--backend", "cuda"), "the driver reports no GPU"),
    ],
)
def test_refused_before_weights_are_read(
    tokens_only: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(generate, "load", read)
    assert message in refused(tokens_only, *options)


class Second:
    """What rank 1 of 2 receives from rank 0."""

    def __init__(self, *told: Any) -> None:
        self.told, self.facts = list(told), dict[str, Any]()

    def broadcast(self, value: Any, *, seconds: float | None, name: str) -> Any:
        assert (value, name) == (None, "--prompts")
        return self.told.pop(0)

    def agree(self, facts: dict[str, Any], *, called: dict[str, str]) -> None:
        self.facts, self.called = facts, called


def test_all_ranks_compute_what_rank_0_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts, options and stop tokens: the other ranks need not have the prompt file."""
    path = write_checkpoint(tmp_path / "m", "llama", head_dim=8, intermediate_size=54, eos_token_id=5)
    options = SamplingOptions(temperature=0.5, seed=3, max_new_tokens=4)
    rendezvous: Any = Second((["6 7"], [asdict(options)]), ([[6, 7]], [9]))
    group = Group(rank=1, count=2, communicator=None, rendezvous=rendezvous)
    monkeypatch.setattr("flashllm.cli.generate.tensor_parallel", lambda _: contextlib.nullcontext(group))
    monkeypatch.setattr("flashllm.backends.select", lambda _: SimpleNamespace(name="cuda"))
    monkeypatch.setattr("flashllm.engine.runtime.open_runtime", lambda _: None)
    monkeypatch.setattr(ModelFiles, "load", lambda *_, **__: None)
    asked: list[Any] = []

    def generated(_: Any, *arguments: Any, stop_tokens: Any, communicator: Any) -> None:
        asked.extend((*arguments, stop_tokens))
        raise SystemExit(7)

    monkeypatch.setattr(generate, "generate_text", generated)
    assert run(path, "--prompts", tmp_path / "nothing", "--seed", 8, "--dtype", "fp16").exit_code == 7
    assert asked == [[[6, 7]], [options], [9]]
    with ModelFiles(path) as files:
        assert rendezvous.facts == {"model": files.fingerprint, "--dtype": "fp16", "--dense": False}
    assert rendezvous.called == {"model": f"another checkpoint at {path}"}


def test_prompts_that_are_too_long_for_other_ranks(tokens_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.engine.rendezvous._LARGEST", 300)
    file = tokens_only / "prompts"
    file.write_text("3 " * 100)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        group = Group(rank=0, count=2, communicator=None, rendezvous=Rendezvous(Place(count=2), {1: ours}))
        monkeypatch.setattr("flashllm.cli.generate.tensor_parallel", lambda _: contextlib.nullcontext(group))
        message = refused(tokens_only, "--prompts", file, "--raw-tokens")
        assert message.startswith("Error: --prompts: expected at most 300 bytes, which ranks can send, got ")
        group.rendezvous.fail("the end of this test")


def test_heads_and_models_that_cannot_be(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama")
    assert "head_dim: expected a multiple of 8 up to 256, got 6" in refused(path, "--prompt", "3", "--raw-tokens")
    assert "nothing at" in refused(tmp_path / "none", "--prompt", "3", "--raw-tokens")
    convert(path, tmp_path / "s", format="bitmap")
    message = refused(tmp_path / "s", "--prompt", "3", "--raw-tokens", "--dtype", "bf16")
    assert "dtype: expected fp16, as the weights are packed, got bf16" in message
