# SPDX-License-Identifier: Apache-2.0
"""The systems we compare with: right results from a captured graph, for every way that each of them can run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flashllm import graphs
from flashllm.baselines import SYSTEMS, parse_systems, weight_class
from flashllm.baselines.baseline import kernel_ways, run
from flashllm.baselines.pattern_24 import keep_two_of_four
from flashllm.bench import check, results
from flashllm.bench.data import random_matrix, to_float64
from flashllm.cli import bench
from flashllm.device import device_facts
from products import assert_exact, exact, integers, weight

pytestmark = pytest.mark.gpu

_GUARD = 256  # elements; a multiple of 16 bytes
NAMES = [name for name, entry in SYSTEMS.items() if entry.weight is not None]


def _usable(name: str) -> Any:
    if name not in parse_systems("all"):
        pytest.skip(f"{name} needs {' and '.join(SYSTEMS[name].needs)}")
    return weight_class(name)


def _matrix(name: str, shape: tuple[int, int], density: float) -> Any:
    kind = SYSTEMS[name].matrix
    dense = random_matrix(
        *shape, density=density if kind == "given" else 1.0, seed=3, std=shape[1] ** -0.5, device=True
    )
    return keep_two_of_four(dense) if kind == "2:4" else dense


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "n"), [((512, 1024), 8), ((1152, 640), 16), ((256, 4096), 64)], ids=str)
def test_every_way_is_right_in_a_graph(cp: Any, name: str, shape: tuple[int, int], n: int) -> None:
    made = _usable(name)
    dtype = getattr(made, "DTYPE", "fp16")
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        dense, x = _matrix(name, shape, 0.3), random_matrix(n, shape[1], seed=4, device=True)
        weight = made.from_dense(dense)
        other = weight.copy()
        w, inputs = (weight.multiplied(), made.inputs(x)) if hasattr(made, "multiplied") else (dense, x)
        reference = check.make_reference(to_float64(inputs, dtype), to_float64(w, dtype), cp.arange(shape[0]), dtype)
        weights = [weight, other]
        ways = made.ways(weights, x, stream) if hasattr(made, "ways") else kernel_ways(weights, x)
        assert ways
        for way in ways:
            way.launch(0, stream)
            graph = graphs.capture(lambda way=way: way.launch(1, stream), stream)
            check.poison(way.buffer(), dtype)
            graph.launch(stream)
            ratio = check.error_over_bound(to_float64(way.output(), dtype), reference)
            assert ratio <= way.error_limit, way.label


def _moved(packed: Any, cp: Any) -> Any:
    """A host weight with its arrays, and those of the weights it consists of, moved to the GPU."""
    changed = {}
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, np.ndarray):
            changed[field.name] = cp.asarray(value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _moved(value, cp)
    assert changed, "a weight without arrays"
    return dataclasses.replace(packed, **changed)


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [5, 16, 40, 64])
@pytest.mark.parametrize("shape", [(1, 1), (129, 65), (200, 456), (384, 203)], ids=str)
@pytest.mark.parametrize("name", ["sputnik", "sparta", "tca-bme", "mma-2:4"])
def test_our_kernels_are_exact(cp: Any, name: str, shape: tuple[int, int], n: int) -> None:
    """Every choice, at shapes that fill no tile; the output is poisoned, and what lies around it stays as it was.

    Everything except the products runs on the host: the sanitizers find races in CuPy kernels that an encoder launches.
    """
    made = weight_class(name)
    columns = made.LAYOUT == "column"
    w = weight("uniform", shape, 0.3, "fp16", seed=n)
    if SYSTEMS[name].matrix == "2:4":
        w = np.where(np.arange(shape[1]) % 4 < 2, w, np.float16(0))
    x = integers(np.random.default_rng(n), (n, shape[1]), "fp16")
    packed = _moved(made.from_dense(w), cp)
    taken = cp.asarray(np.ascontiguousarray(x.T) if columns else x)
    inside = slice(_GUARD, _GUARD + n * shape[0])
    for choice in packed.choices(n, sm_count=device_facts().sm_count):
        fenced = cp.asarray(np.full(n * shape[0] + 2 * _GUARD, np.nan, np.float16))
        y = fenced[inside].reshape((shape[0], n) if columns else (n, shape[0]))
        workspace = cp.asarray(np.full(max(16, packed.workspace_bytes(n, choice)), 0xFF, np.uint8))
        run(packed.steps(taken, y, workspace, choice))
        after = fenced.get()
        got = np.ascontiguousarray(after[inside].reshape(shape[0], n).T) if columns else after[inside].reshape(n, -1)
        assert_exact(got, exact(x, w, "fp16"))
        assert np.isnan(after[: inside.start]).all(), choice.label
        assert np.isnan(after[inside.stop :]).all(), choice.label


def test_bench_command_measures_them(cp: Any) -> None:
    case = ("--shape", "1024x2048", "--sparsity", "0.7,0.9", "--n", "8,64", "--time-cap", "0.02", "--json")
    result = CliRunner().invoke(bench.command, [*case, "--systems", "all"])
    assert result.exit_code == 0, result.output
    rows = [results.from_dict(json.loads(line)) for line in result.stdout.splitlines()]
    assert all(row.check == "pass" for row in rows)
    for name in parse_systems("all"):
        found = [row for row in rows if row.system == name]
        assert len(found) == (4 if SYSTEMS[name].matrix == "given" else 2), name
        assert all(row.speedup and row.kernel for row in found)
