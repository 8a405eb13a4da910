# SPDX-License-Identifier: Apache-2.0
"""Trains a pruned model with its zeros fixed, so that the other weights compensate; uses PyTorch and transformers.

With a teacher, the model it was pruned from, it learns the teacher's distribution of the next token (Hinton et al.,
"Distilling the knowledge in a neural network", 2015, at temperature 1); without one, it learns the text. Everything but
the zeros is trained: the other weights of linear layers, embeddings, norms and biases.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError, FormatError, MissingDependencyError, brief
from flashllm.formats.bits import bfloat16
from flashllm.io.checkpoint import Checkpoint, open_checkpoint
from flashllm.io.files import make_empty, replacing
from flashllm.io.fingerprint import fingerprint
from flashllm.io.hf_directory import SINGLE_NAME
from flashllm.io.tensor_writer import TensorWriter
from flashllm.models.config import ModelConfig, model_config
from flashllm.models.directory import write_companions, write_config
from flashllm.models.weights import check_tensors
from flashllm.progress import Advance, ignore
from flashllm.prune.record import RECORD, read_record, write_record

STATE = "finetune-state.pt"
"""File in the output directory while work goes on: all that is needed to continue."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; all of it affects the result."""

    steps: int
    batch: int = 16
    """Windows of a step."""
    length: int = 1024
    """Tokens of a window."""
    learning_rate: float = 2e-4
    """The peak: the rate rises to it over the first ``warmup`` share of the steps, then falls to a tenth of it along
    half a cosine."""
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
        """Tokens of the whole training."""
        return self.steps * self.batch * self.length

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``; steps count from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def begins(self, step: int, tokens: int) -> NDArray[np.int64]:
        """Where the windows of ``step`` begin in a text of ``tokens`` tokens; resuming does not change them."""
        return np.random.default_rng((self.seed, step)).integers(0, tokens - self.length, self.batch)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a call of :func:`finetune` has done."""

    steps: int
    """Steps done so far, including those of earlier calls."""
    loss: float
    """Mean over the last steps, nats per token."""
    seconds: float
    """Duration of this call."""
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
    advance: Advance = ignore,
) -> Trained:
    """Train the pruned checkpoint ``model``, a Hugging Face directory, and write it to another directory, ``out``.

    ``tokens`` [T] is the text; ``text`` is a name for it, to be recorded. ``teacher`` is the directory of the dense
    model, with the same tokens. Training stops after ``seconds``, or on Ctrl-C. The state is saved in ``out`` then, and
    every ``save_seconds`` before that; the same call continues from it. Zeros stay zeros.

    Raises ``ArgumentError``, ``FormatError``, and ``MissingDependencyError`` without torch and transformers.
    """
    settings.check()
    with open_checkpoint(model) as checkpoint:
        config = model_config(checkpoint.config, path=str(model))
        check_tensors(checkpoint, config)
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
        _check_device(self._torch, device)
        identity = {
            "settings": asdict(settings),
            "model": fingerprint(checkpoint),
            "teacher": None if teacher is None else _fingerprint_at(teacher),
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
        self._fix_zeros()
        self._optimizer = self._torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def run(self, text: str | None, seconds: float, save_seconds: float, advance: Advance) -> Trained:
        started = saved = time.perf_counter()
        step, losses = self._resume(), list[float]()
        advance("resumed" if step else "training", step)
        try:
            while step < self._settings.steps and time.perf_counter() - started < seconds:
                try:
                    losses.append(self._step(step))
                except self._torch.OutOfMemoryError as error:
                    expected = "windows that fit into the memory of the GPU together"
                    got = f"{self._settings.batch} of {self._settings.length} tokens"
                    raise ArgumentError("batch", expected=expected, got=got) from error
                step += 1
                advance(f"loss {losses[-1]:.3f}", 1)
                if time.perf_counter() - saved >= save_seconds:
                    self._save_state(step)
                    saved = time.perf_counter()
        except KeyboardInterrupt:
            self._save_state(step)
            raise
        finished = step >= self._settings.steps
        self._save_state(step)  # also before the model is written, which may fail
        if finished:
            self._write(text)
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

    def _fix_zeros(self) -> None:
        """Make the gradients of zeros zero from now on, so that AdamW, without decay, leaves the zeros unchanged."""
        named = dict(self._model.named_parameters())
        for layer in range(self._config.layers):
            for name in self._config.layout.linears(layer):
                mask = named[name].detach() != 0
                named[name].register_hook(lambda gradient, mask=mask: gradient * mask)

    def _load(self, path: Path) -> Any:
        kind = self._transformers.AutoModelForCausalLM
        return kind.from_pretrained(path, local_files_only=True).to(self._device)

    def _check_out(self) -> None:
        if not (self._out / STATE).is_file():
            make_empty(self._out)

    def _resume(self) -> int:
        """The number of steps that an earlier call has done."""
        path = self._out / STATE
        if not path.is_file():
            return 0
        try:
            state = self._torch.load(path, map_location=self._device, weights_only=True)
            identity, step = str(state["identity"]), int(state["step"])
        except Exception as error:  # PyTorch raises various ones for files that it cannot read
            expected = "what an earlier call has saved"
            raise FormatError(field="file", expected=expected, got=brief(error), path=str(path)) from error
        if identity != self._identity:
            raise ArgumentError("out", expected="a new directory, or the same work begun before", got=identity)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        return step

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
        """Write the trained model as a directory like the one it came from, in place of the state."""
        # A head that is tied to the embedding has both names, and the file may hold it under both.
        named = dict(self._model.named_parameters(remove_duplicate=False))
        names = tuple(self._checkpoint.tensors)
        write_companions(self._checkpoint, self._out, without=[RECORD])
        write_config(self._out, self._checkpoint.config)
        record = read_record(self._source)  # how it was pruned, if this package did it
        record.pop("blocks", None)  # needed only to continue the pruning
        record["finetuned_tokens"] = record.get("finetuned_tokens", 0) + self._settings.tokens
        record |= {"finetuned_on": text, "finetuning": json.loads(self._identity)}
        write_record(self._out, record)
        with TensorWriter(self._out / SINGLE_NAME, metadata={"format": "pt"}, expected=names) as writer:
            for name in names:
                old = self._checkpoint.read(name)
                if name not in named:  # such as the frequencies of rotary positions, which old files hold
                    writer.add(name, old)
                    continue
                values = named[name].detach().float().cpu().numpy()
                writer.add(name, _as_type(values, old.dtype, name))
        (self._out / STATE).unlink(missing_ok=True)


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
        raise MissingDependencyError(f'{error}: pip install "flashllm[finetune]"') from error
    return torch, transformers


def _check_device(torch: Any, device: str) -> None:
    """Raise ``ArgumentError`` unless this is a PyTorch device, ``MissingDependencyError`` for a GPU that is missing."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        expected = "a device of PyTorch, such as cuda or cpu"
        raise ArgumentError("device", expected=expected, got=repr(device)) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(f"device: PyTorch finds no GPU for {device!r}")


def _fingerprint_at(path: str | Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return fingerprint(checkpoint)
