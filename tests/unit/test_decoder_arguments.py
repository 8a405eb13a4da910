# SPDX-License-Identifier: Apache-2.0
"""What the host functions of the row-wise kernels refuse, and what they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashllm.decoder import activate, append, embed, norm, rows
from flashllm.decoder.arrays import check
from flashllm.errors import ArgumentError
from flashllm.jit.sources import cuda_root
from flashllm.jit.spec import KernelSpec

R, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, SLOTS, CAPACITY = 3, 64, 2, 1, 16, 4, 5
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def half(*shape: int) -> Any:
    return np.zeros(shape, np.float16)


def index(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


def single(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def embed_arguments() -> dict[str, Any]:
    return {
        "tokens": index(R), "positions": index(R), "table": half(9, HIDDEN), "residual": single(R, HIDDEN),
        "position_table": half(7, HIDDEN),
    }  # fmt: skip


def norm_arguments() -> dict[str, Any]:
    return {
        "kind": "layer", "residual": single(R, HIDDEN), "x": half(R, HIDDEN), "weight": half(HIDDEN), "eps": 1e-5,
        "bias": half(HIDDEN), "y": half(2, R, HIDDEN), "y_bias": half(HIDDEN),
    }  # fmt: skip


def append_arguments() -> dict[str, Any]:
    cache = (SLOTS, KV_HEADS, CAPACITY, HEAD_DIM)
    return {
        "qkv": half(R, WIDTH), "slots": index(R), "positions": index(R), "q": half(R, HEADS, HEAD_DIM),
        "keys": half(*cache), "values": half(*cache), "bias": half(WIDTH), "q_norm": half(HEAD_DIM),
        "rotation": single(CAPACITY, HEAD_DIM // 2, 2), "k_norm": half(HEAD_DIM), "eps": 1e-6,
    }  # fmt: skip


def relu_arguments() -> dict[str, Any]:
    return {"y": half(R, HIDDEN), "bias": half(HIDDEN), "x": half(R, HIDDEN)}


def silu_arguments() -> dict[str, Any]:
    return {"y": half(R, 2 * HIDDEN), "bias": half(2 * HIDDEN), "x": half(R, HIDDEN)}


FUNCTIONS: dict[Callable[..., None], Callable[[], dict[str, Any]]] = {
    embed.embed: embed_arguments,
    norm.add_norm: norm_arguments,
    append.append: append_arguments,
    activate.relu: relu_arguments,
    activate.silu_mul: silu_arguments,
}
FIRST = {"embed": "table", "add_norm": "x", "append": "q", "relu": "y", "silu_mul": "y"}  # the first of the type


def refused(function: Callable[..., None], arguments: dict[str, Any], dtype: str = "fp16") -> str:
    """The argument that the error names."""

    def launch(spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
        raise AssertionError("launched")

    with pytest.raises(ArgumentError) as error:
        function(launch, dtype=dtype, **arguments)
    return error.value.argument


def launched(function: Callable[..., None], arguments: dict[str, Any], dtype: str = "fp16") -> list[Any]:
    """The instance, the grid and the arguments of the one launch."""
    calls: list[list[Any]] = []
    function(lambda *call: calls.append(list(call)), dtype=dtype, **arguments)
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_array_is_checked(function: Callable[..., None]) -> None:
    """The type, number of dimensions, each size, layout and alignment of each one."""
    arguments = FUNCTIONS[function]()
    launched(function, arguments)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray):
            continue
        padded = np.zeros((*array.shape[:-1], array.shape[-1] + 1), array.dtype)[..., :-1]
        wrong = [list(array), array.astype(np.float64), array[None], array[:0]]
        if array.ndim > 1 and array.shape[0] > 1:
            wrong.append(padded)
        if array.dtype != np.int32:
            wrong.append(np.zeros(array.size + 1, array.dtype)[1:].reshape(array.shape))
        for one in wrong:
            # A size that is this array's to say makes those after it wrong: one of these is named.
            assert refused(function, {**arguments, name: one}) == name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_sizes_agree(function: Callable[..., None]) -> None:
    arguments = FUNCTIONS[function]()
    own = {  # sizes that describe the model or the cache, not the launch
        ("embed", "table"): [0], ("embed", "position_table"): [0], ("append", "rotation"): [0],
        ("add_norm", "y"): [0, 1],
    }  # fmt: skip
    for name, array in arguments.items():
        if isinstance(array, np.ndarray):
            for axis in range(array.ndim):
                shape = list(array.shape)
                shape[axis] += 8
                larger = {**arguments, name: np.zeros(shape, array.dtype)}
                if axis in own.get((function.__name__, name), []):
                    launched(function, larger)
                else:
                    refused(function, larger)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_types(function: Callable[..., None]) -> None:
    arguments = FUNCTIONS[function]()
    for dtype, kinds in (("bf16", (np.uint16, ml_dtypes.bfloat16)), ("fp16", (np.float16,))):
        for kind in kinds:
            other = {
                name: a.view(kind) if isinstance(a, np.ndarray) and a.dtype == np.float16 else a
                for name, a in arguments.items()
            }
            spec = launched(function, other, dtype)[0]
            assert spec.template[0] == ("T", {"fp16": "__half", "bf16": "__nv_bfloat16"}[dtype])
    assert refused(function, arguments, "bf16") == FIRST[function.__name__]
    assert refused(function, arguments, "float16") == "dtype"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_absent_arrays_are_null_pointers(function: Callable[..., None]) -> None:
    optional = {"bias", "y", "y_bias", "q_norm", "k_norm", "rotation", "position_table"}
    required = {"y"} if function in (activate.relu, activate.silu_mul) else set()
    arguments = FUNCTIONS[function]()
    absent = (optional - required) & arguments.keys()
    args = launched(function, {k: v for k, v in arguments.items() if k not in absent})[2]
    assert sum(type(a) is np.uint64 and a == 0 for a in args) == len(absent)
    assert not any(a is None for a in args)


@pytest.mark.parametrize(
    ("function", "changes", "named"),
    [
        (norm.add_norm, {"kind": "batch"}, "kind"),
        (norm.add_norm, {"eps": 0.0}, "eps"),
        (norm.add_norm, {"eps": float("nan")}, "eps"),
        (norm.add_norm, {"y": None}, "y_bias"),
        (norm.add_norm, {"y": half(2, R - 1, HIDDEN)}, "y"),
        (append.append, {"eps": -1.0}, "eps"),
        (append.append, {"q_norm": None}, "k_norm"),
        (append.append, {"k_norm": None}, "k_norm"),
        (append.append, {"rotation": single(CAPACITY - 1, HEAD_DIM // 2, 2)}, "rotation"),
        (append.append, {"q": half(R, HEADS, 20)}, "q"),
        (append.append, {"q": half(R, HEADS, 264)}, "q"),
        (activate.silu_mul, {"y": half(R, 129)}, "y"),
    ],
)
def test_refusals(function: Callable[..., None], changes: dict[str, Any], named: str) -> None:
    assert refused(function, {**FUNCTIONS[function](), **changes}) == named


def test_sizes_that_kernels_count() -> None:
    """Kernels count twice such sizes in 32 bits. An array that repeats one element can have any size."""
    for dtype, kind in (("fp16", np.float16), ("int32", np.int32)):
        largest, larger = (np.broadcast_to(kind(0), (1, 2**30 + more)) for more in (0, 1))
        with pytest.raises(ArgumentError, match=r"^q: expected a C-contiguous array"):
            check("q", largest, (1, "columns"), dtype)
        with pytest.raises(ArgumentError, match=r"^q: expected sizes of at most 1073741824, got \[1, 1073741825\]$"):
            check("q", larger, (1, "columns"), dtype)


def test_messages_say_what_was_expected() -> None:
    for array, shape, message in (
        (half(3, 4), ("rows", 5), r"^q: expected fp16 \[rows, 5\], got float16 \[3, 4\]$"),
        ([1.0], (1,), r"^q: expected a NumPy or CuPy array, fp16 \[1\], got list$"),
        (half(4, 3).T, (3, 4), r"^q: expected a C-contiguous array, fp16 \[3, 4\], got strides \(2, 6\)$"),
        (half(9)[1:], (8,), r"^q: expected an array aligned to 16 bytes, got address 0x[0-9a-f]+$"),
    ):
        with pytest.raises(ArgumentError, match=message):
            check("q", array, shape, "fp16")


@pytest.mark.parametrize(
    ("hidden", "name", "threads", "vectors"),
    [
        (8, "add_norm", 128, "1"),
        (1024, "add_norm", 128, "1"),
        (1032, "add_norm", 512, "1"),
        (7168, "add_norm", 512, "2"),
        (12288, "add_norm", 512, "4"),
        (16384, "add_norm", 512, "4"),
        (16392, "add_norm_any", 512, None),
        (1001, "add_norm_any", 512, None),
    ],
)
def test_the_block_of_a_norm_holds_the_row(hidden: int, name: str, threads: int, vectors: str | None) -> None:
    arguments = {
        "kind": "rms",
        "residual": single(R, hidden),
        "x": half(R, hidden),
        "weight": half(hidden),
        "eps": 1e-5,
    }
    spec, grid, _ = launched(norm.add_norm, arguments)
    assert (spec.name, spec.threads, dict(spec.template).get("kVectors")) == (name, threads, vectors)
    assert tuple(grid) == (R,)
    assert spec in norm.specs()


def test_constants_are_those_of_the_device_code() -> None:
    text = (cuda_root() / "flashllm" / "rows.cuh").read_text()
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    assert int(constants["kVector"]) == rows.VECTOR
    assert int(constants["kThreads"]) == rows.THREADS
    for spec in norm.specs():
        assert dict(spec.template)["kThreads"] == str(spec.threads)
