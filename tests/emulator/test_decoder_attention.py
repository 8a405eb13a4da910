# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoder's rows on the CPU: decoding steps and whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

import attention_cases as cases
from attention_cases import (
    DECODE,
    GROUPED,
    PAIRED,
    PREFILL,
    Case,
    assert_close,
    assert_decoded,
    assert_means,
    expected,
    operands,
    plan_of,
)
from flashllm.backends import emulator
from flashllm.decoder import grouped_attention
from flashllm.decoder.attention import attention, plan_attention
from flashllm.decoder.attention import specs as decode_specs
from flashllm.decoder.prefill import prefill_attention
from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec

_seeds = count()


def launch(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
    """Each launch runs in another order. It must have waited for whatever the previous launch may have written."""
    emulator.launch(spec, grid, args, seed=next(_seeds), dependent=cases.dependent(spec, args))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """What the cases launch, compiled together."""
    found: set[KernelSpec] = set()

    def note(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
        found.add(spec)

    for case in DECODE:
        cases.decode(note, np, case, operands(case))
    for case in PREFILL:
        cases.prefill(note, np, case, operands(case))
    emulator.preload(sorted(found, key=lambda spec: spec.label))


def every(several: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", several, ids=lambda case: case.label)


@every(DECODE)
def test_decoding_is_within_the_bound(case: Case) -> None:
    given = operands(case)
    for splits in (1, 3):
        assert_decoded(case, given, cases.decode(launch, np, case, given, splits=splits))


@every((*DECODE[:4], GROUPED))
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_decoding_is_exact_for_equal_scores(case: Case, splits: int) -> None:
    """For any number of blocks that share the positions, including more than a row has work for."""
    given = operands(case, equal_scores=True)
    assert_means(case, given, cases.decode(launch, np, case, given, splits=splits))


@every((PAIRED, GROUPED))
def test_splits_may_come_in_any_order(case: Case) -> None:
    """All four are in flight together here; whichever finishes last, the bits are the same."""
    case = replace(case, heads=case.heads // case.kv_heads, kv_heads=1, ends=(300,))
    given = operands(case)
    results = [cases.decode(launch, np, case, given, splits=4) for _ in range(8)]
    assert_decoded(case, given, results[0])
    for got in results:
        np.testing.assert_array_equal(got.view(np.uint16), results[0].view(np.uint16))


@every((PAIRED, GROUPED))
def test_more_splits_than_a_thread_asks_for_at_once(case: Case) -> None:
    """The last of ten has scores so large that the sums of the others are negligible."""
    case = replace(case, capacity=640, ends=(640, 577))
    given = operands(case)
    given.keys[:, :, 576:] *= 32
    assert_decoded(case, given, cases.decode(launch, np, case, given, splits=10))


@every((PAIRED, GROUPED))
def test_long_rows_have_more_splits_than_others(case: Case) -> None:
    """Two of three blocks share 4100 positions and leave their sums; one block takes all of 2047 positions."""
    case = replace(case, heads=case.heads // case.kv_heads, kv_heads=1, capacity=4200, ends=(4100, 2047, 5))
    given = operands(case)
    counts: list[Any] = []

    def counted(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
        counts.append(emulator.launch(spec, grid, args))

    for splits in (3, 1):
        assert_decoded(case, given, cases.decode(counted, np, case, given, splits=splits, common=1))
    more = counts[0].global_write_bytes - counts[-1].global_write_bytes
    assert 2 <= more / (4 * case.heads * case.head_dim) < 3


@every((PAIRED, GROUPED))
def test_one_position_of_all_is_found(case: Case) -> None:
    """Its score is so much higher that the others' weights are zero: the output is its value."""
    given = operands(case)
    slot = case.slots[0]
    for at in (0, 7, 63, 64, 150, 299):
        given.keys[slot, :, at] = 8
        given.q[0] = 8
        got = cases.decode(launch, np, case, given, splits=4)[0].reshape(case.heads, case.head_dim)
        np.testing.assert_array_equal(got, given.values[slot, :, at].repeat(case.heads // case.kv_heads, axis=0))
        given.keys[slot, :, at] = 0


@every([case for case in DECODE if case.heads // case.kv_heads in range(3, 17)])
def test_groups_copy_keys_and_values_once(case: Case) -> None:
    """Whatever their heads are padded to; rows of tiles cover all banks."""
    counts: list[Any] = []
    cases.decode(lambda *given: counts.append(emulator.launch(*given)), np, case, operands(case), splits=1)
    elements = 2 * case.kv_heads * sum(case.ends)
    for one in counts:
        assert one.copy_async_bytes == 2 * case.head_dim * elements
        assert one.ldmatrix.wavefronts == one.ldmatrix.ideal > 0


@every((PAIRED, GROUPED))
@pytest.mark.parametrize(("slot", "position"), [(-1, 299), (6, 300), (2**31 - 1, 2**31 - 1)])
def test_rows_that_are_left_out(case: Case, slot: int, position: int) -> None:
    """Nothing is written for a row with a nonexistent slot or a negative position; the workspace still serves the other
    rows. A row with a position past the last one attends to its whole slot.
    """
    given = operands(case)
    want = expected(case, given, weights_rounded=case.is_grouped)
    absent = replace(given, slots=given.slots.copy(), positions=given.positions.copy())
    assert given.keys.shape[0::2] == (6, 300)
    absent.slots[1], absent.positions[3], absent.positions[0] = slot, -1, position
    got = cases.decode(launch, np, case, absent, splits=3)
    assert np.isnan(got[[1, 3]].astype(np.float32)).all()
    assert_close(got[[0, 2]], (want[0][[0, 2]], want[1][[0, 2]]))


@every(PREFILL)
def test_prefill_is_within_the_bound(case: Case) -> None:
    given = operands(case)
    assert_close(cases.prefill(launch, np, case, given), expected(case, given, weights_rounded=True))


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"slots": (5, -1), "positions": (6, -1)}, (1, 2)),
        ({"slots": (5, 6), "positions": (6, 85)}, (1, 2)),
        ({"slots": (5, 2**31 - 1), "positions": (6, 2**31 - 1)}, (1, 2)),
        ({"starts": (4, 90)}, (3,)),
        ({"starts": (0, -1)}, (0,)),
    ],
)
def test_prompts_that_are_left_out(changes: dict[str, tuple[int, int]], left_out: tuple[int, ...]) -> None:
    """Prompts with rows, a slot or positions that do not exist: nothing is written, and others are unaffected."""
    case = PREFILL[5]
    given = operands(case)
    assert (given.keys.shape[0], given.starts.tolist()) == (6, [0, 5, 6, 72, 89])
    want = expected(case, given, weights_rounded=True)
    absent = replace(given, **{name: getattr(given, name).copy() for name in changes})
    for name, (at, value) in changes.items():
        getattr(absent, name)[at] = value
    got = cases.prefill(launch, np, case, absent)
    written = np.ones(len(got), np.bool_)
    for sequence in left_out:
        written[given.starts[sequence] : given.starts[sequence + 1]] = False
    assert np.isnan(got[~written].astype(np.float32)).all()
    assert_close(got[written], (want[0][written], want[1][written]))


@every(PREFILL[3:6])
def test_prefill_is_exact_for_equal_scores(case: Case) -> None:
    given = operands(case, equal_scores=True)
    assert_means(case, given, cases.prefill(launch, np, case, given))


def test_splits_follow_from_the_work() -> None:
    """Few rows are each shared by many blocks, none of which has too few positions; many rows are not shared."""
    sizes: dict[str, int] = {"heads": 72, "kv_heads": 72, "head_dim": 128, "sm_count": 132}

    def splits(*, rows: int, capacity: int) -> tuple[int, int]:
        plan = plan_attention(rows=rows, capacity=capacity, **sizes)
        assert (plan.workspace_bytes == 0) == (plan.splits == 1)
        return plan.common_splits, plan.splits

    assert [splits(rows=rows, capacity=1000) for rows in (1, 2, 3, 4, 64)] == [(4, 4), (2, 2), (2, 2), (1, 1), (1, 1)]
    assert [splits(rows=1, capacity=capacity) for capacity in (63, 192, 8192, 16384)] == [
        (1, 1),
        (3, 3),
        (4, 4),
        (4, 8),
    ]
    assert [splits(rows=8, capacity=capacity) for capacity in (4095, 4096, 8192)] == [(1, 1), (1, 2), (1, 4)]
    sizes |= {"heads": 1, "kv_heads": 1, "head_dim": 8}
    assert splits(rows=9, capacity=(1 << 28) - 1) == (30, 65535)
    sizes |= {"heads": 64, "kv_heads": 8, "head_dim": 128}
    assert [splits(rows=rows, capacity=1000) for rows in (1, 64, 128)] == [(8, 8), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("group", "function", "block_heads", "blocks"),
    [
        (2, "decode_attention", 2, 1),
        (3, "grouped_attention", 3, 1),
        (16, "grouped_attention", 16, 1),
        (17, "grouped_attention", 9, 2),
        (40, "grouped_attention", 14, 3),
    ],
)
def test_heads_that_share_keys_are_few_blocks(group: int, function: str, block_heads: int, blocks: int) -> None:
    """A group is divided evenly, and the kernel has room for each part, in either kind of instance."""
    case = Case(dtype="fp16", heads=2 * group, kv_heads=2, head_dim=64, capacity=64, ends=(1,))
    launched: list[tuple[KernelSpec, Sequence[int]]] = []
    cases.decode(lambda spec, grid, args: launched.append((spec, grid)), np, case, operands(case))
    plan = plan_of(case, 1)
    assert (plan.block_heads, plan.grid[0], plan.is_grouped) == (block_heads, 2 * blocks, case.is_grouped)
    for spec, grid in launched:
        assert spec.function == f"flashllm::{function}"
        assert int(dict(spec.template)["kGroup"]) >= block_heads
        assert grid == plan.grid


def test_every_instance_can_be_launched() -> None:
    """The specs are exactly those that some sizes need."""
    launched: set[KernelSpec] = set()
    for dtype in cases.DTYPES:
        for group in (1, 2, 3, 16):
            for head_dim in (8, 64, 80, 96, 128, 256):
                case = Case(dtype=dtype, heads=group, kv_heads=1, head_dim=head_dim, capacity=1, ends=(1,))
                cases.decode(lambda spec, grid, args: launched.add(spec), np, case, operands(case))
    assert launched == {*decode_specs(), *grouped_attention.specs()}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"heads": 3}, "heads"),
        ({"head_dim": 12}, "head_dim"),
        ({"head_dim": 264}, "head_dim"),
        ({"rows": 0}, "rows"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": 2**28}, "capacity"),
        ({"heads": 2**15 + 2}, "heads"),
        ({"rows": 2**16}, "rows"),
    ],
)
def test_sizes_that_no_kernel_is_made_for(change: dict[str, int], name: str) -> None:
    sizes = {"rows": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "capacity": 128, "sm_count": 4} | change
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        plan_attention(**sizes)


@pytest.mark.parametrize("name", ["q", "keys", "values", "slots", "positions", "out", "workspace", "dtype"])
def test_operands_that_do_not_fit_the_plan(name: str) -> None:
    case = DECODE[3]
    given, plan = operands(case), plan_of(case, 4, 2)
    arrays: dict[str, Any] = {
        "q": given.q.view(np.uint16),
        "keys": given.keys.view(np.uint16),
        "values": given.values.view(np.uint16),
        "slots": given.slots,
        "positions": given.positions,
        "out": np.empty((4, case.heads * case.head_dim), np.uint16),
        "workspace": np.zeros(plan.workspace_bytes, np.uint8),
        "dtype": case.dtype,
    }
    arrays[name] = "fp32" if name == "dtype" else arrays[name][:-1].copy()
    with pytest.raises(ArgumentError, match=f"^{'values' if name == 'keys' else name}: "):
        attention(launch, plan, **arrays)


@pytest.mark.parametrize(("name", "wrong"), [("longest", 0), ("longest", 151), ("starts", np.zeros(1, np.int32))])
def test_prompts_that_are_none(name: str, wrong: Any) -> None:
    case = PREFILL[1]
    given = operands(case)
    arrays: dict[str, Any] = {key: getattr(given, key) for key in ("slots", "positions", "starts")}
    arrays |= {key: getattr(given, key).view(np.uint16) for key in ("q", "keys", "values")}
    arrays |= {"longest": 66, "out": np.empty((len(given.q), case.heads * case.head_dim), np.uint16), name: wrong}
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        prefill_attention(launch, dtype=case.dtype, **arrays)
