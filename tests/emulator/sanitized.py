# SPDX-License-Identifier: Apache-2.0
"""Runs kernels under the sanitizers: a separate program, because they have to be loaded before Python.

``python sanitized.py products`` or ``python sanitized.py plain MISTAKE``; ends with status 0 and "done" when no
sanitizer objects and every result is right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_bitmap_encode
import test_encode
import test_slot24_encode

from flashllm import TiledCSL, registry
from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions
from flashllm.encode.source import BITS16
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.slot24 import Slot24
from flashllm.formats.weight import SparseWeight
from flashllm.jit.spec import KernelSpec
from products import assert_exact, exact, integers, packed, weight

Job = tuple[str, NDArray[Any], NDArray[Any], SparseWeight, Any]


def jobs() -> list[Job]:
    """Architecture, x, W, W packed and instance: odd shapes, dense and empty tiles, both tensor-core paths."""
    cases: tuple[tuple[str, str, int, tuple[int, int], str, dict[str, int]], ...] = (
        ("tiled-csl", "80", 9, (130, 200), "skewed", {}),
        ("tiled-csl", "90a", 33, (130, 200), "full", {}),
        ("tiled-csl", "90a", 5, (129, 77), "empty-tiles", {}),
        ("bitmap", "80", 9, (130, 700), "skewed", {}),
        ("bitmap", "90a", 33, (130, 200), "full", {}),
        ("bitmap", "90a", 5, (129, 770), "empty-tiles", {}),
        # A band has one warp, two warps that hand over sums, or two teams of such warps.
        ("slot24", "80", 9, (260, 704), "skewed", {"part_rows": 32}),
        ("slot24", "90a", 5, (129, 1540), "empty-tiles", {"part_rows": 64}),
        ("slot24", "90a", 33, (130, 203), "full", {"part_rows": 64}),
        ("slot24", "90a", 64, (130, 1203), "uniform", {"part_rows": 64}),
    )
    found = []
    for name, arch, n, shape, pattern, options in cases:
        w = weight(pattern, shape, 0.4, "fp16")
        sparse = packed(name, w, **options)
        choice = registry.kernel(name).default_choice(sparse, n, arch=arch)
        found.append((arch, integers(np.random.default_rng(n), (n, shape[1]), "fp16"), w, sparse, choice))
    return found


def builds(made: Sequence[Job]) -> dict[BuildOptions, list[KernelSpec]]:
    """Everything that is run, to be built together in half the time that one by one takes."""
    found: dict[BuildOptions, list[KernelSpec]] = {}
    for arch, *_, choice in made:
        specs = found.setdefault(BuildOptions(arch=arch, sanitize=True), [])
        specs += [] if choice.spec in specs else [choice.spec]
    encoders = [spec for name in registry.FORMATS for spec in registry.encoder(name).specs()]
    unused = {("Source", text) for spec in encoders for name, text in spec.template if name == "Source"}
    unused = (unused - {("Source", BITS16)}) | {("kGroupValues", "2")}
    found[BuildOptions(sanitize=True)] += [spec for spec in encoders if unused.isdisjoint(spec.template)]
    return found


def products(made: Sequence[Job]) -> None:
    """Check all products, with rows of tiles shared by blocks and with a single block."""
    for arch, x, w, sparse, choice in made:
        for seed, blocks in enumerate((1, 2, None)):
            got, _ = emulator.spmm(x, sparse, choice=choice, arch=arch, seed=seed, blocks=blocks, sanitize=True)
            assert_exact(got, exact(x, w, "fp16"))


def encoders() -> None:
    a = weight("skewed", (130, 131), 0.4, "fp16").view(np.uint16)
    for order in ("bank", "row"):
        want = TiledCSL.from_dense(a.view(np.float16), order=order)
        test_encode.assert_same(test_encode.encode(a, "fp16", order, sanitize=True)[0], want)
        np.testing.assert_array_equal(test_encode.decode(want, sanitize=True), a)
    a = weight("skewed", (130, 600), 0.4, "fp16").view(np.uint16)
    bitmap = Bitmap.from_dense(a.view(np.float16))
    test_bitmap_encode.assert_same(test_bitmap_encode.encode(a, "fp16", sanitize=True)[0], bitmap)
    np.testing.assert_array_equal(test_bitmap_encode.decode(bitmap, sanitize=True), a)
    a = weight("skewed", (130, 600), 0.2, "fp16").view(np.uint16)
    for part_rows in (32, 64):
        sparse = Slot24.from_dense(a.view(np.float16), part_rows=part_rows)
        same, _ = test_slot24_encode.encode(a, "fp16", part_rows=part_rows, sanitize=True)
        test_slot24_encode.assert_same(same, sparse)
        np.testing.assert_array_equal(test_slot24_encode.decode(sparse, sanitize=True), a)


def plain(mistake: int) -> None:
    x, y = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
    spec = KernelSpec(
        name="plain",
        source="broken.cu",
        function="broken::plain",
        template=(("kMistake", str(mistake)),),
        threads=100 if mistake == 2 else 128,
    )
    build = BuildOptions(sanitize=True, source_root=Path(__file__).parent)
    emulator.launch(spec, (1,), (x, y, np.int32(100)), build=build)
    assert (y == x).all()


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(int(sys.argv[2]))
    else:
        made = jobs()
        for build, specs in builds(made).items():
            emulator.preload(specs, build=build)
        products(made)
        encoders()
    print("done")
