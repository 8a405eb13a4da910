# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from flashllm.errors import CompileError
from flashllm.jit.sources import cuda_root, source_digest, source_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """k.cu -> flashllm/a.cuh -> flashllm/b.cuh -> back to a.cuh; and a header nobody includes."""
    (tmp_path / "spmm").mkdir()
    (tmp_path / "flashllm").mkdir()
    (tmp_path / "spmm/k.cu").write_text(
        '#include <cuda_fp16.h>\n  #  include "flashllm/a.cuh" // why\nint k;\n#include "local.cuh"\n'
    )
    (tmp_path / "spmm/local.cuh").write_text("int local;\n")
    (tmp_path / "flashllm/a.cuh").write_text("#include <flashllm/b.cuh>\nint a;\n")
    (tmp_path / "flashllm/b.cuh").write_text('#include "flashllm/a.cuh"\nint b;\n')
    (tmp_path / "flashllm/unused.cuh").write_text("int unused;\n")
    return tmp_path


def test_source_files_follows_own_headers_once(tree: Path) -> None:
    names = [file.relative_to(tree.resolve()).as_posix() for file in source_files(tree / "spmm/k.cu", tree)]
    assert names == ["spmm/k.cu", "flashllm/a.cuh", "flashllm/b.cuh", "spmm/local.cuh"]


@pytest.mark.parametrize("edited", ["spmm/k.cu", "spmm/local.cuh", "flashllm/a.cuh", "flashllm/b.cuh"])
def test_digest_changes_with_every_file_used(tree: Path, edited: str) -> None:
    before = source_digest(tree / "spmm/k.cu", tree)
    with (tree / edited).open("a") as file:
        file.write("// changed\n")
    assert source_digest(tree / "spmm/k.cu", tree) != before


def test_digest_ignores_other_files_and_the_place(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = source_digest(tree / "spmm/k.cu", tree)
    (tree / "flashllm/unused.cuh").write_text("int changed;\n")
    assert source_digest(tree / "spmm/k.cu", tree) == before
    moved = tmp_path_factory.mktemp("moved") / "cuda"
    tree.rename(moved)
    assert source_digest(moved / "spmm/k.cu", moved) == before


def test_include_through_a_macro_is_refused(tree: Path) -> None:
    (tree / "spmm/k.cu").write_text("#define HEADER <flashllm/a.cuh>\n#include HEADER\n")
    with pytest.raises(CompileError, match=r"#include must name a file.*HEADER"):
        source_digest(tree / "spmm/k.cu", tree)


def test_missing_source_is_named(tree: Path) -> None:
    with pytest.raises(CompileError, match=r"nowhere\.cu: cannot read"):
        source_digest(tree / "spmm/nowhere.cu", tree)


def test_cuda_root_holds_the_shared_headers() -> None:
    assert (cuda_root() / "flashllm" / "ptx.cuh").is_file()
