# SPDX-License-Identifier: Apache-2.0
"""`flashllm generate` and its Python API, from files to text, on the emulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine_cases import preload
from flashllm.cli.main import command
from flashllm.convert.run import convert
from flashllm.engine.generate import ModelFiles, generate_text, open_model
from flashllm.engine.runtime import HostRuntime
from flashllm.engine.sampling import SamplingOptions
from flashllm.errors import ArgumentError
from model_cases import write_checkpoint, write_tokenizer

PROMPTS = ("the cat", "a", "that is it")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashllm.device.gpu_problem", lambda: "the driver reports no GPU")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    preload()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, dense and packed, and one without."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("models")
    made = write_checkpoint(root / "dense", "llama", tied=False, zeros=0.7, num_hidden_layers=1, head_dim=8)
    write_tokenizer(made)
    convert(made, root / "packed", format="bitmap")
    write_checkpoint(root / "silent", "llama", tied=False, num_hidden_layers=1, head_dim=8)
    return root


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, ["generate", *(str(argument) for argument in arguments)])


def fine(*arguments: Any) -> str:
    result = run(*arguments, "--backend", "reference")
    assert result.exit_code == 0, result.output
    return result.stdout


def sequences(*arguments: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(fine(*arguments, "--json"))["sequences"]
    return found


def test_one_prompt_and_several(models: Path, tmp_path: Path) -> None:
    options = ("--max-new-tokens", 3, "--no-stop")
    file = tmp_path / "prompts"
    file.write_text("\n".join(["", *PROMPTS[1:], ""]))
    together = sequences(models / "packed", "--prompt", PROMPTS[0], "--prompts", file, *options)
    texts = [one["text"] for one in together]
    assert all(len(one["tokens"]) == 3 and not one["stopped"] for one in together)
    assert [one["prompt_tokens"][0] for one in together] == [1, 1, 1]
    result = run(models / "dense", "--prompt", PROMPTS[0], *options)
    assert (result.exit_code, result.stdout) == (0, texts[0] + "\n")
    assert "kernels emulated on this CPU (the driver reports no GPU), which is slow" in result.stderr
    assert "7 tokens read, first new one after" in " ".join(result.stderr.split())
    several = fine(models / "packed", *(word for one in PROMPTS for word in ("--prompt", one)), *options)
    assert several == "\n".join(f"== {i + 1}: {PROMPTS[i]} ==\n{texts[i]}\n" for i in range(3))
    assert fine(models / "packed", "--dense", "--prompt", PROMPTS[0], *options) == texts[0] + "\n"


def test_numbers_of_tokens_need_no_tokenizer(models: Path) -> None:
    options = ("--raw-tokens", "--max-new-tokens", 3, "--no-stop")
    both = sequences(models / "silent", "--prompt", "5 6,7", "--prompt", 8, *options)
    assert [one["prompt_tokens"] for one in both] == [[5, 6, 7], [8]]
    assert [one["text"] for one in both] == ["", ""]
    assert fine(models / "silent", "--prompt", "5 6 7", *options).split() == [str(t) for t in both[0]["tokens"]]
    lines = fine(models / "silent", "--prompt", "5 6 7", "--prompt", "8", *options).splitlines()
    assert lines[1::3] == [" ".join(map(str, one["tokens"])) for one in both]


def test_seeds_of_prompts_follow_one_another(models: Path) -> None:
    options = ("--temperature", 2, "--max-new-tokens", 3, "--no-stop")
    same = sequences(models / "dense", *("--prompt", "the cat") * 3, "--seed", 5, *options)
    (third,) = sequences(models / "dense", "--prompt", "the cat", "--seed", 7, *options)
    assert third["tokens"] == same[2]["tokens"]
    assert len({tuple(one["tokens"]) for one in same}) > 1


def test_a_stop_token_ends_a_text_and_is_none_of_it(models: Path) -> None:
    (whole,) = sequences(models / "dense", "--prompt", "a", "--max-new-tokens", 4, "--no-stop")
    place = models / "dense" / "generation_config.json"
    end = next(i for i in range(1, 4) if whole["tokens"][i] not in whole["tokens"][:i])
    place.write_text(json.dumps({"eos_token_id": [whole["tokens"][end]]}))
    try:
        (stopped,) = sequences(models / "dense", "--prompt", "a", "--max-new-tokens", 4)
        (longer,) = sequences(models / "dense", "--prompt", "a", "--max-new-tokens", 4, "--no-stop")
    finally:
        place.unlink()
    assert (stopped["tokens"], stopped["stopped"]) == (whole["tokens"][: end + 1], True)
    with ModelFiles(models / "dense") as files:
        assert files.text.tokenizer is not None
        assert stopped["text"] == files.text.tokenizer.decode(whole["tokens"][:end])
    assert longer == whole


def test_from_python(models: Path) -> None:
    model = open_model(models / "packed", runtime=HostRuntime("reference"))
    options = SamplingOptions(max_new_tokens=2)
    generation = generate_text(model, ["the cat", np.array([5, 6])], options, stop_tokens=())
    with pytest.raises(ArgumentError, match=r"^generation: expected one that has been iterated over"):
        _ = generation.report
    pieces = list(generation)
    for index in range(2):
        own = [piece for piece in pieces if piece.sequence == index]
        assert [piece.token for piece in own if piece.token is not None] == generation.tokens[index]
        assert "".join(piece.text for piece in own) == generation.texts[index]
    with pytest.raises(ArgumentError, match=r"^generation: expected one iteration, got a second one"):
        next(iter(generation))
    report = generation.report
    assert (report.prompt_tokens, report.new_tokens) == ((7, 2), (2, 2))
    assert len(report.step_seconds) == 1
    assert np.isfinite(report.tokens_per_second)
    with pytest.raises(ArgumentError, match=r"^options: expected 2, one for each prompt, got 1"):
        generate_text(model, ["a", "b"], [options])
    with pytest.raises(ArgumentError, match=r"^batch: "):
        generate_text(model, [], options)
    with pytest.raises(ArgumentError, match=r"^prompts: expected a sequence of texts or of tokens, got 'the cat'"):
        generate_text(model, "the cat", options)
    with pytest.raises(ArgumentError, match=r"^prompts\[1\]: expected a sequence of tokens, got 5"):
        generate_text(model, ["a", 5], options)  # type: ignore[list-item]
