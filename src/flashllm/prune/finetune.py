# SPDX-License-Identifier: Apache-2.0
"""Train a pruned model with its zeros fixed, so that the others make good what was lost; by PyTorch and transformers.

With a teacher, the model it was pruned from, it learns that one's distribution of the next token (Hinton et al.,
"Distilling the knowledge in a neural network", 2015, at temperature 1); without, the text. Everything is trained but
the zeros: other weights of linear layers, embeddings, norms, biases.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError
from flashllm.formats.bits import bfloat16
from flashllm.io.checkpoint import Checkpoint, open_checkpoint
from flashllm.io.files import open_regular, write_whole
from flashllm.io.safetensors_file import parse_json, replacing
from flashllm.io.tensor_writer import TensorWriter
from flashllm.models.config import ModelConfig, model_config
from flashllm.prune.run import RECORD

STATE = "finetune-state.pt"
"""In the output directory while work goes on: all that is needed to continue."""
_SHARD = "model.safetensors"
_MAX_RECORD = 1 << 24
Advance = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; all of it decides the result."""

    steps: int
    batch: int = 16
    """Windows of a step."""
    length: int = 1024
    """Tokens of a window."""
    learning_rate: float = 2e-4
    """The highest: it rises over the first ``warmup`` of the steps and falls to a tenth, as half a cosine."""
    warmup: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raise ``ArgumentError`` for what cannot be done."""
        for name, least in (("steps", 1), ("batch", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ArgumentError(name, expected=f"at least {least}", got=str(getattr(self, name)))
        if not 0 < self.learning_rate < 1:
            raise ArgumentError("learning_rate", expected="a number in (0, 1)", got=str(self.learning_rate))
        if not 0 <= self.warmup <= 1:
            raise ArgumentError("warmup", expected="a share of the steps, 0..1", got=str(self.warmup))

    @property
    def tokens(self) -> int:
        """Of the whole training."""
        return self.steps * self.batch * self.length

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, from 0 on."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def begins(self, step: int, tokens: int) -> NDArray[np.int64]:
        """Where the windows of ``step`` begin in a text of so many tokens: the same however often it is resumed."""
        return np.random.default_rng((self.seed, step)).integers(0, tokens - self.length, self.batch)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a call of :func:`finetune` has done."""

    steps: int
    """That are done of all."""
    loss: float
    """Mean over the last steps, nats per token."""
    seconds: float
    """Of this call."""
    finished: bool


def finetune(
    model: str | Path,
    out: str | Path,
    tokens: NDArray[np.integer[Any]],
    settings: Settings,
    *,
    teacher: str | Path | None = None,
    text: str | None = None,
    device: str = "cuda",
    seconds: float = math.inf,
    save_seconds: float = 300.0,
    advance: Advance = lambda title, steps: None,
) -> Trained:
    """Train the pruned checkpoint ``model``, a directory of Hugging Face, and write it to ``out``, another.

    ``tokens`` [T] is the text; ``text`` a name for it, to be recorded. ``teacher``: directory of the dense model, with
    the same tokens. After ``seconds`` it stops, as it does on Ctrl-C: what was done lies in ``out``, from time to time
    too, and the same call goes on from there. Zeros stay zeros.

    Raises ``ArgumentError``, ``FormatError``, ``MissingDependencyError`` without torch and transformers.
    """
    settings.check()
    with open_checkpoint(model) as checkpoint:
        config = model_config(checkpoint.config, path=str(model))
        if settings.length > config.positions:
            raise ArgumentError("length", expected=f"at most {config.positions}", got=str(settings.length))
        if tokens.ndim != 1 or len(tokens) <= settings.length or tokens.min() < 0 or tokens.max() >= config.vocab:
            expected = f"more than {settings.length} tokens below {config.vocab}"
            raise ArgumentError("tokens", expected=expected, got=f"shape {list(tokens.shape)}")
        work = _Work(checkpoint, config, Path(model), Path(out), tokens, settings, teacher, device)
        return work.run(text, seconds, save_seconds, advance)


class _Work:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        source: Path,
        out: Path,
        tokens: NDArray[np.integer[Any]],
        settings: Settings,
        teacher: str | Path | None,
        device: str,
    ) -> None:
        self._checkpoint, self._config, self._source, self._out = checkpoint, config, source, out
        self._settings, self._device = settings, device
        self._torch, self._transformers = _packages()
        identity = {
            "settings": asdict(settings),
            "model": source.resolve().name,
            "teacher": None if teacher is None else Path(teacher).resolve().name,
            "tokens": hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest(),
        }
        self._identity = json.dumps(identity, sort_keys=True)
        self._check_out()
        self._tokens = self._torch.from_numpy(np.ascontiguousarray(tokens, np.int64))
        self._model = self._load(source).float().train()
        self._teacher = None if teacher is None else self._load(Path(teacher)).to(self._torch.bfloat16).eval()
        if self._teacher is not None and self._teacher.config.vocab_size != config.vocab:
            expected, got = f"a model of {config.vocab} tokens", str(self._teacher.config.vocab_size)
            raise ArgumentError("teacher", expected=expected, got=got)
        self._masks = self._fix_zeros()
        self._optimizer = self._torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def run(self, text: str | None, seconds: float, save_seconds: float, advance: Advance) -> Trained:
        started = saved = time.perf_counter()
        step, losses = self._resume(), list[float]()
        advance("resumed" if step else "training", step)
        try:
            while step < self._settings.steps and time.perf_counter() - started < seconds:
                losses.append(self._step(step))
                step += 1
                advance(f"loss {losses[-1]:.3f}", 1)
                if time.perf_counter() - saved >= save_seconds:
                    self._save_state(step)
                    saved = time.perf_counter()
        except KeyboardInterrupt:
            self._save_state(step)
            raise
        finished = step >= self._settings.steps
        if finished:
            self._write(text)
        else:
            self._save_state(step)
        last = losses[-50:] or [math.nan]
        spent = time.perf_counter() - started
        return Trained(steps=step, loss=float(np.mean(last)), seconds=spent, finished=finished)

    def _step(self, step: int) -> float:
        torch, settings = self._torch, self._settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(step)
        begins = settings.begins(step, len(self._tokens))
        ids = torch.stack([self._tokens[b : b + settings.length] for b in begins.tolist()]).to(self._device)
        with torch.autocast(torch.device(self._device).type, dtype=torch.bfloat16):
            logits = self._model(input_ids=ids).logits
            wanted = None
            if self._teacher is not None:
                with torch.no_grad():
                    wanted = self._teacher(input_ids=ids).logits
        loss = self._loss(logits, ids, wanted)
        if not bool(torch.isfinite(loss)):
            raise ArgumentError("learning_rate", expected="one that trains", got=f"a loss of {loss.item()} at {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _loss(self, logits: Any, ids: Any, wanted: Any) -> Any:
        """Nats per token: against the teacher's distribution, or the text's next token."""
        functional = self._torch.nn.functional
        if wanted is None:
            rows = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            return functional.cross_entropy(rows, ids[:, 1:].reshape(-1))
        rows = functional.log_softmax(logits.float(), dim=-1).reshape(-1, logits.shape[-1])
        teacher = functional.log_softmax(wanted.float(), dim=-1).reshape(rows.shape)
        return functional.kl_div(rows, teacher, reduction="batchmean", log_target=True)

    def _fix_zeros(self) -> dict[str, Any]:
        """Masks of what is not zero, by name; gradients of the zeros are zero, so AdamW without decay leaves them."""
        named = dict(self._model.named_parameters())
        masks = {}
        for layer in range(self._config.layers):
            for name in self._config.layout.linears(layer):
                mask = named[name].detach() != 0
                masks[name] = mask
                named[name].register_hook(lambda gradient, mask=mask: gradient * mask)
        return masks

    def _load(self, path: Path) -> Any:
        kind = self._transformers.AutoModelForCausalLM
        return kind.from_pretrained(path, local_files_only=True).to(self._device)

    def _check_out(self) -> None:
        state = self._out / STATE
        if self._out.exists() and not state.is_file() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise ArgumentError("out", expected="a new or empty directory", got=f"{self._out}, which holds files")
        self._out.mkdir(parents=True, exist_ok=True)

    def _resume(self) -> int:
        """The number of steps that an earlier call has done."""
        path = self._out / STATE
        if not path.is_file():
            return 0
        state = self._torch.load(path, map_location=self._device, weights_only=True)
        if state["identity"] != self._identity:
            raise ArgumentError("out", expected="a new directory, or the same work begun before", got=state["identity"])
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def _save_state(self, step: int) -> None:
        state = {
            "identity": self._identity,
            "step": step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with replacing(self._out / STATE) as file:
            self._torch.save(state, file)

    def _write(self, text: str | None) -> None:
        """The trained model as a directory like the one it came from, in place of the state."""
        named = dict(self._model.named_parameters())
        names = tuple(self._checkpoint.tensors)
        for name, source in self._checkpoint.companions().items():
            if name != RECORD:
                with open_regular(source) as file, replacing(self._out / name) as copy:
                    shutil.copyfileobj(file, copy)
        config = json.dumps(dict(self._checkpoint.config), indent=2) + "\n"
        write_whole(self._out / "config.json", config, mode=0o644)
        record = {**self._record(), "finetuned_tokens": self._settings.tokens, "finetuned_on": text}
        record["finetuning"] = json.loads(self._identity)
        write_whole(self._out / RECORD, json.dumps(record, indent=1) + "\n", mode=0o644)
        with TensorWriter(self._out / _SHARD, metadata={"format": "pt"}, expected=names) as writer:
            for name in names:
                old = self._checkpoint.read(name)
                if name not in named:  # a head that is the embedding, say, stored twice
                    writer.add(name, old)
                    continue
                values = named[name].detach().float().cpu().numpy()
                writer.add(name, _as_type(values, old.dtype, name))
        (self._out / STATE).unlink(missing_ok=True)

    def _record(self) -> Mapping[str, Any]:
        """How the model was pruned, if this package did it."""
        path = self._source / RECORD
        if not path.is_file():
            return {}
        with open_regular(path) as file:
            return parse_json(file.read(_MAX_RECORD).decode("utf-8", "replace"), field="file", path=str(path))


def _as_type(values: NDArray[np.float32], dtype: Any, name: str) -> NDArray[Any]:
    if dtype == bfloat16():
        return values.astype(bfloat16())
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if not bool(np.isfinite(narrow).all()):
        raise FormatError(field=name, expected=f"finite values that {dtype} can hold", got="others, after training")
    return narrow


def _packages() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"{error}: pip install torch transformers") from error
    return torch, transformers
