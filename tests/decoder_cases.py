# SPDX-License-Identifier: Apache-2.0
"""Cases of the row-wise kernels of a decoder, against float64, for the emulator and for a GPU alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.decoder import activate, append, embed, norm
from flashllm.formats.base import DTYPES, DType
from flashllm.formats.bits import to_bits, widen
from flashllm.formats.sources import to_host
from flashllm.jit.spec import KernelSpec

Floats = NDArray[np.float64]
Start = Callable[[KernelSpec, Sequence[int], Sequence[Any], Sequence[Any]], object]
"""Runs a kernel; the last argument holds those of the arrays that the previous launch may have written."""

NAN = 0x7FDA
"""A NaN in fp16 and bf16; two of them are a NaN in fp32, and as int32 an index that is out of range."""
_GUARD = 1 << 15  # 16-bit elements before and behind an array
_ROWS = 3


class Machine:
    """Where a case runs. Its arrays lie between NaNs, which must still be there at the end."""

    def __init__(self, xp: Any, start: Start) -> None:
        self._xp, self._start = xp, start
        self._guards: list[Any] = []
        self._constants: set[int] = set()

    def put(self, host: NDArray[Any], *, constant: bool = False) -> Any:
        """A copy of ``host``; ``constant`` if no launch ever writes it."""
        size = host.nbytes // 2
        room = self._xp.full(size + 2 * _GUARD + 8, NAN, np.uint16)
        begin = _GUARD + (-room.ctypes.data // 2 % 8 if self._xp is np else 0)
        array = room[begin : begin + size].view(host.dtype).reshape(host.shape)
        array[...] = self._xp.asarray(host)
        self._guards += [room[:begin], room[begin + size :]]
        if constant:
            self._constants.add(id(array))
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of NaNs."""
        words = np.dtype(dtype).itemsize // 2
        return self.put(np.full((*shape[:-1], shape[-1] * words), NAN, np.uint16).view(dtype))

    def launch(self, spec: KernelSpec, grid: Sequence[int], args: Sequence[Any]) -> None:
        dependent = [arg for arg in args if not isinstance(arg, np.generic) and id(arg) not in self._constants]
        self._start(spec, grid, args, dependent)

    def check(self) -> None:
        """Nothing was written outside the arrays."""
        assert all(bool((guard == NAN).all()) for guard in self._guards), "written beside an array"


class Halves:
    """Random numbers of one type: on the machine, and as float64."""

    def __init__(self, machine: Machine, dtype: DType, seed: int) -> None:
        self._machine, self.dtype = machine, dtype
        self.rng = np.random.default_rng(seed)
        self.type: Any = np.float16 if dtype == "fp16" else np.uint16

    def put(self, values: Floats, *, constant: bool = False) -> tuple[Any, Floats]:
        """``values``, rounded: on the machine, and as float64."""
        bits = to_bits(values, self.dtype)
        return self._machine.put(bits.view(self.type), constant=constant), widen(bits, self.dtype).astype(np.float64)

    def normal(self, *shape: int, scale: float = 1.0, constant: bool = False) -> tuple[Any, Floats]:
        return self.put(self.rng.normal(0, scale, shape), constant=constant)

    def optional(self, wanted: bool, *shape: int) -> tuple[Any, Any]:
        """Constants, or ``None`` and a zero that adds nothing."""
        return self.normal(*shape, constant=True) if wanted else (None, 0.0)

    def empty(self, *shape: int) -> Any:
        return self._machine.empty(shape, self.type)

    def bits(self, array: Any) -> NDArray[np.uint16]:
        return to_host(array).view(np.uint16)

    def assert_rounded(self, array: Any, want: Floats, scale: Floats) -> None:
        """``array`` is ``want``, up to one rounding and a few fp32 roundings of numbers as large as ``scale``."""
        got = widen(self.bits(array), self.dtype).astype(np.float64)
        digits, least = (11, -24) if self.dtype == "fp16" else (8, -133)
        ulp = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - digits, least))
        excess = np.abs(got - want) - (ulp / 2 + 2.0**-20 * scale)
        assert np.isfinite(got).all()
        assert (excess <= 0).all(), f"{excess.max()} at {np.unravel_index(excess.argmax(), excess.shape)}"


def embedding(machine: Machine, dtype: DType, hidden: int, learned: bool) -> None:
    """Sums of two 16-bit numbers are exact except for the rounding to fp32, so results are equal."""
    halves = Halves(machine, dtype, hidden)
    table, table64 = halves.normal(11, hidden, constant=True)
    rows, rows64 = halves.normal(9, hidden, constant=True) if learned else (None, np.zeros((9, hidden)))
    tokens, positions = np.array([10, 0, 7], np.int32), np.array([0, 6, 3], np.int32)
    residual = machine.empty((_ROWS, hidden), np.float32)
    embed.embed(
        machine.launch, dtype=dtype, tokens=machine.put(tokens), positions=machine.put(positions), table=table,
        residual=residual, position_table=rows, position_offset=2,
    )  # fmt: skip
    want = (table64[tokens] + rows64[positions + 2]).astype(np.float32)
    np.testing.assert_array_equal(to_host(residual), want)
    machine.check()


def embedding_of_nothing(machine: Machine, dtype: DType, hidden: int) -> None:
    halves = Halves(machine, dtype, 0)
    table, table64 = halves.normal(11, hidden, constant=True)
    rows, _ = halves.put(np.zeros((9, hidden)), constant=True)
    tokens = np.array([-1, 11, 3, 3, 3], np.int32)
    positions = np.array([0, 0, -3, 7, 6], np.int32)  # rows -1, 9 and 8 after the offset
    residual = machine.empty((len(tokens), hidden), np.float32)
    embed.embed(
        machine.launch, dtype=dtype, tokens=machine.put(tokens), positions=machine.put(positions), table=table,
        residual=residual, position_table=rows, position_offset=2,
    )  # fmt: skip
    got = to_host(residual)
    assert np.isnan(got[:4]).all()
    np.testing.assert_array_equal(got[4], table64[3].astype(np.float32))
    machine.check()


def normalised(
    machine: Machine, dtype: DType, kind: str, hidden: int, parts: int, y_biased: bool, biased: bool
) -> None:
    """y, in ``parts`` parts or none, is added to the residual stream. Several parts have more rows than are added.
    Where y has parts but no bias, x overwrites the first part.
    """
    halves = Halves(machine, dtype, hidden)
    start = halves.rng.normal(0, 1, (_ROWS, hidden)).astype(np.float32)
    start[1] += 1000  # a variance from sums of squares would lose all its digits
    start[2] *= 1e-4  # so that eps matters
    residual = machine.put(start)
    y, y64 = halves.normal(parts, _ROWS + max(0, parts - 1), hidden) if parts else (None, np.zeros((0, _ROWS, hidden)))
    y_bias, y_bias64 = halves.optional(y_biased, hidden)
    weight, weight64 = halves.normal(hidden, constant=True)
    bias, bias64 = halves.optional(biased, hidden)
    x = halves.empty(_ROWS, hidden) if y_biased or not parts else y[0, :_ROWS]
    norm.add_norm(
        machine.launch, dtype=dtype, kind=kind, residual=residual, x=x, weight=weight, eps=1e-5, bias=bias,
        y=y, y_bias=y_bias,
    )  # fmt: skip
    got, want = to_host(residual), start
    for one in (*y64[:, :_ROWS], y_bias64):
        want = want + np.float32(one)  # in fp32, in this order
    np.testing.assert_array_equal(got, want)
    # Computed from the sum as it was stored: what fp32 lost there is not an error of the norm.
    total = got.astype(np.float64)
    centred = total - total.mean(axis=1, keepdims=True) if kind == "layer" else total
    factor = weight64 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    halves.assert_rounded(x, centred * factor + bias64, np.abs(total * factor) + np.abs(bias64))
    machine.check()


def appended(
    machine: Machine, dtype: DType, heads: int, kv_heads: int, head_dim: int, biased: bool, normed: bool, turned: bool
) -> None:
    """Rows 0, 2 and 4 go to the cache; row 1 has a slot, and row 3 a position, that the cache does not have."""
    halves = Halves(machine, dtype, head_dim)
    rows, slot_count, capacity, all_heads = 5, 4, 6, heads + 2 * kv_heads
    slots, positions = np.array([3, -1, 0, 2, 3], np.int32), np.array([5, 2, 0, 6, 1], np.int32)
    qkv, qkv64 = halves.normal(rows, all_heads * head_dim)
    bias, bias64 = halves.optional(biased, all_heads * head_dim)
    q_norm, q_norm64 = halves.optional(normed, head_dim)
    k_norm, k_norm64 = halves.optional(normed, head_dim)
    angles = halves.rng.uniform(0, 7, (capacity + 1, head_dim // 2))
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    q = halves.empty(rows, heads, head_dim)
    keys, values = (halves.empty(slot_count, kv_heads, capacity, head_dim) for _ in range(2))
    append.append(
        machine.launch, dtype=dtype, qkv=qkv, slots=machine.put(slots), positions=machine.put(positions), q=q,
        keys=keys, values=values, bias=bias, rotation=machine.put(turns, constant=True) if turned else None,
        q_norm=q_norm, k_norm=k_norm, eps=1e-6,
    )  # fmt: skip

    here = np.array([0, 2, 4])
    split = (qkv64 + bias64).reshape(rows, all_heads, head_dim)[here]
    want = dict(zip("qkv", np.split(split, [heads, heads + kv_heads], axis=1), strict=True))
    scale = {name: np.abs(part) for name, part in want.items()}
    for name, weight64 in (("q", q_norm64), ("k", k_norm64)):
        part = want[name]
        if normed:
            part = part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + 1e-6) * weight64
        left, right = np.split(part, 2, axis=-1)
        scale[name] = np.tile(np.abs(left) + np.abs(right), 2)
        if turned:
            cos, sin = np.moveaxis(turns.astype(np.float64)[positions[here], None], -1, 0)
            left, right = left * cos - right * sin, right * cos + left * sin
        want[name] = np.concatenate([left, right], axis=-1)
    halves.assert_rounded(to_host(q)[here], want["q"], scale["q"])
    assert (halves.bits(q)[[1, 3]] == NAN).all()
    for name, cache in (("k", keys), ("v", values)):
        halves.assert_rounded(to_host(cache)[slots[here], :, positions[here]], want[name], scale[name])
        untouched = halves.bits(cache).copy()
        untouched[slots[here], :, positions[here]] = NAN
        assert (untouched == NAN).all()
    machine.check()


def rectified(machine: Machine, dtype: DType, columns: int, biased: bool, in_place: bool) -> None:
    halves = Halves(machine, dtype, columns)
    y, y64 = halves.normal(_ROWS, columns)
    bias, bias64 = halves.optional(biased, columns)
    x = y if in_place else halves.empty(_ROWS, columns)
    activate.relu(machine.launch, dtype=dtype, y=y, bias=bias, x=x)
    halves.assert_rounded(x, np.maximum(y64 + bias64, 0), np.abs(y64 + bias64))
    machine.check()


def gated(machine: Machine, dtype: DType, columns: int, biased: bool) -> None:
    halves = Halves(machine, dtype, columns)
    y, y64 = halves.normal(_ROWS, 2 * columns, scale=4.0)
    bias, bias64 = halves.optional(biased, 2 * columns)
    x = halves.empty(_ROWS, columns)
    activate.silu_mul(machine.launch, dtype=dtype, y=y, bias=bias, x=x)
    gate, up = np.split(y64 + bias64, 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    # exp(-|gate|) multiplies the rounding of gate + bias.
    halves.assert_rounded(x, want, np.abs(want) * (1 + np.abs(gate)))
    machine.check()


def extreme(machine: Machine, dtype: DType, columns: int) -> None:
    """Extreme gates neither overflow nor lose small results; a NaN is not hidden."""
    halves = Halves(machine, dtype, 0)
    gates = np.zeros((1, columns))
    gates[0, :7] = [60000, -60000, 100, -100, -14, np.nan, 0]
    y, y64 = halves.put(np.concatenate([gates, np.ones_like(gates)], axis=1))
    x = halves.empty(1, columns)
    activate.silu_mul(machine.launch, dtype=dtype, y=y, x=x)
    activate.relu(machine.launch, dtype=dtype, y=y, x=y)
    got = widen(halves.bits(x), dtype)[0]
    gate = y64[0, :columns]
    assert np.isnan(got[5])
    got[5] = gate[5] = 0
    with np.errstate(over="ignore"):
        want = gate / (1 + np.exp(-gate))
    halves.assert_rounded(to_bits(got, dtype), want, np.abs(want) * (1 + np.abs(gate)))
    positive = widen(halves.bits(y), dtype)[0, :columns]
    np.testing.assert_array_equal(positive, [*np.maximum(y64[0, :5], 0), np.nan, *[0] * (columns - 6)])
    machine.check()


def _cases() -> dict[str, Callable[[Machine], None]]:
    found: dict[str, Callable[..., None]] = {}
    for dtype in DTYPES:
        for hidden, learned in ((8, True), (1040, False), (131, True), (7, False)):
            found[f"embed-{dtype}-{hidden}"] = partial(embedding, dtype=dtype, hidden=hidden, learned=learned)
        for hidden in (16, 7):
            found[f"embed-nothing-{dtype}-{hidden}"] = partial(embedding_of_nothing, dtype=dtype, hidden=hidden)
        for hidden, parts, y_biased, biased in _NORMS:
            for kind in norm.KINDS:
                found[f"norm-{kind}-{dtype}-{hidden}"] = partial(
                    normalised, dtype=dtype, kind=kind, hidden=hidden, parts=parts, y_biased=y_biased, biased=biased
                )
        for heads, kv_heads, head_dim, biased, normed, turned in _HEADS:
            found[f"append-{dtype}-{heads}-{kv_heads}-{head_dim}"] = partial(
                appended, dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, biased=biased, normed=normed,
                turned=turned,
            )  # fmt: skip
        for columns, biased, in_place in ((8, False, True), (1160, True, False), (131, True, True), (7, False, False)):
            found[f"relu-{dtype}-{columns}"] = partial(
                rectified, dtype=dtype, columns=columns, biased=biased, in_place=in_place
            )
        for columns, biased in ((8, False), (1160, True), (131, True), (7, False)):
            found[f"silu-{dtype}-{columns}"] = partial(gated, dtype=dtype, columns=columns, biased=biased)
        for columns in (8, 7):
            found[f"extreme-{dtype}-{columns}"] = partial(extreme, dtype=dtype, columns=columns)
    return found


_NORMS = (  # every instance, at the ends of its range; the last three have no whole vectors, or too many
    (8, 1, True, True), (1024, 0, False, True), (1032, 1, False, True), (4096, 8, True, False), (4104, 6, True, True),
    (8200, 2, False, False), (16384, 7, True, True), (577, 1, True, True), (7, 5, False, False),
    (16392, 2, True, False),
)  # fmt: skip
_HEADS = (  # all ways that head_dim maps to lanes of a warp; more heads than a block has; with and without each step
    (2, 1, 8, True, False, False), (3, 1, 24, False, True, True), (12, 4, 64, True, False, True),
    (9, 3, 80, False, False, True), (16, 8, 128, True, True, True), (3, 1, 248, True, True, False),
    (2, 2, 256, False, True, True),
)  # fmt: skip
CASES = _cases()
