# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashllm.bench import data
from flashllm.bench.cases import PATTERNS, Group
from flashllm.bench.sources import FileSource, RandomSource
from flashllm.errors import ArgumentError, FormatError
from flashllm.formats.tiled_csl import TiledCSL
from flashllm.io.container import save_weights

GROUP = Group(m=256, k=128, sparsities=(None,), batches=(8,))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_density_spread_and_repeatability(pattern: str, dtype: str) -> None:
    make = lambda seed: data.random_matrix(512, 640, density=0.3, pattern=pattern, seed=seed, dtype=dtype)  # noqa: E731
    first, again, other = make(4), make(4), make(5)
    wide = data.to_float64(first, dtype)
    assert (first.view(np.uint16) == again.view(np.uint16)).all()
    assert (first.view(np.uint16) != other.view(np.uint16)).mean() > 0.2
    assert (wide != 0).mean() == pytest.approx(0.3, abs=0.05)
    kept = wide[wide != 0]
    assert kept.std() == pytest.approx(1.0, abs=0.02)
    assert abs(kept.mean()) < 0.02


def test_patterns_put_the_zeros_where_they_say() -> None:
    def kept(pattern: str) -> np.ndarray:
        return np.asarray(data.random_matrix(256, 256, density=0.25, pattern=pattern, seed=1) != 0)

    columns = kept("columns").mean(axis=0)
    assert set(columns.tolist()) == {0.0, 1.0}
    blocks = kept("block").reshape(8, 32, 8, 32).mean(axis=(1, 3))
    assert set(blocks.ravel().tolist()) == {0.0, 1.0}
    skewed = kept("skewed").mean(axis=1)
    assert skewed[:64].mean() > 0.35
    assert skewed[-64:].mean() < 0.15
    assert kept("per-row").mean(axis=1).std() > 3 * kept("uniform").mean(axis=1).std()


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.3, 30), (0.999, 100), (1.0, 100)])
def test_rows_of_equal_density(density: float, kept: int) -> None:
    matrix = data.random_matrix(200, 100, density=density, pattern="row-equal", seed=2) != 0
    assert (matrix.sum(axis=1) == kept).all()
    assert len({row.tobytes() for row in matrix}) == (1 if kept in (0, 100) else 200)


@pytest.mark.parametrize("pattern", ["block", "row-equal"])
def test_strips_do_not_show(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.random_matrix(100, 70, density=0.5, pattern=pattern, seed=9)
    monkeypatch.setattr(data, "_STRIP_ELEMENTS", 333)
    assert (data.random_matrix(100, 70, density=0.5, pattern=pattern, seed=9) == whole).all()


def test_known_values_never_change() -> None:
    # Result rows name a seed; with another generator they would mean something else.
    matrix = data.random_matrix(2, 4, density=0.5, seed=42)
    assert matrix.view(np.uint16).tolist() == KNOWN


KNOWN = [[0, 46629, 0, 15522], [12363, 15672, 0, 15940]]


def test_dense_and_empty() -> None:
    assert (data.random_matrix(64, 64) != 0).all()
    assert (data.random_matrix(64, 64, density=0.0) == 0).all()


def test_weights_and_inputs_differ_and_are_scaled() -> None:
    group = Group(m=64, k=400, sparsities=(0.0,), batches=(64,), seed=3)
    w, x = data.make_weights(group, 0.0, device=False), data.make_inputs(group, 64, device=False)
    assert w.astype(np.float64).std() == pytest.approx(1 / 20, rel=0.05)
    assert x.astype(np.float64).std() == pytest.approx(1.0, rel=0.05)
    assert abs(np.corrcoef(w.ravel().astype(float), x.ravel().astype(float))[0, 1]) < 0.05


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="pattern"):
        data.random_matrix(2, 2, pattern="stripes")
    with pytest.raises(ArgumentError, match="density"):
        data.random_matrix(2, 2, density=1.5)


def test_largest_magnitude() -> None:
    matrix = np.array([[1.0, -3.5], [0.0, 2.0]], np.float16)
    assert data.largest_magnitude(matrix, "fp16") == 3.5


def test_random_source() -> None:
    assert RandomSource().density(0.75) == 0.25


def test_file_source_dense(tmp_path: Path) -> None:
    matrix = np.array([[0.0, 1.0], [0.1, 0.0], [-0.0, 3.0]], np.float64)
    np.save(tmp_path / "w.npy", matrix)
    source = FileSource(tmp_path / "w.npy", None, None)
    assert (source.shape, source.dtype, source.density(None)) == ((3, 2), "fp16", 0.5)
    assert (source.dense(GROUP, None, device=False) == matrix.astype(np.float16)).all()
    assert source.rounding.report().changed == 1


def test_file_source_sparse(tmp_path: Path) -> None:
    import scipy.sparse

    matrix = scipy.sparse.csr_array(data.random_matrix(300, 40, density=0.2, dtype="fp16").astype(np.float32))
    scipy.sparse.save_npz(tmp_path / "w.npz", matrix)
    source = FileSource(tmp_path / "w.npz", None, "bf16")
    dense = source.dense(GROUP, None, device=False)
    assert dense.dtype.name == "bfloat16"
    assert np.allclose(dense.astype(np.float32), matrix.toarray(), rtol=2**-8)


def test_file_source_packed(tmp_path: Path) -> None:
    matrix = data.random_matrix(130, 70, density=0.3, dtype="bf16")
    TiledCSL.from_dense(matrix).save(tmp_path / "w.safetensors")
    source = FileSource(tmp_path / "w.safetensors", None, None)
    assert source.dtype == "bf16"
    assert (source.dense(GROUP, None, device=False) == matrix).all()
    with pytest.raises(ArgumentError, match="dtype: expected bf16"):
        FileSource(tmp_path / "w.safetensors", None, "fp16")


def test_file_source_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "absent.npy", None, None)
    (tmp_path / "w.npz").write_bytes(b"not a zip")
    with pytest.raises(FormatError):
        FileSource(tmp_path / "w.npz", None, None)
    with pytest.raises(ArgumentError, match=r"\.npz, \.npy or \.safetensors"):
        FileSource(tmp_path / "w.bin", None, None)


def test_file_source_names_the_tensors_of_a_packed_file(tmp_path: Path) -> None:
    weights = {name: TiledCSL.from_dense(data.random_matrix(8, 8, density=0.5)) for name in ("q", "k")}
    save_weights(tmp_path / "w.safetensors", weights)
    assert FileSource(tmp_path / "w.safetensors", "q", None).tensor == "q"
    for name, got in ((None, "None"), ("v", "'v'")):
        with pytest.raises(ArgumentError, match=f"tensor: expected one of 'k', 'q', got {got}"):
            FileSource(tmp_path / "w.safetensors", name, None)


@pytest.mark.parametrize(
    ("value", "got"), [(np.nan, "1 NaN or infinite$"), (-1e6, "1 NaN or infinite, 1 by rounding$")]
)
def test_file_source_wants_finite_values(tmp_path: Path, value: float, got: str) -> None:
    matrix = np.ones((3, 4), np.float32)
    matrix[2, 1] = value
    np.save(tmp_path / "w.npy", matrix)
    with pytest.raises(FormatError, match=f"finite fp16 values, got {got}"):
        FileSource(tmp_path / "w.npy", None, None)
    if np.isfinite(value):
        assert FileSource(tmp_path / "w.npy", None, "bf16").density(None) == 1.0
