# SPDX-License-Identifier: Apache-2.0
"""The README says what the repository holds: its table comes from committed rows, its links and commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "docs/kernels/bitmap.md", "docs/kernels/slot24.md"])
def test_table_is_generated_from_the_committed_rows(document: str) -> None:
    from flashllm.cli.table import command

    text = (REPOSITORY / document).read_text(encoding="utf-8")
    pattern = r"<!-- results: `flashllm table experiments/results/(\S+)` -->\n(.*?)\n<!-- end of results -->"
    blocks = re.findall(pattern, text, re.DOTALL)
    assert blocks
    for glob, table in blocks:
        files = sorted((REPOSITORY / "experiments" / "results").glob(glob))
        assert files
        result = CliRunner().invoke(command, [str(file) for file in files])
        assert result.exit_code == 0, result.output
        assert table.strip() == result.output.strip()


@pytest.mark.parametrize("script", sorted(file.stem for file in (REPOSITORY / "experiments").glob("*.py")))
def test_scripts_start_as_they_say(script: str) -> None:
    text = (REPOSITORY / "experiments" / f"{script}.py").read_text(encoding="utf-8")
    found = re.search(rf"^    python (-m experiments\.{script}|experiments/{script}\.py) ", text, re.MULTILINE)
    assert found is not None
    done = subprocess.run(
        [sys.executable, *found.group(1).split(), "--help"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_committed_row_is_valid_and_passed() -> None:
    from flashllm.bench.results import read

    for file in sorted((REPOSITORY / "experiments" / "results").glob("*.jsonl")):
        rows = read(file)
        assert rows, file.name
        assert all(row.check == "pass" and row.commit and row.dirty is False for row in rows), file.name


def _anchors(path: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them: ``"## Rows of decoding"`` -> ``"rows-of-decoding"``."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    folders = ("docs", "experiments", "cuda")
    documents = [*REPOSITORY.glob("*.md"), *(file for name in folders for file in (REPOSITORY / name).rglob("*.md"))]
    assert len(documents) > 20
    wrong = []
    for path in documents:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            file = path.parent / target if target else path
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
                wrong.append(f"{path.relative_to(REPOSITORY)}: {target}#{anchor}")
    assert not wrong


def test_commands_exist() -> None:
    from flashllm.cli.main import command as main

    names = set(re.findall(r"`flashllm ([a-z][a-z-]*)", README))
    for name in names:
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0, name


def test_opens_with_the_two_commands() -> None:
    start = README.index("```\nmake bench")
    assert README.index("make test") < README.index("## ")
    assert start < 400
