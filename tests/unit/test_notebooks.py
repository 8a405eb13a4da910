# SPDX-License-Identifier: Apache-2.0
"""The notebooks of experiments/notebooks match their sources, execute, and reveal nothing about the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

from experiments.notebooks import run
from flashllm.backends import emulator

for package in ("jupytext", "nbclient", "ipykernel", "matplotlib"):
    pytest.importorskip(package)

NAMES = ("1_compare_with_cublas", "2_tiled_csl_by_hand", "3_where_the_time_goes", "4_your_own_matrix")


def committed(name: str) -> Any:
    import nbformat

    notebook = nbformat.read(run.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def check_outputs(notebook: Any) -> None:
    """Every code cell was executed, in order; there are pictures, and no errors, warnings or paths."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 1
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert run.machine_paths(notebook) == []


def test_every_source_is_a_notebook() -> None:
    assert [source.stem for source in run.SOURCES] == list(NAMES)
    assert sorted(file.stem for file in run.FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_that_of_its_source(name: str) -> None:
    source, notebook = run.notebook_of(run.FOLDER / f"{name}.py"), committed(name)

    def cells(one: Any) -> list[tuple[str, str, str]]:
        return [(cell.id, cell.cell_type, cell.source) for cell in one.cells]

    assert cells(notebook) == cells(source), f"edited without the other; make notebooks ARGS={name}"
    assert notebook.metadata == run.METADATA
    check_outputs(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_executes(name: str) -> None:
    """As on a machine without a GPU, where nothing is measured."""
    if (problem := emulator.available()) is not None:
        pytest.skip(problem)
    notebook = run.notebook_of(run.FOLDER / f"{name}.py")
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        run.execute(notebook)
    check_outputs(notebook)
    assert pictures(notebook) == pictures(committed(name))


def test_paths_are_found_in_outputs_but_not_in_pictures() -> None:
    from nbformat import v4

    cell = v4.new_code_cell("1")
    notebook = v4.new_notebook(cells=[cell], metadata=run.METADATA)
    cell.outputs = [v4.new_output("display_data", data={"image/png": "aa/home/bb"})]
    assert run.machine_paths(notebook) == []
    cell.outputs.append(v4.new_output("stream", name="stdout", text=f"read {run.REPOSITORY}/a.npy"))
    assert run.machine_paths(notebook)


def test_command_names_the_notebooks_there_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(run.main, ["5", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert NAMES[0] in result.output
    assert list(tmp_path.iterdir()) == []
