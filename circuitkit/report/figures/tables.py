"""What tables of several runs look like: each circuit on each task, and how stable a circuit is."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from circuitkit.core.bodies import CrossTask, Stability, StabilityRun
from circuitkit.report.blocks import Block, Drawing, Table
from circuitkit.report.figures.maps import Shape, file_name, model_shape, node_map
from circuitkit.report.figures.style import SEQUENTIAL, figure, number, shown, shown_interval, ticks, wrapped


def cross_task(label: str, body: CrossTask, shape: Shape | None = None) -> list[Block]:
    """Every circuit on the prompts of every task."""
    circuits, tasks, controls = body["circuits"], body["tasks"], set(body["controls"])
    values = [[number(cell["value"]) for cell in row] for row in body["percent"]]
    names = [f"{name} (control)" if name in controls else name for name in circuits]
    low, high = (pick([value for row in values for value in row if value is not None] or [0.0]) for pick in (min, max))
    heat = go.Heatmap(
        z=values,
        text=[[shown_interval(cell, "").replace(" [", "\n[") for cell in row] for row in body["percent"]],
        texttemplate="%{text}",
        hoverinfo="text",
        colorscale=SEQUENTIAL,
        zmin=min(0.0, low),
        zmax=max(100.0, high),
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "%", "side": "right"}, "thickness": 14, "outlinewidth": 0},
    )
    drawn = figure(
        140 + 56 * len(circuits),
        [heat],
        xaxis={"title": {"text": "prompts of"}, "showgrid": False, **ticks([wrapped(task) for task in tasks])},
        yaxis={"title": {"text": "circuit of"}, "showgrid": False, "autorange": "reversed", **ticks([wrapped(name, 26) for name in names])},
    )
    of_edges = " of edges" if "level" in body else ""
    prompts = ", ".join(f"{task} {n}" for task, n in body["n_prompts"].items())
    return [
        Drawing(
            file_name("cross-task", label),
            drawn,
            f"Performance in % of the untouched {body['model']} with the circuit{of_edges} of a row on the prompts of a column, with its "
            f"bootstrap interval; darker is better{f' (prompts: {prompts})' if prompts else ''}.",
        )
    ]


def stability(label: str, body: Stability, shape: Shape | None = None) -> list[Block]:
    """What stays of a circuit when the search is repeated under other conditions."""
    shares = {name: number(each["share"]) for name, each in body["nodes"].items()}
    percent = {name: None if share is None else 100 * share for name, share in shares.items()}
    in_all = [name for name, share in shares.items() if share == 1]  # of circuits of edges the map shows the components
    drawn = node_map(percent, model_shape(shape, shares), unit="% of the runs", marked=in_all)
    varied = ("corruption", "seed", "order", "threshold")
    runs = tuple((run["label"], *_settings(run), shown(run["score"], "%"), _size(run)) for run in body["runs"])
    means = tuple((key, shown(number(value), digits=2)) for key, value in body["mean_jaccard"].items())
    survivors = (
        ("all runs", " ".join(body["survive_all"]) or "none"),
        ("all corruptions", " ".join(body["survive_corruptions"]) or "none"),
    )
    return [
        Drawing(
            file_name("stability", label),
            drawn,
            f"Share in % of {len(body['runs'])} repeated searches that found a component; a frame marks what all of them found.",
        ),
        Table(("survives", "members"), survivors, "Members that every repetition found, and those that every corruption found."),
        Table(("varied", "mean Jaccard"), means, "Mean overlap (1 = equal) of the circuits of two runs that differ in just this setting."),
        Table(("run", *varied, "score", "size"), runs, "The runs; size counts heads and MLPs."),
    ]


def _settings(run: StabilityRun) -> tuple[str, ...]:
    return tuple(map(_cell, (run["corruption"], run["seed"], run["order"], run["threshold"])))


def _size(run: StabilityRun) -> str:
    return f"{len(run['nodes'])}, {len(run['edges'])} edges" if "edges" in run else str(len(run["nodes"]))


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)
