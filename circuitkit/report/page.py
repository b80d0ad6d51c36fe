"""The page: one HTML file with everything in it, which asks no network for anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from circuitkit.report.blocks import Drawing, Section


def page(title: str, sections: Sequence[Section], problems: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """The page as text.

    Args:
        title: Its heading.
        sections: In order.
        problems: Sentences about what is missing and why, shown at the top.
        notes: Sentences for its foot.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("circuitkit.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"embedded": embedded, "kind": lambda block: type(block).__name__}
    drawings = [block for section in sections for block in section.blocks if isinstance(block, Drawing)]
    return environment.get_template("report.html").render(
        title=title,
        sections=sections,
        problems=problems,
        notes=notes,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=Markup(get_plotlyjs()) if drawings else "",
    )


def embedded(drawing: Drawing) -> Markup:
    """A figure as JSON that can stand inside a script element: no ``<`` in it can end that element."""
    plain = json.dumps(drawing.plain, allow_nan=False, separators=(",", ":"))
    return Markup(plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
