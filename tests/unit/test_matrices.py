# SPDX-License-Identifier: Apache-2.0
"""Matrices read from .npz, .npy and .safetensors files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import save_file

import weight_cases as cases
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.matrices import read_matrix


def sparse(layout: str = "csr", dtype: Any = np.float32) -> Any:
    keep = cases.mask("uniform", 30, 50, 0.2, 3)
    a = np.where(keep, np.arange(1500).reshape(30, 50) % 50 + 1, 0).astype(dtype)
    return getattr(sp, f"{layout}_array")(a)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("compressed", [True, False])
def test_npz(tmp_path: Path, layout: str, compressed: bool) -> None:
    s = sparse(layout)
    sp.save_npz(tmp_path / "m.npz", s, compressed=compressed)
    back = read_matrix(tmp_path / "m.npz")
    assert (back.format, back.shape, back.dtype) == (layout, s.shape, s.dtype)
    np.testing.assert_array_equal(back.toarray(), s.toarray())
    np.testing.assert_array_equal(TiledCSL.from_scipy(back).to_dense(), s.toarray().astype(np.float16))


def npz(path: Path, **changes: Any) -> Path:
    """A CSR file with some arrays changed or (``None``) left out."""
    s = sparse()
    arrays: dict[str, Any] = {
        "format": np.array(b"csr"),
        "shape": np.array(s.shape),
        "data": s.data,
        "indices": s.indices,
        "indptr": s.indptr,
    }
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def changed(array: np.ndarray, at: int, value: int) -> np.ndarray:
    out = array.copy()
    out[at] = value
    return out


S = sparse()
BAD_NPZ: dict[str, tuple[str, dict[str, Any]]] = {
    "format missing": ("format", {"format": None}),
    "format unknown": ("format", {"format": np.array(b"dia")}),
    "format a number": ("format", {"format": np.array(3)}),
    "format a list": ("format", {"format": np.array([b"csr", b"csr"])}),
    "shape missing": ("shape", {"shape": None}),
    "shape of three": ("shape", {"shape": np.array([1, 2, 3])}),
    "shape of floats": ("shape", {"shape": np.array([30.0, 50.0])}),
    "shape negative": ("shape", {"shape": np.array([-30, 50])}),
    "shape empty": ("shape", {"shape": np.array([0, 50])}),
    "shape huge": ("shape", {"shape": np.array([2**40, 50])}),
    "shape of more rows": ("indptr", {"shape": np.array([31, 50])}),
    "shape of fewer columns": ("indices", {"shape": np.array([30, 10])}),
    "data missing": ("data", {"data": None}),
    "data complex": ("data", {"data": S.data.astype(np.complex64)}),
    "data text": ("data", {"data": S.data.astype("U8")}),
    "data half": ("data", {"data": S.data.astype(np.float16)}),
    "data two-dimensional": ("data", {"data": S.data.reshape(1, -1)}),
    "data short": ("indices", {"data": S.data[:-1]}),
    "indices of floats": ("indices", {"indices": S.indices.astype(float)}),
    "index too large": ("indices", {"indices": changed(S.indices, 4, 50)}),
    "index negative": ("indices", {"indices": changed(S.indices, 4, -1)}),
    "indptr falls": ("indptr", {"indptr": changed(S.indptr, 4, 0)}),
    "indptr starts late": ("indptr", {"indptr": changed(S.indptr, 0, 1)}),
    "indptr too far": ("indptr", {"indptr": changed(S.indptr, 30, 10**6)}),
    "objects": ("data", {"data": np.array([{}, {}], object)}),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_malformed_npz(tmp_path: Path, name: str) -> None:
    field, changes = BAD_NPZ[name]
    path = npz(tmp_path / "m.npz", **changes)
    with pytest.raises(FormatError) as error:
        read_matrix(path)
    assert error.value.field == field
    assert error.value.path == str(path)


def test_npz_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez_compressed(path, data=np.zeros(5_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(FormatError, match="max_bytes"):
        read_matrix(path, max_bytes=10_000_000)


def test_npz_array_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    npz(tmp_path / "m.npz", data=None)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (10**13,), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
        archive.writestr("data.npy", header.getvalue())
    with pytest.raises(FormatError) as error:
        read_matrix(tmp_path / "m.npz")
    assert error.value.field == "data"


@pytest.mark.parametrize(
    "raw", [b"", b"PK\3\4", b"not a zip at all", b"PK\5\6" + bytes(18)], ids=["empty", "cut", "text", "no files"]
)
def test_npz_that_is_no_archive(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.npz").write_bytes(raw)
    with pytest.raises(FormatError):
        read_matrix(tmp_path / "m.npz")


def test_damaged_npz(tmp_path: Path) -> None:
    whole = npz(tmp_path / "m.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (tmp_path / "m.npz").write_bytes(raw)
        try:
            back = read_matrix(tmp_path / "m.npz")
        except FormatError:
            continue
        TiledCSL.from_scipy(back)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: Any, order: str) -> None:
    a = np.asarray(np.arange(12).reshape(3, 4), dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "m.npy", a)
    back = read_matrix(tmp_path / "m.npy")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, a)
    np.testing.assert_array_equal(TiledCSL.from_dense(back).to_dense(), a.astype(np.float16))


@pytest.mark.parametrize(
    "a",
    [
        np.ones(3),
        np.ones((0, 3)),
        np.ones((2, 2), np.int64),
        np.array([[{}]], object),
        np.ones((2, 2), [("x", "f4")]),
    ],
    ids=["1-D", "empty", "integers", "objects", "records"],
)
def test_refused_npy(tmp_path: Path, a: np.ndarray) -> None:
    np.save(tmp_path / "m.npy", a)
    with pytest.raises(FormatError) as error:
        read_matrix(tmp_path / "m.npy")
    assert error.value.field == "file"


def test_npy_header_that_lies(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.ones((4, 4), np.float32))
    raw = (tmp_path / "m.npy").read_bytes()
    for bad in (raw.replace(b"(4, 4)", b"(4,99)"), raw[:-1], raw + b"\0", raw[:20], b"", raw.replace(b"<f4", b"<z9")):
        (tmp_path / "m.npy").write_bytes(bad)
        with pytest.raises(FormatError):
            read_matrix(tmp_path / "m.npy")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_safetensors(tmp_path: Path, dtype: Any) -> None:
    a = np.arange(12).reshape(3, 4).astype(dtype)
    # The one-byte tensor puts the other at an odd address.
    save_file({"m": a, "odd": np.ones(1, np.uint8), "vector": np.ones(3, dtype)}, tmp_path / "m.safetensors")
    back = read_matrix(tmp_path / "m.safetensors", "m")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, a)
    w = TiledCSL.from_dense(back)
    np.testing.assert_array_equal(w.to_dense().astype(np.float32), a.astype(np.float32))
    with pytest.raises(ArgumentError, match="'m', 'odd', 'vector'") as error:
        read_matrix(tmp_path / "m.safetensors")
    assert error.value.argument == "tensor"
    with pytest.raises(ArgumentError, match="'m', 'odd', 'vector'"):
        read_matrix(tmp_path / "m.safetensors", "n")
    for name in ("odd", "vector"):
        with pytest.raises(FormatError):
            read_matrix(tmp_path / "m.safetensors", name)


def test_safetensors_with_one_tensor_needs_no_name(tmp_path: Path) -> None:
    save_file({"only": np.eye(3, dtype=np.float32)}, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(read_matrix(tmp_path / "m.safetensors"), np.eye(3))
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(FormatError):
        read_matrix(tmp_path / "none.safetensors")


def test_bfloat16_at_an_odd_address(tmp_path: Path) -> None:
    import json
    import struct

    a = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    entries = {
        "first": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "m": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [1, 13]},
    }
    text = json.dumps(entries).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" + a.tobytes())
    back = read_matrix(tmp_path / "m.safetensors", "m")
    np.testing.assert_array_equal(TiledCSL.from_dense(back).to_dense(), a)


def test_arguments(tmp_path: Path) -> None:
    for path, tensor in (("m.txt", None), ("m", None), ("m.pkl", None), ("m.npz", "w"), ("m.npy", "w")):
        with pytest.raises(ArgumentError):
            read_matrix(tmp_path / path, tensor)
    for path in ("m.npz", "m.npy", "m.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_matrix(tmp_path / path)
