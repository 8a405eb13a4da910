# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: public names, metadata, and rules every file follows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import flashllm

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = sorted(
    file
    for folder in ("src", "cuda", "tests", "experiments")
    for suffix in ("py", "cu", "cuh")
    for file in (REPOSITORY / folder).rglob(f"*.{suffix}")
)


def _pyproject() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", flashllm.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(flashllm, name) is not None
    assert name in dir(flashllm)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flashllm.nonsense  # noqa: B018


def test_no_module_hides_a_public_function() -> None:
    """Importing a submodule binds its name in the package; it must not replace a function of that name."""
    modules = {path.stem for path in (REPOSITORY / "src" / "flashllm").iterdir()}
    assert not modules & set(flashllm.__all__)


def test_versions_agree() -> None:
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {flashllm.__version__}\n" in citation
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashllm.__version__)


def test_wheel_carries_the_device_code() -> None:
    build = _pyproject()["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"] == {"cuda": "flashllm/cuda"}
    assert "/cuda" in build["sdist"]["include"]


def test_data_of_the_package_is_part_of_it() -> None:
    """What `packages` names goes into the wheel with all its files, unless something leaves it out."""
    from flashllm.matmul import model

    wheel = _pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["src/flashllm"]
    assert not wheel.keys() & {"exclude", "only-include", "include"}
    assert (REPOSITORY / "src" / "flashllm" / "matmul" / model.DATA_FILE).is_file()


def test_cupy_builds_are_never_mixed() -> None:
    extras = _pyproject()["project"]["optional-dependencies"]
    assert not any("cupy-cuda12x" in need or "cu12" in need for need in extras["cuda13"])
    assert not any("cupy" in need for name in ("dev", "test", "compile12", "plot") for need in extras[name])


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_file_rules(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    comment = "#" if file.suffix == ".py" else "//"
    assert lines[:1] == [f"{comment} SPDX-License-Identifier: Apache-2.0"]
    assert len(lines) <= 400, "split the file"
    unfinished = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    found = re.search(rf"\b(?:{unfinished})\b", text)
    assert found is None, f"unfinished: {found.group()}"
