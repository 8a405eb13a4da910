# SPDX-License-Identifier: Apache-2.0
"""The soak program draws the same case from the same number, covers what it claims, and notices a wrong product."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

import soak
from flashllm.backends import emulator
from weight_cases import PATTERNS


def test_cases_repeat_and_cover_the_ground() -> None:
    cases = [soak.draw(number, 2**16) for number in range(400)]
    assert cases == [soak.draw(number, 2**16) for number in range(400)]
    assert all(m * k <= 2**16 and m >= 1 and k >= 1 for m, k in (case["shape"] for case in cases))
    assert {case["pattern"] for case in cases} == set(PATTERNS)
    assert {case["dtype"] for case in cases} == {"fp16", "bf16"}
    assert any(case["shape"][1] % 8 for case in cases)
    assert any(case["n"] > 64 for case in cases)


def test_one_case_by_number() -> None:
    result = CliRunner().invoke(soak.main, ["--case", "7"])
    assert result.exit_code == 0, result.output
    assert "1 products, all exact" in result.output


def test_a_wrong_product_names_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    right = emulator.spmm

    def wrong(*args: object, **options: object) -> object:
        y, counts = right(*args, **options)  # type: ignore[arg-type]
        y = y.copy()
        y[0, 0] = np.nan
        return y, counts

    monkeypatch.setattr(emulator, "spmm", wrong)
    result = CliRunner().invoke(soak.main, ["--case", "7"])
    assert result.exit_code != 0
    assert "case 7 failed; repeat it with --case 7" in result.output
