# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, or a directory of packed weights, on a text; gives a row of results."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from flashllm.bench import environment
from flashllm.bench.quality_rows import SCHEMA, QualityRow
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.sources import to_host
from flashllm.io.checkpoint import Checkpoint, open_checkpoint
from flashllm.io.safetensors_file import LAYOUT_NAMES
from flashllm.io.sparse_model import SparseModel, is_sparse_model
from flashllm.models.config import ModelConfig
from flashllm.models.dense import DenseModel
from flashllm.models.packed import PackedModel, UnpackedModel
from flashllm.models.quality import Model, evaluate, head, largest_difference, run_blocks
from flashllm.models.text import Windows, read_text, windows
from flashllm.models.tokenizer import load_tokenizer
from flashllm.progress import Advance, ignore
from flashllm.prune.record import read_record

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPES = {**{stored: dtype for dtype, stored in LAYOUT_NAMES.items()}, "F32": "fp32"}
_AGREE = 2.0
"""The largest logit error with sparse products may be this many times that with dense 16-bit ones."""


class Evaluation:
    """A model under evaluation, to be used in a ``with`` statement.

    ``xp``: NumPy, or CuPy for the current GPU; ``backend``: what multiplies packed matrices, as ``spmm`` takes it.
    Raises what opening a checkpoint raises.
    """

    def __init__(self, path: Path, *, xp: Any = np, backend: str | None = None) -> None:
        self._path, self._xp, self._backend = path, xp, backend
        self._packed = SparseModel(path) if is_sparse_model(path) else None
        self._checkpoint: Checkpoint = open_checkpoint(path) if self._packed is None else UnpackedModel(self._packed)
        try:
            self._model: Model = (
                DenseModel(self._checkpoint, xp=xp)
                if self._packed is None
                else PackedModel(self._packed, xp=xp, backend=backend)
            )
        except BaseException:
            self._checkpoint.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._checkpoint.close()

    @property
    def is_packed(self) -> bool:
        """Whether its matrices are packed."""
        return self._packed is not None

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model."""
        return self._model.config

    def windows(self, text: Path, *, part: tuple[float, float], count: int, length: int) -> Windows:
        """Windows of a text file, tokenized by the model's tokenizer. Raises ``ArgumentError``, ``FormatError``."""
        if length > self.config.positions:
            raise ArgumentError("length", expected=f"at most {self.config.positions} positions", got=str(length))
        tokenizer = load_tokenizer(self._checkpoint)
        found = windows(tokenizer, read_text(text, part=part), count=count, length=length)
        if (most := int(found.tokens.max())) >= self.config.vocab:
            expected = f"one with the model's vocabulary of {self.config.vocab}"
            raise FormatError(field="tokenizer", expected=expected, got=f"token {most}", path=str(self._path))
        return found

    def measure(self, given: Windows, *, text: str, check: bool = False, advance: Advance = ignore) -> QualityRow:
        """Predict ``given``; ``text`` is a name for it. With ``check``, also compare logits of the first window."""
        record = read_record(self._path)
        # A record without settings belongs to a model that was trained here but pruned elsewhere.
        settings = record.get("settings", {} if record else {"method": "none", "sparsity": 0.0})
        started = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):  # results that are not finite are reported as such
            found = evaluate(self._model, given, advance=advance)
            seconds = time.perf_counter() - started
            errors = self._logit_errors(given.tokens[:1], advance) if check else None
        zeros, elements, dtype = self._zeros()
        on_gpu = self._xp is not np
        on_host = "numpy" if self._packed is None else self._backend or "reference"
        facts = environment.collect("cuda" if on_gpu else on_host)
        return QualityRow(
            schema=SCHEMA,
            kind="quality",
            run_id=facts.run_id,
            time_utc=environment.utc_now(),
            commit=facts.commit,
            dirty=facts.dirty,
            command=facts.command,
            backend=facts.backend,
            gpu=facts.gpu,
            model=self._path.resolve().name,
            model_type=self.config.model_type,
            method=settings.get("method"),
            ratios=settings.get("ratios"),
            sparsity=settings.get("sparsity"),
            sparsity_real=zeros / elements,
            calibration=record.get("text"),
            prune_seconds=record.get("seconds"),
            prune_device=record.get("device"),
            finetuned_tokens=record.get("finetuned_tokens", 0),
            format=self._formats(),
            dtype=dtype,
            text=text,
            text_sha256=hashlib.sha256(np.ascontiguousarray(given.tokens, "<i8").tobytes()).hexdigest(),
            windows=len(given.tokens),
            length=given.tokens.shape[1],
            tokens=found.tokens,
            ppl=_finite(found.perplexity),
            bits_per_byte=_finite(found.bits_per_byte),
            seconds=round(seconds, 3),
            logit_error=None if errors is None else _finite(errors[0]),
            logit_error_dense=None if errors is None else _finite(errors[1]),
            check=None if errors is None else _verdict(*errors),
        )

    def _logit_errors(self, tokens: Any, advance: Advance) -> tuple[float, float]:
        """Largest errors of packed and of dense 16-bit products, against float64 on the CPU."""
        exact = DenseModel(self._checkpoint, dtype=np.float64)
        _, _, dtype = self._zeros()
        wanted = _logits(exact, tokens, advance)
        narrow = DenseModel(self._checkpoint, xp=self._xp, narrow="bf16" if "bf16" in dtype else "fp16")
        packed, dense = (_logits(model, tokens, advance) for model in (self._model, narrow))
        return largest_difference(packed, wanted), largest_difference(dense, wanted)

    def _formats(self) -> str:
        if self._packed is None:
            return "dense"
        return ",".join(sorted({weight.format for weight in self._packed.manifest.weights.values()}))

    def _zeros(self) -> tuple[int, int, str]:
        """Numbers of zeros and elements in the matrices of blocks, and their types, comma-separated."""
        if self._packed is not None:
            stored = list(self._packed.manifest.weights.values())
            elements = sum(weight.elements for weight in stored)
            dtypes = {weight.dtype for weight in stored}
            return elements - sum(weight.nnz for weight in stored), elements, ",".join(sorted(dtypes))
        zeros = elements = 0
        kinds = set()
        for layer in range(self.config.layers):
            for name in self.config.layout.linears(layer):
                matrix = self._checkpoint.read(name)
                zeros += matrix.size - int(np.count_nonzero(matrix))
                elements += matrix.size
                kinds.add(self._checkpoint.info(name).stored)
        return zeros, elements, ",".join(sorted(_DTYPES.get(kind, kind.lower()) for kind in kinds))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdict(packed: float, dense: float) -> str:
    """The verdict on the largest logit errors; a packed error that is not finite fails."""
    return "pass" if math.isfinite(packed) and packed <= _AGREE * dense else "fail"


def _logits(model: Model, tokens: Any, advance: Advance) -> Any:
    """All logits [S * T, vocabulary] of ``tokens`` [S, T], on the host."""
    hidden, outside = run_blocks(model, model.xp.asarray(tokens), advance=advance)
    rows = hidden.reshape(-1, model.config.hidden)
    parts = [to_host(part) for _, part in head(model, outside, rows)]
    return np.concatenate(parts)
