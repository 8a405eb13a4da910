# SPDX-License-Identifier: Apache-2.0
"""The file of a page of results: one HTML text with rows and scripts inside, both packed.

Rows have some sixty fields, most of them constant over a sweep. So each column is named once, followed by its values;
where values repeat, each is stored once and rows refer to it by number. Bokeh's scripts are far larger than that; they
are deflated, and browsers inflate them with ``DecompressionStream`` (all of them can since 2023).
"""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from flashllm.bench.results import Row

_COMPONENTS = ("bokeh", "bokeh-widgets", "bokeh-tables")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<!-- Holds Bokeh {version}, deflated: Copyright (c) Anaconda, Inc., and Bokeh Contributors; licence BSD-3-Clause, its
text is in the scripts. -->
<script type="application/json" id="rows">{rows}</script>
<script type="application/json" id="report">{item}</script>
<script type="text/plain" id="bokeh">{scripts}</script>
</head>
<body>
<div id="page"></div>
<script>
// The JSON text of row `number`, one field a line. Columns are [name, values], or [name, values, place of each row's].
function rowText(number) {{
    const fields = JSON.parse(document.getElementById("rows").textContent).map(([name, values, places]) => {{
        const texts = values.split("\\n")
        return ` "${{name}}": ${{texts.length === 1 ? texts[0] : texts[places ? places[number] : number]}}`
    }})
    return `{{\\n${{fields.join(",\\n")}}\\n}}`
}}
async function show() {{
    const text = id => document.getElementById(id).textContent
    const bytes = Uint8Array.from(atob(text("bokeh")), letter => letter.charCodeAt(0))
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))
    const script = document.createElement("script")
    script.textContent = await new Response(inflated).text()
    document.head.append(script)
    await Bokeh.embed.embed_item(JSON.parse(text("report")), "page")
}}
if ("DecompressionStream" in window) show()
else document.getElementById("page").textContent = "This page needs a browser of 2023 or later."
</script>
</body>
</html>
"""


def document(parts: Any, rows: Sequence[Row], *, title: str) -> str:
    """The file that shows the Bokeh model ``parts``; its scripts may call ``rowText`` for a row of ``rows`` by number.

    Raises ``ImportError`` without Bokeh.
    """
    from bokeh import __version__
    from bokeh.embed import json_item
    from bokeh.resources import Resources

    scripts = "\n".join(Resources(mode="inline", components=list(_COMPONENTS)).js_raw)
    return _PAGE.format(
        title=escape(title),
        version=escape(__version__),
        rows=_inside(packed(rows)),
        item=_inside(json_item(parts)),
        scripts=b64encode(zlib.compress(scripts.encode(), 9)).decode(),
    )


def packed(rows: Sequence[Row]) -> list[list[Any]]:
    """Columns ``[name, values]`` or ``[name, values, places]``: the JSON texts of a field, on lines of ``values``.

    A single line stands for all rows; otherwise each row has its own line or, where that is shorter, the number of a
    line in ``places``. Values are texts, not numbers, so that a row is shown with the digits of its file and integers
    can have any size.
    """
    columns: list[list[Any]] = []
    fields = [asdict(row) for row in rows]
    for name in fields[0]:
        texts = [json.dumps(row[name]) for row in fields]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        apart = [name, "\n".join(texts)]
        shared = [name, "\n".join(numbers), *([[numbers[text] for text in texts]] if len(numbers) > 1 else [])]
        columns.append(min(shared, apart, key=lambda column: len(_compact(column))))
    return columns


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _inside(value: Any) -> str:
    """JSON for a ``script`` element: whatever texts it has, none contains an end tag."""
    return _compact(value).replace("<", "\\u003c")
