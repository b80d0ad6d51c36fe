"""What a report consists of: sections of drawings, tables and sentences."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import plotly.graph_objects as go


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption.

    Attributes:
        name: Of its file, without an ending.
        figure: Its texts are plain: what would be markup in them is shown as it is, and a line break breaks the line.
        caption: One sentence: what is shown, in which unit, and how to read it.
    """

    name: str
    figure: go.Figure
    caption: str

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The figure as plain values, all of its texts escaped: plotly takes some markup in labels for its own."""
        return {key: _escaped(value) for key, value in self.figure.to_plotly_json().items()}

    @cached_property
    def escaped(self) -> go.Figure:
        """The same as a figure."""
        return go.Figure(self.plain)


@dataclass(frozen=True)
class Table:
    """Rows of cells, already formatted.

    Attributes:
        header: Names of the columns.
        rows: A cell a column.
        caption: One sentence, as for a drawing.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Fold:
    """A long text that is folded until it is asked for."""

    title: str
    text: str


Block = Drawing | Table | Text | Fold


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading.

    Attributes:
        title: For people.
        blocks: In order.
        source: The file that it was made from, below the report's folder.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    source: str = ""


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value, quote=False).replace("\n", "<br>")
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, (list, tuple)) else value
