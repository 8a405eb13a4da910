# SPDX-License-Identifier: Apache-2.0
"""Slot24 in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import weight_cases as cases
from flashllm.errors import FormatError
from flashllm.formats.bitmap_encode import Places
from flashllm.formats.slot24 import Slot24

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def same(a: Slot24, b: Slot24) -> bool:
    arrays = zip(a.arrays().values(), b.arrays().values(), strict=True)
    return a.metadata() == b.metadata() and all(x.tobytes() == y.tobytes() for x, y in arrays)


def golden_matrix(one_of: int) -> np.ndarray:
    """fp16 [129, 500] from a fixed recurrence: about one in ``one_of`` elements is kept."""
    state = 12345
    out = np.zeros(129 * 500, np.uint16)
    for i in range(out.size):
        state = (1103515245 * state + 12345) % 2**31
        kept = (state >> 16) % one_of == 0
        out[i] = (state >> 8) & 0xFFFF if kept else (0x8000 if state % 1024 < 16 else 0)
    out[[0, 69, 9099]] = 0x7E00, 0x7C00, 0xFC00
    return out.reshape(129, 500).view(np.float16)


@pytest.mark.parametrize(
    ("name", "one_of", "how"), [("slot24_v4", 4, (248, 32, 4)), ("slot24_v4_groups", 8, (256, 64, 2))]
)
def test_golden_files(name: str, one_of: int, how: tuple[int, int, int]) -> None:
    """Byte for byte. The files were made by slot24_reference and never change."""
    a = golden_matrix(one_of)
    w = Slot24.load(GOLDEN / f"{name}.safetensors")
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), cases.pruned(a))
    assert (w.window, w.part_rows, w.group_values) == how
    assert w.window == 256 or (w.columns >= 248).any(), "dummies"
    assert w.window == 256 or Places.unpack(w.places).lags[1].max() > 10
    assert same(Slot24.from_dense(a), w)


@pytest.mark.parametrize("part_rows", [32, 64])
@pytest.mark.parametrize("group_values", [2, 4])
def test_files(group_values: int, part_rows: int, tmp_path: Path) -> None:
    a = cases.matrix("uniform", 200, 300, 0.1, 5, "bf16")
    w = Slot24.from_dense(a, window=176, part_rows=part_rows, group_values=group_values)
    w.save(tmp_path / "w")
    assert same(Slot24.load(tmp_path / "w"), w)


@pytest.mark.parametrize("name", ["window", "part_rows", "group_values"])
def test_files_say_how_columns_are_paired(name: str) -> None:
    w = Slot24.from_dense(cases.matrix("uniform", 200, 300, 0.2, 5, "bf16"))
    metadata = w.metadata()
    del metadata[name]
    with pytest.raises(FormatError, match=f"{name}: expected an entry in the metadata"):
        Slot24.from_parts(metadata, w.arrays())
