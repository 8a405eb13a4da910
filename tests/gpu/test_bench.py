# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flashllm.backends import dependent
from flashllm.bench import bandwidth, data, results, timing
from flashllm.bench.cases import PATTERNS
from flashllm.cli import bench, profile, tune
from flashllm.device import device_facts
from flashllm.formats.tiled_csl import TiledCSL

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_device_weights_are_the_host_weights(cp: Any, pattern: str, dtype: Any) -> None:
    options: dict[str, Any] = {"density": 0.3, "pattern": pattern, "seed": 5, "std": 0.02, "dtype": dtype}
    host = data.random_matrix(333, 517, **options)
    device = data.random_matrix(333, 517, **options, device=True)
    assert (host.view(np.uint16) == device.view(cp.uint16).get()).all()
    assert data.largest_magnitude(device, dtype) == data.largest_magnitude(host, dtype)


def test_read_bandwidth_is_plausible_and_repeats(cp: Any) -> None:
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        first = bandwidth.read_gbps(stream)
        again = bandwidth.read_gbps(stream)
    assert 100 < first < 20_000
    assert again == pytest.approx(first, rel=0.05)


def test_copies_have_buffers_of_their_own(cp: Any) -> None:
    weight = TiledCSL.from_dense(data.random_matrix(256, 128, density=0.2, device=True))
    copy = weight.copy()
    assert copy.words.data.ptr != weight.words.data.ptr
    assert (copy.words == weight.words).all()


class _Read:
    def __init__(self, cp: Any, n_bytes: int, copies: int) -> None:
        self.copies = copies
        self._cp = cp
        self._from = [cp.ones(n_bytes // 4, cp.float32) for _ in range(copies)]
        self._to = cp.empty_like(self._from[0])

    def launch(self, copy: int, stream: Any) -> None:
        self._cp.add(self._from[copy], 1.0, out=self._to)


def test_graph_times_scale_with_the_work(cp: Any) -> None:
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        small, large = _Read(cp, 2**26, 4), _Read(cp, 2**27, 4)
        stream.synchronize()
        one, two = timing.measure([small, large], timing.Method(), stream=stream)
    assert two.median_us / one.median_us == pytest.approx(2.0, rel=0.15)
    assert one.p20_us <= one.median_us <= one.p80_us


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16"), ("--l2", "warm"), ("--launch", "stream")])
def test_bench_command(cp: Any, options: tuple[str, ...]) -> None:
    case = ("--shape", "1024x2048", "--sparsity", "0.7,0.9", "--n", "8,16", "--time-cap", "0.02", "--json")
    result = CliRunner().invoke(bench.command, [*case, *options])
    assert result.exit_code == 0, result.output
    rows = [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]
    assert sum(row.system == "flashllm" for row in rows) == 4
    assert sum(row.system == "cublas" for row in rows) == 2
    for row in rows:
        assert row.check == "pass"
        assert row.median_us
        assert row.median_us > 0.5
        assert row.read_gbps
        assert row.speedup
        assert row.rotated_mb >= (500 if "warm" not in options else 0)


def test_bench_command_with_overlapping_launches(cp: Any) -> None:
    if device_facts().cc < dependent.LEAST_CC:
        pytest.skip("needs compute capability 9.0")
    case = ("--shape", "1024x2048", "--sparsity", "0.7,0.9", "--n", "8,64", "--time-cap", "0.02", "--pdl", "--json")
    for name in ("tiled-csl", "bitmap"):
        result = CliRunner().invoke(bench.command, [*case, "--format", name])
        assert result.exit_code == 0, result.output
        rows = [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]
        assert sum(row.system == "flashllm-pdl" and row.launch == "graph-pdl" for row in rows) == 4
        assert all(row.check == "pass" for row in rows)


def test_bench_command_on_odd_shapes_and_patterns(cp: Any) -> None:
    for pattern in ("columns", "skewed"):
        case = ("--shape", "1000x776", "--sparsity", "0.8", "--n", "3", "--time-cap", "0.02", "--pattern", pattern)
        result = CliRunner().invoke(bench.command, case)
        assert result.exit_code == 0, result.output


def test_profile_target_and_tune(cp: Any) -> None:
    target = ("--shape", "1024x1024", "--launch-only")
    assert CliRunner().invoke(profile.command, target, catch_exceptions=False).exit_code == 0
    case = ("--shape", "1024x1024", "--sparsity", "0.8", "--n", "8")
    assert CliRunner().invoke(tune.command, case, catch_exceptions=False).exit_code == 0
