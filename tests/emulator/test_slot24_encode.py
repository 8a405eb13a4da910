# SPDX-License-Identifier: Apache-2.0
"""The GPU's slot24 encoder and decoder, run on the CPU: the same bytes as NumPy's."""

from __future__ import annotations

import re
from typing import Any

import emulated_cupy
import numpy as np
import pytest
import test_bitmap_encode
from numpy.typing import NDArray

from flashllm.backends import emulator
from flashllm.encode import bitmap as bitmap_encoder
from flashllm.encode import slot24 as encoder
from flashllm.encode.source import BITS16, ROUNDING
from flashllm.errors import ArgumentError
from flashllm.formats import slot24_encode, slot24_groups, slot24_pairs
from flashllm.formats.base import RoundingReport
from flashllm.formats.bitmap import Bitmap
from flashllm.formats.bitmap_encode import GROUP
from flashllm.formats.runs import runs_of
from flashllm.formats.slot24 import Slot24
from flashllm.formats.slot24_encode import slots_shape
from flashllm.formats.slot24_parts import PARTS_OF, STEPS
from flashllm.formats.tiles import tile_grid
from flashllm.jit.sources import cuda_root
from flashllm.jit.spec import KernelSpec
from products import NUMPY_DTYPE
from weight_cases import PATTERNS, bits, pruned

SPECS = {(spec.name, tuple(text for _, text in spec.template)): spec for spec in encoder.specs()}
both_parts = pytest.mark.parametrize("part_rows", [32, 64])
SHAPES = ((1, 1), (128, 256), (127, 65), (130, 257), (33, 700))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    emulator.preload([*encoder.specs(), *bitmap_encoder.specs()])


def kernel(name: str, *template: object) -> KernelSpec:
    return SPECS[f"slot24_{name}", tuple(map(str, template))]


def encode(
    a: NDArray[Any],
    dtype: str,
    *,
    window: int | None = None,
    part_rows: int | None = None,
    group_values: int | None = None,
    shape: tuple[int, int] | None = None,
    seed: int = 0,
    sanitize: bool = False,
) -> tuple[Slot24 | None, NDArray[np.uint64]]:
    """Encode as flashllm.encode does on a GPU; also returns what the rounding did. ``None``: columns do not pair up.

    ``shape``: of the matrix that ``a`` begins with.
    """
    source = ROUNDING[dtype] if a.dtype == np.float32 else BITS16
    rows, columns = shape or a.shape
    strips = tile_grid((rows, columns))[0]
    matrix, size = (a, np.int64(a.shape[1])), (np.int32(rows), np.int32(columns))
    run: dict[str, Any] = {"seed": seed, "sanitize": sanitize}
    masks, totals = np.full((strips, 4, columns), 0xDEADBEEF, np.uint32), np.zeros(5, np.uint64)
    grid = (strips * 4 * -(-columns // 128),)
    emulator.launch(kernel("mark", source), grid, (*matrix, masks, totals, *size), **run)
    masks.flags.writeable = False
    for how in slot24_pairs.tried(window, part_rows, group_values, int(totals[0]) / (rows * columns)):
        parts, chosen = how.parts, how.window
        slots_of = slots_shape((rows, columns), chosen)
        pairs = np.full((strips * slots_of[1] // 64, 4, 32, parts.steps), 0xEE, np.uint8)
        failed = np.zeros(1, np.int32)
        problem = (masks, pairs, failed, np.int32(columns), np.int32(chosen))
        emulator.launch(kernel("pair", parts.rows, how.group_values), (len(pairs) // 2,), problem, **run)
        if not failed[0]:
            break
    else:
        return None, totals[1:]
    pairs.flags.writeable = False
    slots = np.full(slots_of, 0x7E5A, np.uint16)
    picks = np.full((len(pairs), 4, 32, 2), 0xDEADBEEF, np.uint32)
    filled = (masks, pairs, slots, picks, *size, np.int32(chosen))
    emulator.launch(kernel("fill", source, parts.rows), (len(pairs) // 2,), (*matrix, *filled), **run)
    packed, _ = test_bitmap_encode.encode(slots, dtype, group_values=how.group_values, **run)
    assert packed.nnz == totals[0]
    buffers = {name: getattr(packed, name) for name in Bitmap.BUFFERS}
    fields: dict[str, Any] = {"shape": (rows, columns), "dtype": dtype, "nnz": packed.nnz, "window": chosen}
    paired: dict[str, Any] = {"part_rows": parts.rows, "group_values": how.group_values}
    return Slot24(**fields, **paired, picks=picks, columns=pairs, **buffers), totals[1:]


def decode(w: Slot24, seed: int = 0, *, sanitize: bool = False, offset: int = 0) -> NDArray[np.uint16]:
    run: dict[str, Any] = {"seed": seed, "sanitize": sanitize, "offset": offset}
    return test_bitmap_encode.run_decoder(encoder.decode_arguments, w, **run)


def assert_same(got: Slot24 | None, want: Slot24) -> None:
    assert got is not None
    assert got.metadata() == want.metadata()
    for name, array in want.arrays().items():
        np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)


def same_bytes(
    patterns: NDArray[np.uint16],
    *,
    seed: int = 0,
    dtype: str = "fp16",
    **options: int | None,
) -> Slot24:
    want = Slot24.from_dense(patterns.view(NUMPY_DTYPE[dtype]), **options)
    assert_same(encode(patterns, dtype, seed=seed, **options)[0], want)
    np.testing.assert_array_equal(decode(want, seed), pruned(patterns))
    return want


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bytes_for_every_pattern(pattern: str) -> None:
    """Also for every shape; the number of rows that pair alike varies."""
    for seed, (shape, density) in enumerate(zip(SHAPES, (1.0, 0.2, 0.02, 0.24, 0.1), strict=True)):
        part_rows = (None, 32, 64)[(seed + PATTERNS.index(pattern)) % 3]
        a = bits(pattern, *shape, density, seed)
        same_bytes(a, part_rows=part_rows, seed=seed, dtype=("fp16", "bf16")[seed % 2])


@both_parts
@pytest.mark.parametrize("window", range(128, 257, 8))
def test_same_bytes_for_every_window(window: int, part_rows: int) -> None:
    """Dummies of all numbers of copies; a last window of one column, and of all."""
    options = {"window": window, "part_rows": part_rows}
    same_bytes(bits("uniform", 70, 2 * window + 1, 0.05, window), seed=window, **options)
    same_bytes(bits("per-row", 128, window, 0.09, window), seed=window + 1, **options)


@both_parts
def test_same_bytes_where_greedy_pairs_must_change(part_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lefts that find no partner at first, long paths, and windows that are abandoned during the search."""
    outcomes = []
    augment = slot24_pairs.augment

    def counted(fits: Any, left_order: Any, partner: Any) -> bool:
        before = partner.copy()
        done = augment(fits, left_order, partner)
        outcomes.append((done, int((before < 0).sum()), int(((before >= 0) & (before != partner)).sum())))
        return done

    monkeypatch.setattr(slot24_pairs, "augment", counted)
    monkeypatch.setattr(slot24_encode, "has_lonely_column", lambda masks, window: False)
    windows = set()
    for seed, density in enumerate((0.21, 0.23, 0.25, 0.26, 0.28, 0.3, 0.33, 0.4)):
        a = bits("uniform", 128, 500, density * (1 if part_rows == 32 else 0.7), seed)
        windows.add(same_bytes(a, part_rows=part_rows, group_values=4, seed=seed).window)
    assert len(windows) > 4
    assert {done for done, _, _ in outcomes} == {True, False}
    assert max(missing for done, missing, _ in outcomes if done) > 2
    assert max(changed for done, _, changed in outcomes if done) > 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bytes_with_two_values_in_a_group(pattern: str) -> None:
    """Also in windows with dummies, whose copies go to and fro over the residues, and where no such pairing exists."""
    for seed, (window, density) in enumerate(((256, 0.08), (248, 0.1), (232, 0.12), (136, 0.2), (128, 0.05))):
        part_rows = (32, 64)[(seed + PATTERNS.index(pattern)) % 2]
        options: dict[str, Any] = {"window": window, "part_rows": part_rows, "group_values": 2}
        patterns = bits(pattern, 130, window + 9, density, seed)
        try:
            want = Slot24.from_dense(patterns.view(np.float16), **options)
        except ArgumentError:
            assert encode(patterns, "fp16", seed=seed, **options)[0] is None
            continue
        assert_same(encode(patterns, "fp16", seed=seed, **options)[0], want)
        np.testing.assert_array_equal(decode(want, seed), pruned(patterns))


@pytest.mark.parametrize(
    ("part_rows", "window", "density", "attempts"),
    [(64, 256, 0.12, 5), (32, 256, 0.14, 4), (32, 232, 0.16, 8), (32, 232, 0.2, 0)],
)
def test_same_bytes_after_several_attempts(
    part_rows: int, window: int, density: float, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that the first attempts do not find, that only a careless one finds, and that none finds."""
    tried: list[bool] = []
    arrange = slot24_groups._arrange

    def counted(*problems: Any, careful: bool) -> Any:
        tried.append(careful)
        return arrange(*problems, careful=careful)

    monkeypatch.setattr(slot24_groups, "_arrange", counted)
    options: dict[str, Any] = {"window": window, "part_rows": part_rows, "group_values": 2}
    patterns = bits("uniform", 128, window + 5, density, 3)
    if attempts == 0:
        with pytest.raises(ArgumentError, match="window"):
            Slot24.from_dense(patterns.view(np.float16), **options)
        assert len(tried) == slot24_groups.ATTEMPTS
        assert encode(patterns, "fp16", **options)[0] is None
    else:
        same_bytes(patterns, seed=1, **options)
        assert len(tried) == attempts
    assert all(tried) == (attempts in (4, 5))


@pytest.mark.parametrize("dense", [1, 5, 13, 40, 64])
def test_dense_columns_and_rows(dense: int) -> None:
    """Each dense left needs a dummy, or an empty right; dense rows need all of them."""
    a = np.zeros((140, 300), np.uint16)
    number = np.arange(128)
    a[:, 128 + number[number & 4 == 0][:dense]] = 0xC000
    a[3, np.arange(300) & 4 != 0] = 0x3C00
    assert same_bytes(a, seed=dense).window < 256
    a[60] = 0x3C00
    assert same_bytes(a, seed=dense).window == 128


def test_windows_in_which_columns_do_not_pair_up() -> None:
    a = np.zeros((130, 600), np.uint16)
    a[129, 256:512] = 0x3C00
    for window, fits in ((256, False), (248, False), (136, False), (128, True)):
        for part_rows in (None, 32, 64):
            found = encode(a, "fp16", window=window, part_rows=part_rows, seed=window)[0]
            assert (found is not None) == fits


def test_empty_matrix() -> None:
    """Zeros of either sign: every pair is as good as any other."""
    for shape in ((3, 300), (129, 8)):
        w = same_bytes(np.full(shape, 0x8000, np.uint16))
        assert (w.nnz, w.window, w.part_rows) == (0, 256, 64)


def test_rows_of_a_wider_matrix() -> None:
    """The pitch is not the number of columns: what lies outside the matrix is neither read nor stored."""
    whole = bits("uniform", 140, 310, 0.2, 5)
    for shape in ((140, 300), (140, 64), (129, 1), (1, 260)):
        part = np.ascontiguousarray(whole[: shape[0], : shape[1]])
        assert_same(encode(whole, "fp16", shape=shape, seed=3)[0], Slot24.from_dense(part.view(np.float16)))
    floats = np.full((130, 270), np.nan, np.float32)
    floats[:, :266] = whole[:130, :266] % 7
    want = Slot24.from_dense(floats[:, :266].astype(np.float16))
    assert_same(encode(floats, "fp16", shape=(130, 266))[0], want)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_is_rounded_as_on_the_host(dtype: str) -> None:
    rng = np.random.default_rng(2)
    patterns = rng.integers(0, 1 << 32, (140, 266), dtype=np.uint64).astype(np.uint32)
    patterns[rng.random(patterns.shape) < 0.8] = 0
    edges = [0x33000000, 0x33000001, 0x38800000, 0x387FFFFF, 0x477FF000, 0x477FEFFF, 0x7F800000, 0xFF800001, 0x80000000]
    patterns[: len(edges), 0] = edges
    near = (rng.random(patterns.shape) < 0.5) & (patterns != 0)  # half of them within or near the range of fp16
    patterns[near] = patterns[near] & 0x80FFFFFF | rng.integers(0x32, 0x49, near.sum(), dtype=np.uint32) << 24
    a = patterns.view(np.float32)
    reports: list[RoundingReport] = []
    with np.errstate(all="ignore"):
        want = Slot24.from_dense(a, dtype=dtype, report=reports.append)
    got, rounding = encode(a, dtype, seed=1)
    assert_same(got, want)
    report = reports[0]
    assert rounding.tolist() == [report.total, report.changed, report.became_zero, report.became_infinite]


@both_parts
@pytest.mark.parametrize(("columns", "offset"), [(520, 0), (520, 2), (515, 0)])
def test_decodes_in_vectors_and_without(columns: int, offset: int, part_rows: int) -> None:
    """Rows that are whole vectors, with windows that end inside 128 bytes, or rows that start at any address."""
    patterns = bits("uniform", 140, columns, 0.1, columns)
    want = Slot24.from_dense(patterns.view(np.float16), window=248, part_rows=part_rows)
    np.testing.assert_array_equal(decode(want, offset, offset=offset), pruned(patterns))


@both_parts
@pytest.mark.parametrize("pattern", ["empty-tiles", "skewed"])
def test_decodes_windows_that_runs_begin_in(pattern: str, part_rows: int) -> None:
    """At its second tile, too; a group of four windows is of two rows of them."""
    patterns = bits(pattern, 140, 256 * 6, 0.06, part_rows)
    want = Slot24.from_dense(patterns.view(np.float16), part_rows=part_rows, window=256)
    begins = runs_of(want.slots.tiles).first_tiles()
    assert any(first % 2 for first in begins)
    np.testing.assert_array_equal(decode(want, 1), pruned(patterns))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that from_dense and to_dense launch for arrays of the fake CuPy."""
    return emulated_cupy.install(monkeypatch, encoder, bitmap_encoder)


def test_the_host_side(launched: list[str]) -> None:
    patterns = bits("uniform", 130, 700, 0.27, 4)
    a = patterns.view(np.float16)
    want = Slot24.from_dense(a)
    assert 128 < want.window < 256
    reports: list[RoundingReport] = []
    for given, dtype in ((a, None), (patterns, "fp16")):
        w = Slot24.from_dense(emulated_cupy.asarray(given), dtype=dtype, report=reports.append)
        assert w.is_device
        assert_same(w, want)
    assert reports == [RoundingReport(total=want.nnz, changed=0, became_zero=0, became_infinite=0)] * 2
    assert want.part_rows == 32
    assert want.group_values == 4  # too dense to try two
    tries = 2 + slot24_pairs.WINDOWS.index(want.window) + 1
    assert launched[: tries + 2] == ["slot24_mark", *["slot24_pair"] * tries, "slot24_fill"]
    np.testing.assert_array_equal(w.to_dense().view(np.uint16), pruned(a))
    out = emulated_cupy.asarray(np.ones(a.shape, np.float16))
    assert encoder.decode(w, out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16), pruned(a))
    for options in ({"window": 152}, {"part_rows": 64}):
        tall = Slot24.from_dense(emulated_cupy.asarray(a), **options)
        assert_same(tall, Slot24.from_dense(a, **options))
        np.testing.assert_array_equal(tall.to_dense().view(np.uint16), pruned(a))


def test_the_host_side_with_float32(launched: list[str]) -> None:
    a = bits("uniform", 70, 300, 0.2, 4).astype(np.float32) * np.float32(2**-30)
    reports: list[RoundingReport] = []
    w = Slot24.from_dense(emulated_cupy.asarray(a), dtype="bf16", report=reports.append)
    assert_same(w, Slot24.from_dense(a, dtype="bf16", report=reports.append))
    assert reports[0] == reports[1]
    assert reports[0].changed > 0
    assert w.to_dense().dtype == NUMPY_DTYPE["bf16"]
    assert "slot24_decode" in launched


def test_what_the_host_side_refuses(launched: list[str]) -> None:
    full = np.ones((2, 200), np.float16)
    for source, options, argument in (
        (full, {"window": 256}, "window"),
        (full, {"window": 130}, "window"),
        (full, {"part_rows": 48}, "part_rows"),
        (full, {"group_values": 3}, "group_values"),
        (np.ones((16, 200), np.float16), {"group_values": 2}, "group_values"),
        (full, {"dtype": "bf16"}, "dtype"),
        (full.view(np.uint16), {}, "dtype"),
    ):
        with pytest.raises(ArgumentError) as error:
            Slot24.from_dense(emulated_cupy.asarray(source), **options)
        assert error.value.argument == argument
    with pytest.raises(ArgumentError) as on_host:
        Slot24.from_dense(full, window=256)
    with pytest.raises(ArgumentError, match=re.escape(str(on_host.value))):
        Slot24.from_dense(emulated_cupy.asarray(full), window=256)
    host, device = (Slot24.from_dense(place(full)) for place in (np.asarray, emulated_cupy.asarray))
    for w, out, argument in ((host, None, "w"), (device, emulated_cupy.asarray(full.T), "out")):
        with pytest.raises(ArgumentError) as error:
            encoder.decode(w, out=out)
        assert error.value.argument == argument
    assert "slot24_decode" not in launched


@both_parts
def test_host_and_device_agree_on_the_constants(part_rows: int) -> None:
    constants = {"kPartRows": part_rows}
    for header in ("bitmap", "slot24", "slot24_pairs", "slot24_groups"):
        source = (cuda_root() / f"flashllm/{header}.cuh").read_text(encoding="utf-8")
        for name, text in re.findall(r"constexpr int (k\w+) = ([^;]+);", source):
            text = text.replace("bitmap::", "").replace("slot24::", "").replace("/", "//")
            if re.fullmatch(r"[\w\s()*/+-]+", text):
                constants.setdefault(name, eval(text, {}, constants))
    parts = PARTS_OF[part_rows]
    w = Slot24.from_dense(np.ones((1, 1), np.float16), part_rows=part_rows)
    assert (constants["kBands"], constants["kHalves"]) == (parts.bands, parts.halves)
    assert (constants["kSteps"], constants["kPartSteps"]) == (STEPS, parts.steps)
    assert constants["kWindowTiles"] == slot24_encode.TILES
    assert constants["kPairs"] == slot24_pairs.PAIRS
    assert constants["kPickBytes"] * slot24_encode.TILES == w.picks.nbytes
    assert constants["kColumnBytes"] * slot24_encode.TILES == w.columns.nbytes
    assert constants["kClasses"] == slot24_pairs._CLASSES
    assert constants["kOrders"] == len(slot24_pairs._SIGMAS)
    assert constants["kAttempts"] == slot24_groups.ATTEMPTS
    assert constants["kCarefulAttempts"] == slot24_groups._CAREFUL_ATTEMPTS
    assert constants["kGroup"] == GROUP
