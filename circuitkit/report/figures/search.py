"""How a run came to its circuit, candidate by candidate; and what circuits drawn at random score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitkit.core.circuit import Scores
from circuitkit.report.blocks import Drawing
from circuitkit.report.figures.maps import file_name
from circuitkit.report.figures.style import BLUE, GREY, ORANGE, dressed, figure, number


def search(label: str, steps: Sequence[Mapping[str, Any]], threshold: float | None = None) -> Drawing:
    """Score and size over the evaluations of a search.

    Args:
        label: Of the run.
        steps: What was logged at each evaluation.
        threshold: The score in % that a candidate's removal may not fall below.
    """
    drawn = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    dressed(drawn, 420)
    for kept, name, colour, symbol in ((True, "kept", BLUE, "circle"), (False, "removed", ORANGE, "x-thin-open")):
        some = [step for step in steps if bool(step["step/kept"]) is kept]
        drawn.add_trace(
            go.Scatter(
                x=[step["step"] for step in some],
                y=[number(step["step/score"]) for step in some],
                mode="markers",
                marker={"size": 7, "color": colour, "symbol": symbol, "line": {"width": 1.5, "color": colour}},
                name=name,
                hovertext=[f"{step['step/node']} {name} at {number(step['step/score']) or float('nan'):.2f} %" for step in some],
                hoverinfo="text",
            ),
            1,
            1,
        )
    sizes = [number(step["step/size"]) for step in steps]
    line = {"color": GREY, "shape": "hv", "width": 2}
    drawn.add_trace(go.Scatter(x=[step["step"] for step in steps], y=sizes, mode="lines", line=line, showlegend=False), 2, 1)
    told = ""
    if threshold is not None:
        drawn.add_hline(y=threshold, line={"color": GREY, "dash": "dash", "width": 1.2}, row=1, col=1)
        told = f" The dashed line is the threshold of {threshold:.0f} %."
    drawn.update_yaxes(title={"text": "score without it (%)"}, row=1, col=1)
    drawn.update_yaxes(title={"text": "size (nodes)"}, rangemode="tozero", row=2, col=1)
    drawn.update_xaxes(title={"text": "evaluation"}, row=2, col=1)
    return Drawing(
        file_name("search", label),
        drawn,
        f"Search of {label}: the score in % without each candidate in turn, which was kept in the circuit (blue dots) or removed from it "
        f"(orange crosses), and below the number of nodes left.{told}",
    )


def drawn_circuits(label: str, scores: Scores) -> Drawing:
    """The scores of circuits that were drawn at random."""
    values = list(scores.values.values())
    made = figure(
        300,
        [go.Histogram(x=values, marker={"color": GREY}, nbinsx=min(30, max(5, len(values) // 2)))],
        xaxis={"title": {"text": scores.unit}},
        yaxis={"title": {"text": "circuits"}},
        bargap=0.05,
    )
    mean = sum(values) / len(values)
    return Drawing(
        file_name("random-circuits", label),
        made,
        f"Scores of {len(values)} random circuits ({label}), in {scores.unit}: their number in each range; the mean is {mean:.1f}.",
    )
