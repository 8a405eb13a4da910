# SPDX-License-Identifier: Apache-2.0
"""Prunes a checkpoint into a Hugging Face directory, a block at a time; can be stopped and continued."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashllm.cpus import cores
from flashllm.errors import ArgumentError, FormatError, brief
from flashllm.formats.bits import bfloat16
from flashllm.formats.sources import to_host
from flashllm.io.checkpoint import Checkpoint
from flashllm.io.files import claimed, make_empty, torn_files
from flashllm.io.fingerprint import fingerprint
from flashllm.io.hf_directory import CONFIG_NAME, INDEX_NAME
from flashllm.io.safetensors_file import TensorFile
from flashllm.io.tensor_writer import TensorWriter, write_checkpoint_index
from flashllm.models import forward, weights
from flashllm.models.config import ModelConfig, model_config
from flashllm.models.directory import companion_names, with_type, write_companions, write_config
from flashllm.models.weights import Block
from flashllm.progress import Advance, ignore
from flashllm.prune import calibrate, ratios
from flashllm.prune.methods import METHODS, method
from flashllm.prune.record import RECORD, read_record, write_record
from flashllm.prune.statistics import Norms

_PREFIX = "model"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do; all of it affects the result."""

    method: str
    sparsity: float
    ratios: Literal["uniform", "owl", "global"] = "uniform"
    """How many zeros blocks get; ``global``: one threshold of magnitude for all matrices."""

    def check(self) -> None:
        """Raise ``ArgumentError`` for what cannot be done."""
        ratios.check_sparsity(self.sparsity)
        made = method(self.method)
        if self.ratios == "global" and self.method != "magnitude":
            raise ArgumentError("ratios", expected="uniform or owl: a global threshold is for magnitude", got="global")
        if self.ratios == "owl" and not made.calibrates:
            calibrating = ", ".join(name for name, entry in METHODS.items() if entry.calibrates)
            raise ArgumentError("ratios", expected=f"uniform, or a method that calibrates ({calibrating})", got="owl")


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The result of :func:`prune`."""

    zeros: int
    elements: int
    """Those of all pruned matrices."""
    seconds: float

    @property
    def sparsity(self) -> float:
        """The share of zeros in all elements."""
        return self.zeros / self.elements


def prune(
    checkpoint: Checkpoint,
    out: str | Path,
    settings: Settings,
    *,
    tokens: NDArray[np.int64] | None = None,
    text: str | None = None,
    xp: Any = np,
    advance: Advance = ignore,
) -> Pruned:
    """Write the pruned model into directory ``out``: safetensors, one shard for each block, and ``config.json``.

    ``tokens`` [S, T] is the text for methods that calibrate, and ``text`` is a name for it, to be recorded; ``xp`` is
    NumPy, or CuPy for the current GPU. Tensors keep their type, except that fp32 becomes fp16. An ``out`` that holds
    part of the same work is continued. Raises ``ArgumentError``, also for an ``out`` that holds something else, and
    ``FormatError`` for a checkpoint that is not whole.
    """
    settings.check()
    config = model_config(checkpoint.config, path=str(checkpoint.path))
    weights.check_tensors(checkpoint, config)
    calibrates = method(settings.method).calibrates
    if calibrates and tokens is None:
        raise ArgumentError("tokens", expected=f"text to calibrate {settings.method} with", got="None")
    if tokens is not None and (not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu"):
        raise ArgumentError("tokens", expected="a NumPy array of integers", got=brief(tokens))
    if tokens is not None and (
        tokens.ndim != 2 or not tokens.size or tokens.shape[1] > config.positions
        or tokens.min() < 0 or tokens.max() >= config.vocab
    ):  # fmt: skip
        expected = f"[S, T] of tokens below {config.vocab}, T at most {config.positions}"
        raise ArgumentError("tokens", expected=expected, got=f"{list(tokens.shape)} of {brief(tokens)}")
    if settings.ratios == "global":
        # The elements are counted by their bits, and those of fp16 and bf16 cannot be compared.
        names = [name for layer in range(config.layers) for name in config.layout.linears(layer)]
        if len({checkpoint.info(name).dtype == "BF16" for name in names}) > 1:
            expected = "uniform: a global threshold is for matrices of one type"
            raise ArgumentError("ratios", expected=expected, got="global, and matrices of bf16 and of others")
    with claimed(Path(out)) as directory:
        work = _Work(checkpoint, config, directory, settings, tokens if calibrates else None, xp, advance)
        return work.run(text if calibrates else None)


class _Work:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        out: Path,
        settings: Settings,
        tokens: NDArray[np.int64] | None,
        xp: Any,
        advance: Advance,
    ) -> None:
        self._checkpoint, self._config, self._out, self._settings = checkpoint, config, out, settings
        self._tokens, self._xp, self._advance = tokens, xp, advance
        self._method = method(settings.method)
        self._record = self._started()

    def run(self, text: str | None) -> Pruned:
        started, resumed = time.perf_counter(), bool(self._record["blocks"])
        self._record["text"] = text
        wanted = self._sparsities()
        self._write_outside()
        hidden = self._embedded()
        for layer in range(self._config.layers):
            self._advance(f"block {layer}", 0)
            done = str(layer) in self._record["blocks"] and (self._out / self._shard(layer)).is_file()
            if not done or hidden is not None:
                block = self._read(self._checkpoint, layer)
                block = self._stored(layer, block) if done else self._pruned(layer, block, wanted, hidden)
                if hidden is not None and layer + 1 < self._config.layers:
                    calibrate.advance(self._config, block, hidden)
            self._advance(f"block {layer}", 1)
        seconds = time.perf_counter() - started
        self._record |= {"seconds": None if resumed else round(seconds, 2), "device": self._device()}
        self._finish()
        blocks = self._record["blocks"].values()
        return Pruned(
            zeros=sum(entry["zeros"] for entry in blocks),
            elements=sum(entry["elements"] for entry in blocks),
            seconds=seconds,
        )

    def _device(self) -> str:
        if self._xp is np:
            return f"{cores()} CPUs"
        from flashllm.device import device_facts

        return device_facts().name

    def _pruned(self, layer: int, block: Block, wanted: Mapping[str, float], hidden: Any) -> Block:
        """Prune, write and record the block; returns it as it is stored."""
        seen: Mapping[str, Any] = {}
        if hidden is not None:
            seen = calibrate.observe(self._config, block, hidden, self._method.statistics)
        prefix = self._config.layout.prefix(layer)
        stored: dict[str, NDArray[Any]] = {}
        kept: dict[str, Any] = {}
        zeros = elements = 0
        for name, matrix in block.linears.items():
            full = f"{prefix}.{name}.weight"
            pruned = self._method.prune(matrix, seen.get(name), wanted[full])
            stored[full] = self._as_stored(full, to_host(pruned))
            kept[name] = self._xp.asarray(stored[full].astype(np.float32))
            zeros += stored[full].size - int(np.count_nonzero(stored[full]))
            elements += stored[full].size
        names = weights.block_names(self._checkpoint, self._config, layer)
        self._write(self._shard(layer), ((name, stored.get(name)) for name in names), names)
        self._record["blocks"][str(layer)] = {"zeros": zeros, "elements": elements}
        write_record(self._out, self._record)
        return Block(small=block.small, linears=kept)

    def _sparsities(self) -> dict[str, float]:
        """The fraction of zeros of every matrix."""
        layout, settings = self._config.layout, self._settings
        layers = range(self._config.layers)
        if settings.ratios == "global":
            counts = {}
            for name in (name for layer in layers for name in layout.linears(layer)):
                matrix = self._as_stored(name, self._checkpoint.read(name))
                counts[name] = ratios.magnitude_counts(matrix.view(np.uint16))
            return ratios.global_sparsities(counts, settings.sparsity)
        blocks = [settings.sparsity] * len(layers)
        if settings.ratios == "owl":
            blocks = ratios.owl(self._outliers(), settings.sparsity)
        return {name: blocks[layer] for layer in layers for name in layout.linears(layer)}

    def _outliers(self) -> list[float]:
        """The share of outliers in each block of the original model."""
        if "outliers" not in self._record:
            hidden, shares = self._embedded(), []
            for layer in range(self._config.layers):
                self._advance(f"outliers of block {layer}", 0)
                block = self._read(self._checkpoint, layer)
                seen: Mapping[str, Any] = calibrate.observe(self._config, block, hidden, Norms)
                found = [ratios.outlier_share(abs(w) * seen[name].norms()) for name, w in block.linears.items()]
                shares.append(float(np.mean(found)))
                calibrate.advance(self._config, block, hidden)
                self._advance(f"outliers of block {layer}", 1)
            self._record["outliers"] = shares
            write_record(self._out, self._record)
        else:
            self._advance("outliers", self._config.layers)
        return list(self._record["outliers"])

    def _embedded(self) -> Any:
        if self._tokens is None:
            return None
        tensors = weights.before_blocks(self._checkpoint, self._config)
        return self._xp.asarray(forward.embed(self._config, tensors, self._tokens))

    def _read(self, checkpoint: Checkpoint, layer: int) -> Block:
        return weights.block(checkpoint, self._config, layer, xp=self._xp)

    def _stored(self, layer: int, block: Block) -> Block:
        """The block as an earlier run pruned it."""
        prefix = self._config.layout.prefix(layer)
        with TensorFile(self._out / self._shard(layer)) as file:
            kept = {
                name: self._xp.asarray(file.read(file.header.tensors[f"{prefix}.{name}.weight"]).astype(np.float32))
                for name in block.linears
            }
        return Block(small=block.small, linears=kept)

    def _as_stored(self, name: str, matrix: NDArray[Any]) -> NDArray[Any]:
        """``matrix`` in the type of its file, or fp16 for fp32. Raises ``FormatError`` if a finite value overflows."""
        kind = self._checkpoint.info(name).dtype
        if kind == "BF16":
            return np.ascontiguousarray(matrix).astype(bfloat16())
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(matrix).astype(np.float16)
        if bool((np.isinf(narrow) & np.isfinite(matrix)).any()):
            expected = "magnitudes below 65520, which fp16 can hold"
            raise FormatError(field=name, expected=expected, got="larger", path=str(self._checkpoint.path))
        return narrow

    def _shard(self, layer: int) -> str:
        """File name of block ``layer``; -1 stands for the tensors outside the blocks."""
        return f"{_PREFIX}-{layer + 2:05}-of-{self._config.layers + 1:05}.safetensors"

    def _write_outside(self) -> None:
        name = self._shard(-1)
        if not (self._out / name).is_file():
            names = weights.outside_names(self._checkpoint, self._config)
            self._write(name, ((one, None) for one in names), names)

    def _write(self, shard: str, tensors: Iterator[tuple[str, NDArray[Any] | None]], names: tuple[str, ...]) -> None:
        """Write a shard; ``None`` stands for the tensor of the checkpoint."""
        with TensorWriter(self._out / shard, metadata={"format": "pt"}, expected=names) as writer:
            for name, array in tensors:
                if array is None:
                    array = self._checkpoint.read(name)
                    array = self._as_stored(name, array) if array.dtype == np.float32 else array
                writer.add(name, array)

    def _identity(self) -> dict[str, Any]:
        """What determines the result."""
        tokens = None
        if self._tokens is not None:
            content = np.ascontiguousarray(self._tokens, dtype="<i8")
            tokens = {"shape": list(content.shape), "sha256": hashlib.sha256(content.tobytes()).hexdigest()}
        return {"settings": asdict(self._settings), "model": fingerprint(self._checkpoint), "tokens": tokens}

    def _started(self) -> dict[str, Any]:
        """The record of ``out``: a new one, or that of an earlier run of the same work."""
        identity, record = self._identity(), read_record(self._out)
        if record:
            if {key: record.get(key) for key in identity} != identity or "blocks" not in record:
                got = f"that of {record.get('settings')}, another model or text"
                raise ArgumentError("out", expected="a new directory, or the same work begun before", got=got)
            for file in torn_files(self._out, self._names()):
                file.unlink(missing_ok=True)  # of a run that was killed
            return record
        make_empty(self._out)
        record = {**identity, "blocks": {}}
        write_record(self._out, record)  # first of all: a directory that holds it may be continued
        return record

    def _names(self) -> set[str]:
        """The files that a run writes."""
        shards = (self._shard(layer) for layer in range(-1, self._config.layers))
        return {RECORD, CONFIG_NAME, INDEX_NAME, *companion_names(self._checkpoint), *shards}

    def _finish(self) -> None:
        write_companions(self._checkpoint, self._out, without=[RECORD])  # the source's record is of an earlier pruning
        kinds = {self._checkpoint.info(name).dtype for name in self._config.layout.linears(0)}
        write_config(self._out, with_type(self._checkpoint.config, "bf16" if kinds == {"BF16"} else "fp16"))
        write_record(self._out, self._record)
        # Last: without the index, this is not a checkpoint.
        write_checkpoint_index(self._out, [self._shard(layer) for layer in range(-1, self._config.layers)])
