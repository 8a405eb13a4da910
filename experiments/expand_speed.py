# SPDX-License-Identifier: Apache-2.0
"""How fast packed weights are expanded to dense matrices, as for prefill, on the current GPU.

Every decoder writes a preallocated matrix, from several copies of its weight in turn, so that none is in the L2, in
CUDA graphs (docs/measurement.md). A memset of the same matrix, interleaved with them, shows how fast the memory takes
writes. Prints GB/s of dense output, also as a fraction of the memset's; ``--out`` appends rows to a file (JSON Lines)::

    python experiments/expand_speed.py --formats bitmap,slot24 --sparsity 0.6,0.8 --out rows.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from flashllm import backends
from flashllm.bench import environment
from flashllm.bench.cases import parse_shapes, parse_sparsities, split_list
from flashllm.cli._cases import BadUsage, usage_errors
from flashllm.errors import FlashLLMError
from flashllm.registry import FORMATS, encoder, weight_class

_SHAPES = "36864x9216,9216x9216,28672x7168"
"""The feed-forward and attention matrices of OPT-66B, and the feed-forward one of OPT-30B."""


class Decoder:
    """Copies of one weight, decoded to ``out``."""

    def __init__(self, weights: Sequence[Any], out: Any) -> None:
        self.copies, self._weights, self._out = len(weights), weights, out
        self._module: Any = encoder(weights[0].format)

    def launch(self, copy: int, stream: Any) -> None:
        """Queue one decoding."""
        with stream:
            self._module.decode(self._weights[copy], out=self._out)


class Fill:
    """A memset of ``out``."""

    copies = 1

    def __init__(self, out: Any) -> None:
        self._out = out

    def launch(self, copy: int, stream: Any) -> None:
        """Queue one memset."""
        self._out.data.memset_async(0, self._out.nbytes, stream)


def measure(shape: tuple[int, int], sparsity: float, formats: Sequence[str], *, cap_s: float) -> list[dict[str, Any]]:
    """A row for each format. Raises :class:`FlashLLMError` when a decoder does not reproduce the matrix."""
    import cupy

    from flashllm.bench import data, timing
    from flashllm.bench.systems import rotation
    from flashllm.device import device_facts

    stream = cupy.cuda.Stream(non_blocking=True)
    rows = []
    with stream:
        dense = data.random_matrix(*shape, density=1 - sparsity, device=True)
        out = cupy.empty_like(dense)
        for name in formats:
            w = weight_class(name).from_dense(dense)
            copies = timing.rotation_copies(w.nbytes, device_facts().l2_bytes, "cold")
            decoder, fill = Decoder(rotation(w, copies), out), Fill(out)
            # The first system of a round is measured slow, so one more memset runs before it, unreported.
            _, written, decoded = timing.measure([fill, fill, decoder], timing.Method(cap_s=cap_s), stream=stream)
            for copy in range(copies):
                out.fill(float("nan"))
                decoder.launch(copy, stream)
                if not bool((out == dense).all()):
                    raise FlashLLMError(f"{name}: the decoder gave another matrix than was packed")
            gbps, write_gbps = (out.nbytes / one.median_us * 1e-3 for one in (decoded, written))
            rows.append(
                {
                    "format": name,
                    "M": shape[0],
                    "K": shape[1],
                    "sparsity": sparsity,
                    "packed_bytes": w.nbytes,
                    "copies": copies,
                    "decode": asdict(decoded),
                    "fill": asdict(written),
                    "dense_gbps": round(gbps, 1),
                    "fill_gbps": round(write_gbps, 1),
                    "of_fill": round(gbps / write_gbps, 4),
                }
            )
            del w, decoder
    cupy.get_default_memory_pool().free_all_blocks()
    return rows


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return (
        f"{row['M']}x{row['K']} {row['sparsity']:g} {row['format']}: {row['decode']['median_us']:.1f} us, "
        f"{row['dense_gbps']:.0f} GB/s dense, {100 * row['of_fill']:.0f} % of a memset's {row['fill_gbps']:.0f}"
    )


@click.command()
@click.option("--formats", default=",".join(FORMATS), show_default=True, metavar="NAME,...", help="Whose decoders.")
@click.option("--shape", "shapes", multiple=True, default=(_SHAPES,), show_default=True, metavar="MxK,...")
@click.option("--sparsity", default="0.6,0.8", show_default=True, metavar="S,...", help="Fractions of zeros.")
@click.option("--time-cap", default=0.1, show_default=True, help="GPU seconds per decoder and memset.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Rows are appended here.")
def main(formats: str, shapes: tuple[str, ...], sparsity: str, time_cap: float, out: Path | None) -> None:
    """Time the decoders on this GPU."""
    names = split_list(formats)
    for name in names:
        if name not in FORMATS or encoder(name) is None:
            raise BadUsage(f"--formats: expected formats with a decoder on the GPU, got {name!r}")
    with usage_errors():
        backends.select("cuda")
        facts = asdict(environment.collect("cuda"))
        for shape in parse_shapes(shapes):
            for zeros in parse_sparsities(sparsity):
                for row in measure(shape, zeros, names, cap_s=time_cap):
                    click.echo(line(row))
                    if out is not None:
                        facts |= {"kind": "expand", "time_utc": environment.utc_now()}
                        with out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(facts | row) + "\n")


if __name__ == "__main__":
    main()
