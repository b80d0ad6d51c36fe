"""A table of jobs as files: parquet, CSV, and a page that needs nothing else. It loads no torch."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ position: sticky; top: 0; background: #fff; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.failed {{ background: #fdecea; }} tr.interrupted, tr.running {{ background: #fff6df; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></body></html>
"""


def write(rows: Sequence[Mapping[str, Any]], folder: Path, summary: str) -> list[Path]:
    """Writes ``collect.parquet``, ``collect.csv`` and ``collect.html``; a cell that a row lacks is empty.

    Args:
        rows: One a job; their keys become columns, in the order of their first appearance.
        folder: Where to; links in the page are relative to it.
        summary: A sentence for the page.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    contents = {
        "collect.parquet": parquet(rows, columns),
        "collect.csv": text_of(rows, columns).encode(),
        "collect.html": page(rows, columns, folder.resolve().name, summary).encode(),
    }
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return [folder / name for name in contents]


def parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """The table as parquet. A column that holds numbers and texts becomes one of texts."""
    import pyarrow
    from pyarrow import parquet as files

    arrays = {column: _column([row.get(column) for row in rows]) for column in columns}
    buffer = pyarrow.BufferOutputStream()
    files.write_table(pyarrow.table({column: pyarrow.array(values) for column, values in arrays.items()}), buffer)
    return buffer.getvalue().to_pybytes()


def text_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def page(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str, summary: str) -> str:
    """The table as a page. Everything in it is escaped: names and errors may come from anywhere."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = "".join(_cell(column, row.get(column)) for column in columns)
        lines.append(f'<tr class="{html.escape(str(row.get("status", "")))}">{cells}</tr>')
    return _PAGE.format(title=html.escape(title), summary=html.escape(summary), head=head, body="\n".join(lines))


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, (int, float)):
        return f'<td class="number">{value:.6g}</td>'
    text = html.escape(str(value))
    # A relative link starts with ./ so that a folder named javascript:... is one.
    return f'<td><a href="./{html.escape(quote(str(value)))}/">{text}</a></td>' if column == "folder" else f"<td>{text}</td>"


def _column(values: list[Any]) -> list[Any]:
    kinds = {float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value) for value in values} - {type(None)}
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]
