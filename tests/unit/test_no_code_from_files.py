# SPDX-License-Identifier: Apache-2.0
"""No module of the package can execute what it reads: no pickle, no eval, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "code",
    "codeop",
    "yaml",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "torch.load", "pandas.read_pickle", "subprocess.getoutput", "yaml.load"}


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is not allowed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in BUILTINS | CALLS or options.get("shell", "False") != "False":
                yield node.lineno, name
            if options.get("allow_pickle", "False") != "False":
                yield node.lineno, f"{name} with pickles"
            if name in ("np.load", "numpy.load", "cupy.load", "cp.load") and "allow_pickle" not in options:
                yield node.lineno, f"{name} without allow_pickle=False"
            continue
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in MODULES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_nothing_read_is_run(file: Path) -> None:
    assert list(faults(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import os, marshal", "eval(x)", "exec(x)",
        "compile(x, '', 'exec')",
        "torch.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "read(f, allow_pickle=flag)", "os.system(x)",
        "run(x, shell=True)", "__import__(x)", "import yaml", "import joblib.numpy_pickle",
    ],
)  # fmt: skip
def test_the_check_sees(text: str) -> None:
    assert list(faults(ast.parse(text)))


def test_the_check_lets_pass() -> None:
    text = "import json\nnp.load(f, allow_pickle=False)\nprogram.compile(x)\nre.compile(x)\nast.literal_eval(x)"
    assert list(faults(ast.parse(text))) == []
