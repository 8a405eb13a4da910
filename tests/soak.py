# SPDX-License-Identifier: Apache-2.0
"""Random products, checked, for a given time: ``python tests/soak.py --minutes 5`` (``make soak MINUTES=5``).

Every case is drawn from one printed number, and ``--case NUMBER`` runs that case again. The kernels run on a GPU if
there is one, else on the emulator.
"""

from __future__ import annotations

import random
import time
from typing import Any

import click
import numpy as np

from flashllm import backends, registry
from products import assert_exact, exact, integers, weight
from weight_cases import PATTERNS


def draw(number: int, largest: int) -> dict[str, Any]:
    """Shape, mask and N of case ``number``; shapes up to ``largest`` elements, biased to awkward edges."""
    rng = random.Random(number)
    edges = (1, 63, 64, 65, 127, 128, 129, 255, 256, 1000)
    m = rng.choice([*edges, rng.randint(1, 6000)])
    k = rng.choice([*edges, rng.randint(1, 12000), 8 * rng.randint(1, 1500)])
    while m * k > largest:
        m, k = max(1, m // 2), max(1, k // 2)
    name = rng.choice(list(registry.FORMATS))
    return {
        "shape": (m, k),
        "n": rng.choice([1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, rng.randint(1, 200)]),
        "pattern": rng.choice(PATTERNS),
        "density": rng.choice([0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.9, rng.random()]),
        "dtype": rng.choice(["fp16", "bf16"]),
        "format": name,
        "encoding": rng.choice(list(registry.weight_class(name).ENCODINGS)),
    }


def run(number: int, backend: str) -> None:
    """Compute case ``number`` and compare every element with integer arithmetic."""
    case = draw(number, 2**22 if backend == "cuda" else 2**16)
    shape, dtype = case["shape"], case["dtype"]
    w = weight(case["pattern"], shape, case["density"], dtype, seed=number % 2**32)
    x = integers(np.random.default_rng(number), (case["n"], shape[1]), dtype)
    made = registry.weight_class(case["format"])
    packed = made.from_dense(w, **made.ENCODINGS[case["encoding"]])
    if backend == "cuda":
        import cupy

        from flashllm import spmm

        got = spmm(cupy.asarray(x.view(np.uint16)).view(x.dtype), packed.to_device()).get()
    else:
        from flashllm.backends import emulator

        got, _ = emulator.spmm(x, packed, seed=number)
    assert_exact(got, exact(x, w, dtype))


@click.command()
@click.option("--minutes", default=5.0, show_default=True, help="How long.")
@click.option("--seed", type=int, default=None, help="Where the numbers of the cases begin.  [default: the clock]")
@click.option("--case", "only", type=int, default=None, help="Run this one case and stop.")
def main(minutes: float, seed: int | None, only: int | None) -> None:
    """Multiply random weights until the time is up or a result is wrong."""
    backend = "cuda" if backends.select().name == "cuda" else "emulator"
    first = only if only is not None else (time.time_ns() if seed is None else seed)
    click.echo(f"{backend}, cases from {first}")
    end, number = time.monotonic() + 60 * minutes, first
    while number == first or (only is None and time.monotonic() < end):
        try:
            run(number, backend)
        except BaseException:
            click.echo(f"case {number} failed; repeat it with --case {number}", err=True)
            raise
        number += 1
    click.echo(f"{number - first} products, all exact")


if __name__ == "__main__":
    main()
