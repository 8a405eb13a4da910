# SPDX-License-Identifier: Apache-2.0
"""How fast a large model is converted to sparse weights: blocks of OPT-66B's shapes with random zeros, on this GPU.

Writes a synthetic checkpoint of some blocks, converts it to every format and appends a row for each to a file (JSON
Lines): GB/s of dense input from the mapped file to the encoded buffers, the same including writing, and peak memory::

    python experiments/conversion.py --out experiments/results/conversion/...-opt-66b.jsonl
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from flashllm.bench import environment
from flashllm.convert.run import convert
from flashllm.io.tensor_writer import TensorWriter
from flashllm.models.config import model_config, tensor_shapes

CONFIG = {
    "model_type": "opt",
    "num_hidden_layers": 64,
    "hidden_size": 9216,
    "num_attention_heads": 72,
    "ffn_dim": 36864,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 9216,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
_POOL = 1 << 24
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak anonymous memory of this process within the ``with`` block, in bytes above the amount on entry."""

    def __enter__(self) -> PeakMemory:
        self._begin = self.peak = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak -= self._begin

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def write_model(folder: Path, blocks: int, sparsity: float) -> int:
    """Write a checkpoint of ``blocks`` blocks; return the bytes of its matrices."""
    config = {**CONFIG, "num_hidden_layers": blocks}
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(_POOL, np.float32).astype(np.float16)
    pool[rng.random(_POOL) < sparsity] = 0
    shapes = tensor_shapes(model_config(config))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    matrices = 0
    with TensorWriter(folder / "model.safetensors", metadata={"format": "pt"}, expected=shapes) as writer:
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            matrices += 2 * count if len(shape) == 2 and ".layers." in name else 0
            with writer.tensor(name, "F16", shape) as out:
                for part in _pieces(pool, count, rng):
                    out.write(part)
    return matrices


def _pieces(pool: NDArray[Any], count: int, rng: np.random.Generator) -> Any:
    """Pieces of ``pool`` with ``count`` elements in all, each starting at a random place."""
    while count:
        first = int(rng.integers(0, len(pool)))
        part = pool[first : first + count]
        count -= len(part)
        yield part


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--sparsity", type=float, default=0.8, show_default=True)
@click.option("--formats", default="tiled-csl,bitmap,slot24", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="For the model and what it becomes: twice its size.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Rows are appended here.")
def main(blocks: int, sparsity: float, formats: str, folder: Path | None, out: Path) -> None:
    """Measure `flashllm convert` on the GPU."""
    import cupy

    facts = environment.collect("cuda")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "model"
        source.mkdir()
        dense = write_model(source, blocks, sparsity)
        names = formats.split(",")
        for turn, name in enumerate([*names, *names]):
            pool = cupy.get_default_memory_pool()
            pool.free_all_blocks()
            target = Path(place) / "out"
            started = time.perf_counter()
            with PeakMemory() as memory:
                done = convert(source, target, format=name, device="gpu")
            seconds = time.perf_counter() - started
            shutil.rmtree(target)
            if turn < len(names):  # this round compiles kernels and reads the file into memory
                continue
            row = {
                "kind": "encode",
                "time_utc": environment.utc_now(),
                **{key: value for key, value in asdict(facts).items() if key != "sweep_id"},
                "model": "opt-66b",
                "blocks": blocks,
                "sparsity": sparsity,
                "format": name,
                "dense_bytes": dense,
                "encode_gbps": done.seconds.encoding_gbps,
                "whole_gbps": done.seconds.whole_gbps,
                "choosing_seconds": done.seconds.choosing,
                "seconds": seconds,
                "peak_host_bytes": memory.peak,
                "peak_device_bytes": pool.total_bytes(),
            }
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(
                f"{name}: {row['encode_gbps']:.1f} GB/s encoded, {row['whole_gbps']:.2f} GB/s in all, {seconds:.1f} s, "
                f"host {memory.peak / 1e9:.2f} GB, device {pool.total_bytes() / 1e9:.2f} GB"
            )


if __name__ == "__main__":
    main()
