"""What a model can still answer when sets of components are removed, beside random sets of the same size."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from circuitkit.core.bodies import Accuracy, Transfer
from circuitkit.report.blocks import Block, Drawing, Table
from circuitkit.report.figures.maps import Shape, file_name
from circuitkit.report.figures.style import GREY, INK, PALE, SERIES, error_bars, figure, interval, number, shown, ticks, wrapped

_EXAMPLES = 40
_TALLEST = 1000  # pixels, so that it fits a printed page


def transfer(label: str, body: Transfer, shape: Shape | None = None) -> list[Block]:
    """The bars, the tasks and the examples."""
    tasks = tuple(
        (str(each["name"]), str(each["asked"]), str(each["solved"]), _percent(number(each["clean_accuracy"]))) for each in body["tasks"]
    )
    sets = tuple(
        (str(each["label"]), f"{each['draws']} random draws" if each["control"] else "given", " ".join(each["nodes"]))
        for each in body["sets"]
    )
    examples = tuple(
        (str(each["task"]), str(each["prompt"]), str(each["answer"]), str(each["set"]), str(each["generated"]))
        for each in body["examples"]
    )
    blocks: list[Block] = [
        accuracy(label, body),
        Table(("task", "asked", "solved", "accuracy untouched"), tasks, "Prompts asked, and those that the untouched model solves."),
        Table(("set", "kind", "nodes"), sets, "The sets that were removed."),
    ]
    if examples:
        rest = f" The first {_EXAMPLES} of {len(examples)}." if len(examples) > _EXAMPLES else ""
        header = ("task", "prompt", "answer", "removed", "generated")
        blocks.append(Table(header, examples[:_EXAMPLES], f"What the model says when a set is removed.{rest}"))
    return blocks


def accuracy(label: str, body: Transfer) -> Drawing:
    """Accuracy for each task and removed set; random controls are grey, their single draws are dots."""
    tasks = [str(each["name"]) for each in body["tasks"]]
    controls = {str(each["label"]) for each in body["sets"] if each["control"]}
    labels = [str(each["label"]) for each in body["sets"]]
    width = 0.8 / max(1, len(labels))
    traces: list[Any] = []
    given = 0
    for place, name in enumerate(labels):
        spots = [spot + (place - (len(labels) - 1) / 2) * width for spot in range(len(tasks))]
        cells = [body["accuracy"].get(task, {}).get(name) for task in tasks]
        ends = [_interval(cell) if cell else (None, None, None) for cell in cells]
        colour = PALE if name in controls else SERIES[given % len(SERIES)]
        given += name not in controls
        traces.append(
            go.Bar(
                orientation="h",
                y=spots,
                x=[None if value is None else 100 * value for value, _, _ in ends],
                width=0.94 * width,
                error_x=error_bars([(value, 100 * (up or 0.0), 100 * (down or 0.0)) for value, up, down in ends]),
                name=name,
                marker={"color": colour, "pattern": {"shape": "/" if name in controls else "", "fgcolor": GREY}},
                hovertext=[f"{name}, {task}: {_percent(value)}" for task, (value, _, _) in zip(tasks, ends, strict=True)],
                hoverinfo="text",
            )
        )
        draws = [cell["draws"] if cell else [] for cell in cells] if name in controls else []
        traces += [_draws(spot, [number(draw) for draw in some], width) for spot, some in zip(spots, draws, strict=False) if some]
    drawn = figure(
        min(_TALLEST, 110 + len(tasks) * max(24, 9 * len(labels))),
        traces,
        barmode="overlay",
        yaxis={**ticks([wrapped(task, 26) for task in tasks]), "range": [len(tasks) - 0.5, -0.5], "showgrid": False},
        xaxis={"title": {"text": "answered rightly (%)"}, "range": [0, 105]},
    )
    return Drawing(
        file_name("transfer", label),
        drawn,
        f"Share in % of prompts that {body['model']} answers rightly when a set of components is removed (patcher {body['patcher']}), "
        "for each task; whiskers are 95 % intervals, of random sets their lowest and highest draw; hatched grey bars random sets of the "
        "same size, whose draws are the dots.",
    )


def _draws(spot: float, shares: list[float | None], width: float) -> go.Scatter:
    """The single draws as dots over their bar, side by side so that none hides another."""
    known = sorted(share for share in shares if share is not None)
    return go.Scatter(
        y=[spot + width * (0.7 * (place + 0.5) / len(known) - 0.35) for place in range(len(known))],
        x=[100 * share for share in known],
        mode="markers",
        marker={"color": INK, "size": 3, "opacity": 0.6},
        hovertext=[_percent(share) for share in known],
        hoverinfo="text",
        showlegend=False,
    )


def _interval(share: Accuracy) -> tuple[float | None, float | None, float | None]:
    return interval({"value": share["mean"], "low": share["low"], "high": share["high"]})


def _percent(share: float | None) -> str:
    return shown(None if share is None else 100 * share, "%")
