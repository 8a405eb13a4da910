# SPDX-License-Identifier: Apache-2.0
"""`flashllm report`: a page that needs no network, opened and clicked in a browser; also the committed page."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_rows import row
from click.testing import CliRunner, Result

from flashllm.bench import page, report_html, results
from flashllm.cli.main import command
from flashllm.errors import ArgumentError, MissingDependencyError

pytest.importorskip("bokeh")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<img src=x onerror="window.harmed = 1"></script>'
REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["report", *arguments])


@pytest.fixture(scope="module")
def rows() -> list[results.Row]:
    """Two formats at two sparsities, each beside cuBLAS, and a model whose name is not plain text.

    Seeds are integers that are too large for JavaScript's numbers.
    """
    found = []
    for n in (8, 16):
        found.append(row(system="cublas", format="dense", kernel="cupy", N=n, median_us=102.0, speedup=1.0))
        for sparsity in (0.8, 0.9):
            for name, speedup in (("bitmap", 1.5), ("slot24", 2.5)):
                speedup += sparsity + n / 100
                us = 102.0 / speedup
                case = {"N": n, "sparsity": sparsity, "format": name, "kernel": name, "model": HOSTILE}
                found.append(row(**case, seed=2**60 + n, median_us=us, speedup=speedup))
    return found


@pytest.fixture(scope="module")
def report(rows: list[results.Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for one in rows:
        results.append(folder / "rows.jsonl", one)
    done = run(str(folder / "rows.jsonl"), "-o", str(folder / "report.html"), "--title", "a & b")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("10 rows, ")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, which takes longer to start than to show the page."""
    if CHROMIUM is None:
        if os.environ.get("FLASHLLM_REQUIRE_BROWSER") == "1":
            pytest.fail("this test needs Chromium")
        pytest.skip("no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(quiet))
        yield started
        started.close()


@pytest.fixture
def browser_page(report: Path, browser: Any) -> Iterator[Any]:
    """The report, opened afresh; no request leaves the page and nothing in it fails."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1700})
    asked: list[str] = []
    failed: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(report.as_uri())
    opened.wait_for_selector(".slick-row >> nth=0")
    yield opened
    assert asked == [report.as_uri()]
    assert failed == []
    assert opened.evaluate("window.harmed") is None
    opened.close()


def table(opened: Any, heading: str) -> list[dict[str, str]]:
    """Cells, by heading, of the table that has a column ``heading``."""
    return opened.evaluate(  # type: ignore[no-any-return]
        """heading => {
            const all = root => [root, ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot)
                .flatMap(e => all(e.shadowRoot))]
            const roots = all(document).filter(r => r.querySelector(".slick-header-column"))
            for (const root of roots) {
                const heads = [...root.querySelectorAll(".slick-header-column")].map(e => e.textContent.trim())
                if (!heads.includes(heading)) continue
                const lines = [...root.querySelectorAll(".slick-row")]
                lines.sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top))
                return lines.map(line => Object.fromEntries(
                    [...line.querySelectorAll(".slick-cell")].map((cell, i) => [heads[i], cell.textContent.trim()])))
            }
            return []
        }""",
        heading,
    )


def shown_rows(opened: Any) -> list[dict[str, Any]]:
    """The whole rows below the tables."""
    return [json.loads(text) for text in opened.locator("pre").all_text_contents()]


def test_all_rows_are_in_the_table(browser_page: Any, rows: list[results.Row]) -> None:
    cells = table(browser_page, "row")
    assert [cell["row"] for cell in cells] == [f"rows.jsonl:{i + 1}" for i in range(len(rows))]
    assert {cell["system"] for cell in cells} == {"cublas", "flashllm bitmap", "flashllm slot24"}
    assert cells[1]["weights"] == f"{HOSTILE} fc1"
    assert float(cells[1]["speed-up"]) == pytest.approx(rows[1].speedup, abs=0.006)
    assert browser_page.locator("h1").text_content() == "a & b"
    assert browser_page.get_by_text("NVIDIA H200", exact=True).count() > 0


def test_a_click_on_a_heading_sorts(browser_page: Any, rows: list[results.Row]) -> None:
    want = sorted(round(one.speedup or 0, 2) for one in rows)
    heading = browser_page.locator(".slick-header-column").get_by_text("speed-up", exact=True)
    heading.click()
    assert [float(cell["speed-up"]) for cell in table(browser_page, "row")] == pytest.approx(want, abs=0.006)
    heading.click()
    assert [float(cell["speed-up"]) for cell in table(browser_page, "row")] == pytest.approx(want[::-1], abs=0.006)


def test_a_click_on_a_mean_shows_the_rows_behind_it(browser_page: Any, rows: list[results.Row]) -> None:
    means = table(browser_page, "geometric mean")
    number = next(
        i for i, mean in enumerate(means) if (mean["format"], mean["zeros, %"], mean["N"]) == ("slot24", "80", "all")
    )
    behind = [one for one in rows if (one.format, one.sparsity) == ("slot24", 0.8)]
    assert len(behind) == 2
    assert means[number]["cases"] == "2"
    first = float((behind[0].speedup or 0) * (behind[1].speedup or 0)) ** 0.5
    assert float(means[number]["geometric mean"]) == pytest.approx(first, abs=0.0006)
    assert browser_page.get_by_text("Nothing is selected.").count() == 1
    browser_page.locator(".slick-row").nth(number).locator(".slick-cell").first.click()
    browser_page.wait_for_selector("pre")
    assert shown_rows(browser_page) == [asdict(one) for one in behind]


def test_filters_leave_what_they_name(browser_page: Any) -> None:
    select = browser_page.get_by_label("system")
    select.select_option("flashllm bitmap")
    browser_page.get_by_label("N", exact=True).select_option("16")
    cells = table(browser_page, "row")
    assert [(cell["system"], cell["N"], cell["zeros, %"]) for cell in cells] == [
        ("flashllm bitmap", "16", "80"),
        ("flashllm bitmap", "16", "90"),
    ]
    select.select_option("all")
    assert len(table(browser_page, "row")) == 5


def test_a_click_on_a_line_of_the_table_shows_its_row(browser_page: Any, rows: list[results.Row]) -> None:
    last = browser_page.locator(".slick-row").last
    last.locator(".slick-cell").first.click()
    browser_page.wait_for_selector("pre")
    (found,) = shown_rows(browser_page)
    assert found in [asdict(one) for one in rows]
    assert browser_page.locator("h3").text_content().startswith("rows.jsonl:")


def test_charts_are_drawn(browser_page: Any, tmp_path: Path) -> None:
    """Points in the colours of all systems, on a picture of the page."""
    image = pytest.importorskip("PIL.Image")
    browser_page.wait_for_timeout(500)
    browser_page.screenshot(path=tmp_path / "page.png", full_page=True)
    with image.open(tmp_path / "page.png") as opened:
        found = {color for _, color in opened.convert("RGB").getcolors(1 << 24)}

    def close_to(wanted: str) -> bool:  # points are somewhat transparent
        rgb = [int(wanted[i : i + 2], 16) for i in (1, 3, 5)]
        mixed = [0.7 * part + 0.3 * 255 for part in rgb]
        return any(sum(abs(a - b) for a, b in zip(color, mixed, strict=True)) < 12 for color in found)

    assert all(map(close_to, page._COLORS[:3]))
    assert not close_to(page._COLORS[4])


def unpacked(columns: list[list[Any]]) -> list[dict[str, Any]]:
    """Rows of ``report_html.packed``, as the page's script reads them."""
    texts = {name: values.split("\n") for name, values, *_ in columns}
    places = {name: found for name, _, found in (column for column in columns if len(column) == 3)}
    count = max(map(len, (*texts.values(), *places.values())))

    def text(name: str, i: int) -> str:
        here = texts[name]
        return here[0] if len(here) == 1 else here[places[name][i] if name in places else i]

    return [{name: json.loads(text(name, i)) for name in texts} for i in range(count)]


def test_packed_columns_hold_each_value_once_or_one_for_each_row(rows: list[results.Row]) -> None:
    columns = {name: found for name, *found in report_html.packed(rows)}
    assert columns["gpu"] == ['"NVIDIA H200"']
    assert columns["format"] == ['"dense"\n"bitmap"\n"slot24"', [0, 1, 2, 1, 2, 0, 1, 2, 1, 2]]
    assert columns["speedup"] == ["\n".join(json.dumps(one.speedup) for one in rows)]
    assert unpacked(report_html.packed(rows)) == [asdict(one) for one in rows]
    assert unpacked(report_html.packed(rows[:1])) == [asdict(rows[0])]


def test_the_committed_page_has_the_committed_rows() -> None:
    """If this fails: the `flashllm report` in experiments/results/README.md."""
    text = (REPOSITORY / "docs" / "reports" / "h200-systems.html").read_text(encoding="utf-8")
    assert len(text) < 1_600_000
    (columns,) = re.findall(r'id="rows">(.*?)</script>', text)
    files = sorted((REPOSITORY / "experiments" / "results").glob("*-h200-*-systems.jsonl"))
    assert all(file.name in text for file in files)
    found = {json.dumps(one) for one in unpacked(json.loads(columns))}
    assert found == {json.dumps(asdict(one)) for file in files for one in results.read(file)}


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ArgumentError, match="results: expected at least one row, got none"):
        page.render([])


def test_rows_without_times_or_speedups_are_shown(rows: list[results.Row]) -> None:
    """As from a machine without a GPU."""
    bare = {"backend": "reference", "gpu": None, "median_us": None, "speedup": None, "cublas_us": None, "gbps": None,
            "roofline_fraction": None, "read_gbps": None}  # fmt: skip
    text = page.render([page.Sourced(row=row(**bare), file="a.jsonl", line=1)])
    assert "geometric mean" not in text
    assert "a.jsonl:1" in text


def test_without_bokeh_the_error_says_what_to_install(
    rows: list[results.Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.layouts", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "flashllm\[report\]"'):
        page.render([page.Sourced(row=rows[0], file="a", line=1)])
    results.append(tmp_path / "a.jsonl", rows[0])
    assert run(str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "a.html")).exit_code == 1
    assert not (tmp_path / "a.html").exists()


def test_a_page_is_written_whole_or_not_at_all(report: Path, tmp_path: Path) -> None:
    source = str(report.with_name("rows.jsonl"))
    target = tmp_path / "old.html"
    target.write_text("old")
    assert run(source, "-o", str(target)).exit_code == 0
    assert "</html>" in target.read_text()
    missing = run(source, "-o", str(tmp_path / "no" / "folder" / "a.html"))
    assert missing.exit_code == 1
    assert "No such file" in missing.stderr
    broken = tmp_path / "b.jsonl"
    broken.write_text("{}\n")
    target.write_text("old")
    assert run(str(broken), "-o", str(target)).exit_code == 2
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_a_page_never_replaces_its_rows(report: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(report.with_name("rows.jsonl"), rows)
    before = rows.read_bytes()
    done = run(str(rows), "-o", str(tmp_path / "." / "rows.jsonl"))
    assert (done.exit_code, rows.read_bytes()) == (2, before)
    assert "--out: expected another file than RESULTS" in done.stderr


def test_empty_files_are_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    done = run(str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "a.html"))
    assert done.exit_code == 2
    assert "results: expected at least one row, got none" in done.stderr
