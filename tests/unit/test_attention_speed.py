# SPDX-License-Identifier: Apache-2.0
"""The script that times attention in a decoding step: the arguments it takes and the bytes it counts."""

from __future__ import annotations

from types import ModuleType

import pytest
from click.testing import CliRunner

from scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("attention_speed")


def test_a_case_is_planned_with_its_splits_or_those_asked_for(script: ModuleType) -> None:
    case = script.Case(heads=64, kv_heads=8, head_dim=128, batch=4, positions=320, capacity=640)
    planned, three = (case.plan(splits, sm_count=132) for splits in script.parse_splits("plan,3"))
    assert (planned.splits, three.splits, three.common_splits) == (2, 3, 3)
    assert three.grid == (8, 4, 3)


def test_keys_and_values_of_positions_count_as_read(script: ModuleType) -> None:
    case = script.Case(heads=6, kv_heads=2, head_dim=16, batch=3, positions=5, capacity=7)
    assert case.read_bytes == 2 * 2 * 3 * 2 * 5 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "64x8"], "--heads: expected HEADSxKV_HEADSxHEAD_DIM, got '64x8'"),
        (["--heads", "64x0x128"], "got '64x0x128'"),
        (["--splits", "plan,0"], "--splits: expected 'plan' or a number >= 1, got '0'"),
        (["--positions", "64,600", "--capacity", "320"], "--capacity: expected at least 600 positions, got 320"),
    ],
)
def test_what_cannot_be_timed_is_named(script: ModuleType, options: list[str], message: str) -> None:
    result = CliRunner().invoke(script.main, options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(("right", "mark"), [(True, ""), (False, "!")])
def test_a_wrong_result_is_marked(script: ModuleType, right: bool, mark: str) -> None:
    sizes = {"heads": 64, "kv_heads": 8, "head_dim": 128, "batch": 8, "positions": 320, "splits": 2}
    row = {**sizes, "median_us": 8.0, "fraction": 0.5, "read_gbps": 4000.0, "right": right}
    assert script.line(row).endswith(f"8.00 us{mark}, 50 % of 4000 GB/s")
