# SPDX-License-Identifier: Apache-2.0
"""Result rows as one web page that needs no network: sortable tables, charts, and the row behind each number.

Bokeh draws it, with its scripts inside the page (``report_html.py``). Tables and charts share one source of data: what
is selected in one is selected in the others, and the whole selected rows are shown below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flashllm import __version__
from flashllm.bench.report import OURS, label_of, several_formats, speedup_means, title_of
from flashllm.bench.report_html import document
from flashllm.bench.results import Row
from flashllm.errors import ArgumentError, MissingDependencyError

# First those of Okabe and Ito (2008), which colour-blind readers can tell apart; then more, for runs of many systems.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#222222", "#999999"),
    *("#882255", "#44aa99", "#332288", "#ddcc77", "#117733"),
)
_WIDTH = 1280
_ALL = "all"
_SHOWN_ROWS = 20
_HINT = "Charts and the table show what the filters leave. Click a point or a line to see its row."
_STYLE = """<style>
.runs { border-collapse: collapse; font-size: 12px }
.runs td, .runs th { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: left }
</style>"""


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A row and the file and line that it comes from."""

    row: Row
    file: str
    line: int


def render(rows: Sequence[Sourced], *, title: str = "flashllm results") -> str:
    """The page for ``rows``, measured or modelled, in the order given.

    Raises :class:`ArgumentError` when there are none, :class:`MissingDependencyError` without Bokeh.
    """
    if not rows:
        raise ArgumentError("results", expected="at least one row", got="none")
    try:
        from bokeh.layouts import column, row
    except ImportError as error:
        raise MissingDependencyError(f'a report needs Bokeh ({error}): pip install "flashllm[report]"') from error

    cases = _cases(rows)
    filters, view = _filters(cases)
    behind = _rows_behind(cases)
    parts = column(
        _text(f"<h1>{escape(title)}</h1>{_environment(rows)}"),
        *_summary(rows, cases),
        _text(f"<h2>Cases</h2><p>{_HINT}</p>"),
        row(*filters),
        row(_speedups(cases, view), _roofline(rows, cases, view)),
        _table(cases, view),
        behind,
        width=_WIDTH,
    )  # fmt: skip
    return document(parts, [one.row for one in rows], title=title)


def _text(html: str, **options: Any) -> Any:
    from bokeh.models import Div

    return Div(text=html, width=_WIDTH, **options)


def _environment(rows: Sequence[Sourced]) -> str:
    """A table of what the rows were measured with: one line for each run."""
    heads = ("file", "rows", "GPU", "driver", "CUDA", "CuPy", "cuBLAS", "commit", "measured", "command")
    lines: dict[tuple[str, ...], int] = {}
    for one in rows:
        row = one.row
        commit = (row.commit or "none")[:10] + (" with local changes" if row.dirty else "")
        cells = (
            row.gpu or row.backend,
            row.driver,
            row.cuda,
            row.cupy,
            row.cublas,
            commit,
            row.time_utc[:10],
            row.command,
        )
        key = (one.file, *(str(cell or "-") for cell in cells))
        lines[key] = lines.get(key, 0) + 1
    body = "".join(
        f"<tr><td>{'</td><td>'.join(escape(cell) for cell in (file, str(count), *others))}</td></tr>"
        for (file, *others), count in lines.items()
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'{_STYLE}<p>flashllm {escape(__version__)}</p><table class="runs"><tr>{head}</tr>{body}</table>'


def _name(row: Row, several: bool) -> str:
    """The system; where there are ``several`` formats, ours with its format, or ``auto`` if that was chosen."""
    return f"{row.system} {label_of(row)}" if several and row.system.startswith(OURS) else row.system


def _cases(rows: Sequence[Sourced]) -> Any:
    """The source of data of all charts and tables: an entry for each row."""
    from bokeh.models import ColumnDataSource

    several = several_formats(one.row for one in rows)
    names = [_name(one.row, several) for one in rows]
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(dict.fromkeys(names))}

    def numbers(value: Callable[[Row], float | None]) -> list[float]:
        return [math.nan if (found := value(one.row)) is None else found for one in rows]

    def zeros(row: Row) -> float:
        return row.sparsity_real if row.sparsity is None else row.sparsity

    data: dict[str, list[Any]] = {
        "system": names,
        "color": [colors[name] for name in names],
        "format": [one.row.format for one in rows],
        "weights": [title_of(one.row) or "-" for one in rows],
        "shape": [f"{one.row.M}x{one.row.K}" for one in rows],
        "N": [one.row.N for one in rows],
        "zeros": [round(100 * zeros(one.row), 1) for one in rows],
        "pattern": [one.row.pattern for one in rows],
        "us": numbers(lambda row: row.median_us),
        "cublas_us": numbers(lambda row: row.cublas_us),
        "speedup": numbers(lambda row: row.speedup),
        "gbps": numbers(lambda row: row.gbps),
        "roofline": numbers(lambda row: None if row.roofline_fraction is None else 100 * row.roofline_fraction),
        "mb": [one.row.bytes / 1e6 for one in rows],
        "error": numbers(lambda row: row.max_err_over_bound),
        "check": [one.row.check for one in rows],
        "source": [f"{one.file}:{one.line}" for one in rows],
    }
    return ColumnDataSource(data, name="cases")


_FILTERS = (("system", "system"), ("N", "N"), ("zeros", "zeros, %"), ("shape", "M x K"), ("pattern", "pattern"))


def _filters(cases: Any) -> tuple[list[Any], Any]:
    """The filter widgets, and the view of ``cases`` that they let through."""
    from bokeh.models import CDSView, CustomJS, CustomJSFilter, Select

    widgets = []
    for column, label in _FILTERS:
        values = sorted(set(cases.data[column]))
        options = [(_ALL, _ALL), *((str(value), str(value)) for value in values)]
        widgets.append(Select(title=label, value=_ALL, options=options, width=190, name=f"filter-{column}"))
    arguments = {"widgets": widgets, "columns": [column for column, _ in _FILTERS], "all": _ALL}
    leave = CustomJSFilter(
        args=arguments,
        code="""
        const left = []
        for (let i = 0; i < source.get_length(); i++) {
            if (widgets.every((w, k) => w.value === all || String(source.data[columns[k]][i]) === w.value)) left.push(i)
        }
        return left
        """,
    )
    changed = CustomJS(args={"cases": cases}, code="cases.selected.indices = []; cases.change.emit()")
    for widget in widgets:
        widget.js_on_change("value", changed)
    return widgets, CDSView(filter=leave)


def _columns(formats: Mapping[str, tuple[str, str | None, int]]) -> list[Any]:
    """Table columns: heading, number format or None for text, width."""
    from bokeh.models import NumberFormatter, StringFormatter, TableColumn

    return [
        TableColumn(
            field=field,
            title=title,
            width=width,
            formatter=StringFormatter() if digits is None else NumberFormatter(format=digits, nan_format="-"),
        )
        for field, (title, digits, width) in formats.items()
    ]


def _summary(rows: Sequence[Sourced], cases: Any) -> list[Any]:
    """Mean speed-ups; selecting one selects its cases."""
    from bokeh.models import ColumnDataSource, CustomJS, DataTable

    means = speedup_means(one.row for one in rows)
    if not means:
        return []
    members = [
        [
            i
            for i, one in enumerate(rows)
            if (one.row.system, label_of(one.row), one.row.sparsity) == (OURS, mean.format, mean.sparsity)
            and mean.n in (None, one.row.N)
            and one.row.speedup
            and one.row.check == "pass"
        ]
        for mean in means
    ]
    source = ColumnDataSource(
        {
            "format": [mean.format for mean in means],
            "zeros": [math.nan if mean.sparsity is None else 100 * mean.sparsity for mean in means],
            "N": [_ALL if mean.n is None else str(mean.n) for mean in means],
            "geometric": [mean.geometric for mean in means],
            "lowest": [mean.lowest for mean in means],
            "highest": [mean.highest for mean in means],
            "cases": [mean.cases for mean in means],
            "members": members,
        },
        name="means",
    )
    source.selected.js_on_change(
        "indices",
        CustomJS(
            args={"means": source, "cases": cases},
            code="cases.selected.indices = [...new Set(cb_obj.indices.flatMap(i => means.data.members[i]))]",
        ),
    )
    columns = _columns(
        {
            "format": ("format", None, 120),
            "zeros": ("zeros, %", "0.[0]", 80),
            "N": ("N", None, 60),
            "geometric": ("geometric mean", "0.000", 110),
            "lowest": ("lowest", "0.000", 80),
            "highest": ("highest", "0.000", 80),
            "cases": ("cases", "0", 60),
        }
    )
    table = DataTable(
        source=source,
        columns=columns,
        width=640,
        height=min(300, 32 + 25 * len(means)),
        index_position=None,
        name="means",
    )
    note = "<h2>Speed-up over cuBLAS</h2><p>Click a heading to sort, a line to select the cases behind it.</p>"
    return [_text(note), table]


_TOOLS = "tap,box_select,wheel_zoom,pan,reset,save"
_TOOLTIPS = [
    ("system", "@system"),
    ("weights", "@weights @shape N=@N"),
    ("zeros", "@zeros %, @pattern"),
    ("us", "@us{0.00} (cuBLAS @cublas_us{0.00})"),
    ("speed-up", "@speedup{0.00}"),
]


def _speedups(cases: Any, view: Any) -> Any:
    from bokeh.plotting import figure

    chart = figure(
        title="Speed-up over cuBLAS", x_axis_label="zeros, %", y_axis_label="speed-up", width=_WIDTH // 2, height=500,
        tools=_TOOLS, tooltips=_TOOLTIPS, name="speedups",
    )  # fmt: skip
    chart.scatter("zeros", "speedup", source=cases, view=view, color="color", size=8, alpha=0.7, legend_group="system")
    chart.hspan(y=1.0, line_color="#999999", line_dash="dashed")
    return _tidy(chart)


def _roofline(rows: Sequence[Sourced], cases: Any, view: Any) -> Any:
    """Time against bytes, and the times that the bytes alone take at the measured bandwidths."""
    from bokeh.plotting import figure

    chart = figure(
        title="Time against bytes moved once", x_axis_label="MB", y_axis_label="us", x_axis_type="log",
        y_axis_type="log", width=_WIDTH // 2, height=500, tools=_TOOLS, tooltips=_TOOLTIPS, name="roofline",
    )  # fmt: skip
    chart.scatter("mb", "us", source=cases, view=view, color="color", size=8, alpha=0.7, legend_group="system")
    sizes = [min(cases.data["mb"]), max(cases.data["mb"])]
    speeds: dict[str, list[float]] = {}
    for one in rows:
        if one.row.gpu and one.row.read_gbps:
            speeds.setdefault(one.row.gpu, []).append(one.row.read_gbps)
    for name, found in speeds.items():
        gbps = sorted(found)[len(found) // 2]
        label = f"{name} at {gbps:.0f} GB/s"
        chart.line(sizes, [mb * 1e3 / gbps for mb in sizes], color="#222222", line_dash="dashed", legend_label=label)
    return _tidy(chart)


def _tidy(chart: Any) -> Any:
    """``chart`` with its legend below, where it hides no points."""
    chart.toolbar.logo = None
    for legend in chart.legend:
        chart.center.remove(legend)
        chart.add_layout(legend, "below")
        legend.location = "top_left"
        legend.ncols = 4
        legend.border_line_alpha = 0
        legend.label_text_font_size = "10px"
    return chart


def _table(cases: Any, view: Any) -> Any:
    from bokeh.models import DataTable

    columns = _columns(
        {
            "system": ("system", None, 118),
            "weights": ("weights", None, 92),
            "shape": ("M x K", None, 84),
            "N": ("N", "0", 30),
            "zeros": ("zeros, %", "0.[0]", 60),
            "pattern": ("pattern", None, 56),
            "format": ("format", None, 58),
            "us": ("us", "0.00", 58),
            "cublas_us": ("cuBLAS us", "0.00", 68),
            "speedup": ("speed-up", "0.00", 62),
            "gbps": ("GB/s", "0", 42),
            "roofline": ("% of roofline", "0.0", 84),
            "error": ("error / bound", "0.000", 84),
            "check": ("check", None, 42),
            "source": ("row", None, 320),
        }
    )
    return DataTable(
        source=cases, view=view, columns=columns, width=_WIDTH, height=420, index_position=None, name="cases"
    )


def _rows_behind(cases: Any) -> Any:
    """The whole rows of what is selected, with the files and lines they come from."""
    from bokeh.models import CustomJS

    empty = "<h2>Rows</h2><p>Nothing is selected.</p>"
    shown = _text(empty, name="rows")
    cases.selected.js_on_change(
        "indices",
        CustomJS(
            args={"cases": cases, "shown": shown, "empty": empty, "most": _SHOWN_ROWS},
            code="""
            const plain = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")
            const chosen = cb_obj.indices
            const rows = chosen.slice(0, most).map(i =>
                `<h3>${plain(cases.data.source[i])}</h3><pre>${plain(rowText(i))}</pre>`)
            const more = chosen.length > most ? `<p>and ${chosen.length - most} more</p>` : ""
            shown.text = chosen.length === 0 ? empty : "<h2>Rows</h2>" + rows.join("") + more
            """,
        ),
    )
    return shown
