# SPDX-License-Identifier: Apache-2.0
"""Runs kernels under the sanitizers: a program of its own, because they have to be there before Python.

``python sanitized.py products`` or ``python sanitized.py plain MISTAKE``; ends with status 0 and "done" when no
sanitizer objects and every result is right.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_bitmap_encode
import test_encode
import test_slot24_encode

from flashllm import TiledCSL, registry
from flashllm.backends import emulator
from flashllm.backends.emulator import BuildOptions
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.slot24 import Slot24
from flashllm.jit.spec import KernelSpec
from products import assert_exact, exact, integers, packed, weight


def products() -> None:
    """Odd shapes, dense and empty tiles, both tensor-core paths, shared rows of tiles, one block."""
    cases = (
        ("tiled-csl", "80", 9, (130, 200), "skewed"),
        ("tiled-csl", "90a", 33, (130, 200), "full"),
        ("tiled-csl", "90a", 5, (129, 77), "empty-tiles"),
        ("bitmap", "80", 9, (130, 700), "skewed"),
        ("bitmap", "90a", 33, (130, 200), "full"),
        ("bitmap", "90a", 5, (129, 770), "empty-tiles"),
        ("slot24", "80", 9, (130, 704), "skewed"),
        ("slot24", "90a", 33, (130, 203), "full"),
        ("slot24", "90a", 5, (129, 1540), "empty-tiles"),
    )
    tall = ("slot24", "80", 9, (260, 704), "skewed"), ("slot24", "90a", 33, (130, 203), "uniform")
    wide = ("slot24", "90a", 64, (130, 1203), "uniform")
    jobs = []
    for number, (name, arch, n, shape, pattern) in enumerate((*cases, *tall, wide)):
        w = weight(pattern, shape, 0.4, "fp16")
        sparse = packed(name, w, **({} if number < len(cases) else {"part_rows": 64}))
        choice = registry.kernel(name).default_choice(sparse, n, arch=arch)
        jobs.append((arch, integers(np.random.default_rng(n), (n, shape[1]), "fp16"), w, sparse, choice))
    for arch in {job[0] for job in jobs}:  # together, which takes half the time
        specs = dict.fromkeys(job[-1].spec for job in jobs if job[0] == arch)
        emulator.preload(specs, build=BuildOptions(arch=arch, sanitize=True))
    for arch, x, w, sparse, choice in jobs:
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
        products()
        encoders()
    print("done")
