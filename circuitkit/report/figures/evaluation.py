"""How well a circuit does alone, and what each of its members is worth."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from circuitkit.core.bodies import EvaluatedCircuit, Evaluation, PromptScores, RemovedSet
from circuitkit.report.blocks import Block, Drawing, Table
from circuitkit.report.figures.maps import Shape, are_cells, file_name, model_shape, node_map
from circuitkit.report.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    SERIES,
    error_bars,
    figure,
    interval,
    number,
    shown,
    shown_interval,
)

_BARS = 40
_EDGES = 15
_NAMES = 40


def evaluation(label: str, body: Evaluation, shape: Shape | None = None) -> list[Block]:
    """Every drawing and table of one evaluation, as far as there is something to draw."""
    blocks: list[Block] = [summary(body)]
    if body["random_circuits"]["scores"]:
        blocks.append(against_random(label, body))
    if body["removed_from_circuit"]:
        blocks.append(removed_from_circuit(label, body))
    if "frame" in body and body["removed_from_model"]:
        blocks += removed_from_frame(body)
    elif are_cells(body["removed_from_model"]):
        blocks += removed_from_model(label, body, shape)
    if body["sets_removed_from_model"]:
        blocks.append(sets_removed(body))
    if body["prompts"]:
        blocks.append(prompts(label, body))
    return blocks


def summary(body: Evaluation) -> Table:
    """The main numbers."""
    circuit, unit = body["circuit"], str(body["unit"])
    rows = (
        ("circuit", f"{circuit['label']}: {circuit.get('size') or _size(circuit)}{_edges(body)}"),
        ("model, task, metric", f"{body['model']}, {body['task']}, {body['metric']}"),
        ("score of the circuit alone", shown_interval(body["score"])),
        ("how it is normalised", body.get("formula", "not said")),
        ("untouched model", f"{shown(number(body['clean_mean']), unit, 3)} on {body['n_prompts']} prompts"),
        ("everything replaced", shown(number(body["patched_mean"]), unit, 3)),
    )
    percent = 100 * body["confidence"]
    return Table(("", ""), rows, f"Main numbers; in brackets the {percent:.0f} % bootstrap interval of {body['resamples']} resamples.")


def _edges(body: Evaluation) -> str:
    """The size of a circuit of edges, and of what it lies in."""
    if "frame" not in body:
        return ""
    return f", {len(body['circuit']['edges'])} of the {body['frame_edges']} edges between the {len(body['frame'])} components of its frame"


def against_random(label: str, body: Evaluation) -> Drawing:
    """The circuit's score beside those of random circuits of its size."""
    random = body["random_circuits"]
    scores = [number(score) for score in random["scores"]]
    value, up, down = interval(body["score"])
    drawn = figure(
        240,
        [
            go.Box(x=scores, y=["random"] * len(scores), boxpoints="all", jitter=0.6, pointpos=0, fillcolor="rgba(0,0,0,0)",
                   line={"color": PALE}, marker={"color": GREY, "size": 7, "opacity": 0.7}, name="random", orientation="h",
                   hoverinfo="x", showlegend=False),
            go.Scatter(x=[value], y=["circuit"], mode="markers", marker={"size": 13, "color": BLUE, "symbol": "diamond"},
                       error_x=error_bars([(value, up, down)], BLUE), name="circuit", hoverinfo="x", showlegend=False),
        ],
        xaxis={"title": {"text": "score (% of the untouched model)"}},
        yaxis={"categoryorder": "array", "categoryarray": ["random", "circuit"]},
    )  # fmt: skip
    as_good = sum(score is not None and value is not None and score >= value for score in scores)
    return Drawing(
        file_name("random", label),
        drawn,
        f"Score in % of {body['circuit']['label']} (diamond, with its interval) and of {len(scores)} random circuits of the same size "
        f"(dots; mean {shown(number(random.get('mean')), '%')}), of which {as_good} are as good as the circuit.",
    )


def removed_from_circuit(label: str, body: Evaluation) -> Drawing:
    """How far the circuit's score falls without each member."""
    removed, of_edges = body["removed_from_circuit"], "frame" in body
    unit, colours = ("edge", "") if of_edges else ("member", "heads blue, MLPs orange, ")
    title = f"removed {unit}"
    drops = sorted(((name, number(each["drop"]), each) for name, each in removed.items()), key=lambda item: -(item[1] or 0.0))[:_BARS]
    ends = []
    for _, drop, each in drops:  # the drop is the score's distance to a fixed number, so it has the score's interval, upside down
        _, up, down = interval(each)
        ends.append((drop, down, up))
    bars = go.Bar(
        x=[name for name, _, _ in drops],
        y=[drop for _, drop, _ in drops],
        marker={"color": [ORANGE if name.startswith("m") and not of_edges else BLUE for name, _, _ in drops]},
        error_y=error_bars(ends),
        hovertext=[f"{name}: {shown(drop, 'points')}, leaves {shown_interval(each)}" for name, drop, each in drops],
        hoverinfo="text",
        showlegend=False,
    )
    drawn = figure(380, [bars], yaxis={"title": {"text": "drop of the score (points)"}, "zeroline": True, "zerolinecolor": GREY},
                   xaxis={"type": "category", "tickangle": -60 if len(drops) > 14 else 0, "title": {"text": title}})  # fmt: skip
    rest = f" The {_BARS} largest of {len(removed)} are shown." if len(removed) > _BARS else ""
    return Drawing(
        file_name("removed-from-circuit", label),
        drawn,
        f"Drop of the circuit's score, in percentage points, when one {unit} is removed from it: {colours}"
        f"whiskers are bootstrap intervals.{rest}",
    )


def removed_from_model(label: str, body: Evaluation, shape: Shape | None) -> list[Drawing]:
    """The map of what the whole model is left with when one node is removed."""
    values = {name: number(each["value"]) for name, each in body["removed_from_model"].items()}
    marked = [name for name in body["circuit"]["nodes"] if name in values]
    drawn = node_map(values, model_shape(shape, [*values, *marked]), unit="%", middle=100.0, marked=marked)
    random, n_heads = body["random_head"]["mean_drop"], body["random_head"]["n"]
    usual = "" if random is None else f" Removing any one of {n_heads} heads costs {random:.1f} points on average, gains counted as 0."
    return [
        Drawing(
            file_name("removed-from-model", label),
            drawn,
            "Performance in % that the whole model is left with when one component alone is removed from it (white = 100; orange: worse "
            f"without it, blue: better); a frame marks a member of {body['circuit']['label']}.{usual}",
        )
    ]


def removed_from_frame(body: Evaluation) -> list[Block]:
    """The edges of the circuit whose removal costs most where all other edges of the frame are there."""
    removed = sorted(body["removed_from_model"].items(), key=lambda item: -(number(item[1]["drop"]) or 0.0))
    rows = tuple((name, shown_interval(each), shown(number(each["drop"]), "points", 2)) for name, each in removed[:_EDGES])
    rest = f" The {_EDGES} strongest of {len(removed)}." if len(removed) > _EDGES else ""
    caption = f"What is left, in % of the untouched model, when one edge alone is removed from the frame with all of its edges.{rest}"
    return [Table(("removed edge", "score left", "drop"), rows, caption)]


def sets_removed(body: Evaluation) -> Table:
    """What the whole model is left with when a set is removed."""
    rows = tuple((each["label"], shown_interval(each["score"]), _members(each)) for each in body["sets_removed_from_model"])
    units, whole = ("edges", "frame with all of its edges") if "frame" in body else ("nodes", "whole model")
    return Table(("removed set", "score left", units), rows, f"Performance in % of the {whole} when a set is removed from it at once.")


def _members(entry: RemovedSet) -> str:
    """The members of a set; of random sets how many of the set's own they hold."""
    if not entry.get("in_common"):
        names = list(entry["nodes"])
        is_long = len(names) > _NAMES and "->" in names[0]
        return " ".join([*names[:_NAMES], "and", str(len(names) - _NAMES), "more"] if is_long else names)
    return f"{entry['in_common']:g} of the set's own members on average, because the model has too few others"


def prompts(label: str, body: Evaluation) -> Drawing:
    """Prompt by prompt, the circuit against the whole model."""
    unit = str(body["unit"])
    by_group: dict[str, list[PromptScores]] = {}
    for each in body["prompts"]:
        by_group.setdefault(each["group"], []).append(each)
    traces: list[Any] = []
    numbers = [value for each in body["prompts"] for value in (number(each["clean"]), number(each["circuit"])) if value is not None]
    ends = [min(numbers, default=0.0), max(numbers, default=1.0)]
    traces.append(go.Scatter(x=ends, y=ends, mode="lines", line={"color": PALE, "dash": "dot"}, hoverinfo="skip", showlegend=False))
    for place, (group, some) in enumerate(by_group.items()):
        traces.append(
            go.Scatter(
                x=[number(each["clean"]) for each in some],
                y=[number(each["circuit"]) for each in some],
                mode="markers",
                marker={"size": 7, "color": SERIES[place % len(SERIES)], "opacity": 0.75, "symbol": place % 6},
                hovertext=[
                    f"{each['text']}\nmodel {shown(number(each['clean']), unit, 2)}, circuit {shown(number(each['circuit']), unit, 2)}"
                    for each in some
                ],
                hoverinfo="text",
                name=group,
                showlegend=len(by_group) > 1,
            )
        )
    drawn = figure(460, traces, xaxis={"title": {"text": f"untouched model ({unit})"}}, yaxis={"title": {"text": f"circuit ({unit})"}})
    return Drawing(
        file_name("prompts", label),
        drawn,
        f"Each dot is one of {len(body['prompts'])} prompts: its metric in {unit} with the untouched model (across) and with the circuit "
        "alone (up); on the dotted line the circuit does just what the model does.",
    )


def _size(circuit: EvaluatedCircuit) -> str:
    return f"{circuit['n_heads']} heads, {circuit['n_mlps']} MLPs"
