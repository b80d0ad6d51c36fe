"""How every figure looks: size, fonts, and colours that stay apart for the colour-blind and in print."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from circuitkit.core.bodies import Estimate

WIDTH = 900  # pixels, on the page and in the files
INK, GREY, PALE, GRID = "#1f2328", "#7a828c", "#c9ced6", "#e6e8eb"
BLUE, ORANGE, GREEN, RED, GOLD, PURPLE = "#1f6fb4", "#d9730d", "#1a8a5a", "#c7352b", "#d4a106", "#7b3fa0"
PORT_COLOURS = {"q": BLUE, "k": GREEN, "v": ORANGE, "": GREY}
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GOLD, RED, "#4d4d4d", "#17a2b8")
DIVERGING = [[0.0, "#a63a12"], [0.25, "#ec9a5b"], [0.5, "#fbfbfa"], [0.75, "#7fb2dd"], [1.0, "#164f8c"]]
SEQUENTIAL = [[0.0, "#fbfbfa"], [0.15, "#d5e5f3"], [0.4, "#86b6dd"], [0.7, "#2f78b7"], [1.0, "#0d3a68"]]


def figure(height: int, traces: Iterable[Any] = (), **layout: Any) -> go.Figure:
    """A figure of the report's width.

    Args:
        height: In pixels.
        traces: What is drawn.
        layout: Whatever differs from the usual.
    """
    return dressed(go.Figure(list(traces)), height, **layout)


def dressed(made: go.Figure, height: int, **layout: Any) -> go.Figure:
    """The same figure, also one of several panels, in the report's size and style."""
    made.update_layout(
        template="none",
        width=WIDTH,
        height=height,
        margin={"l": 70, "r": 30, "t": 30, "b": 55},
        font={"family": "system-ui, 'DejaVu Sans', Arial, sans-serif", "size": 12, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    made.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=PALE, automargin=True, title_standoff=10)
    made.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=PALE, automargin=True, title_standoff=10)
    return made.update_layout(**layout)


def number(value: Any) -> float | None:
    """A number of a result, or None where it was not measured.

    Raises:
        TypeError: It is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a number was expected, found {value!r:.60}")
    return float(value)


def interval(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    """An estimate, and how far its interval reaches above and below it."""
    value = number(estimate["value"])
    low, high = number(estimate["low"]), number(estimate["high"])
    if value is None:
        return None, None, None
    return value, None if high is None else max(0.0, high - value), None if low is None else max(0.0, value - low)


def shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit and ' ' + unit}"


def shown_interval(estimate: Estimate | None, unit: str = "%", digits: int = 1) -> str:
    """An estimate with its interval, such as ``81.2 % [79.0, 83.1]``."""
    if estimate is None:
        return "–"
    low, high = number(estimate["low"]), number(estimate["high"])
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return shown(number(estimate["value"]), unit, digits) + ends


def error_bars(intervals: Iterable[tuple[float | None, float | None, float | None]], colour: str = INK) -> dict[str, Any]:
    """Plotly's error bars for what ``interval`` returned."""
    ends = list(intervals)
    above, below = [up or 0.0 for _, up, _ in ends], [down or 0.0 for _, _, down in ends]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour, "thickness": 1.3, "width": 4}


def ticks(labels: list[str]) -> dict[str, Any]:
    """An axis with a label at each whole number: two labels may read the same, so they cannot be places themselves."""
    return {"tickvals": list(range(len(labels))), "ticktext": labels, "tickangle": 0}


def wrapped(text: Any, width: int = 18) -> str:
    """A label in lines of at most so many characters, and at most three of them."""
    return "\n".join(wrap(str(text), width, max_lines=3, placeholder=" …")) or str(text)


def rgba(colour: str, alpha: float) -> str:
    """A colour ``#rrggbb`` that lets some of the ground through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:.2f})"
