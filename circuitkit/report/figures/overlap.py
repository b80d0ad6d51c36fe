"""What the circuits of several tasks share: one picture, coloured by who has what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from circuitkit.core.bodies import ComparedCircuit, Comparison
from circuitkit.core.circuit import Circuit
from circuitkit.core.node import INPUT, LOGITS, Edge, Node
from circuitkit.report.blocks import Block, Drawing, Table
from circuitkit.report.figures.circuit_graph import curve, graph_figure, node_trace, spread
from circuitkit.report.figures.layout import layered
from circuitkit.report.figures.maps import Shape, file_name
from circuitkit.report.figures.style import BLUE, GOLD, GREEN, GREY, INK, ORANGE, PURPLE, RED, SERIES, rgba, shown

_THREE = (RED, BLUE, GOLD)
_PAIRS = {(0, 1): PURPLE, (0, 2): ORANGE, (1, 2): GREEN}


def colour_of(who: Sequence[str], labels: Sequence[str]) -> str:
    """The colour of what is in just these of the circuits.

    Up to three circuits: red, blue and gold for one alone, their mixtures for pairs, ink for all. More than three: a colour each for
    one alone, grey for some, ink for all.

    Args:
        who: Labels of the circuits that have it.
        labels: Labels of all circuits.
    """
    if len(who) == len(labels):
        return INK
    spots = tuple(sorted(labels.index(label) for label in who))
    if len(labels) > 3:
        return SERIES[spots[0] % len(SERIES)] if len(spots) == 1 else GREY
    return _THREE[spots[0]] if len(spots) == 1 else _PAIRS[spots[0], spots[1]]


def owners(circuits: Mapping[str, Circuit]) -> dict[str, tuple[str, ...]]:
    """Node or edge name to the circuits that have it, in the order of the circuits."""
    found: dict[str, tuple[str, ...]] = {}
    for label, circuit in circuits.items():
        for member in (*circuit.names, *map(str, circuit.edges)):
            found[member] = (*found.get(member, ()), label)
    return found


def overlap(circuits: Mapping[str, Circuit]) -> list[Block]:
    """The picture and the table of what circuits of one model share.

    Args:
        circuits: Label to circuit, at least two, all of one shape.
    """
    labels = tuple(circuits)
    groups: dict[tuple[str, ...], list[str]] = {}
    for member, who in owners(circuits).items():
        groups.setdefault(who, []).append(member)
    ordered = sorted(groups, key=lambda who: (-len(who), [labels.index(label) for label in who]))
    nodes = {node for circuit in circuits.values() for node in circuit.nodes}
    has_edges = any(circuit.edges for circuit in circuits.values())
    places = spread(layered(nodes | ({INPUT, LOGITS} if has_edges else set())))
    lines: list[Any] = []
    marks: list[Any] = []
    titled: set[str] = set()
    for who in ordered:
        colour, title = colour_of(who, labels), title_of(who, labels)
        edges = [Edge.parse(name) for name in groups[who] if "->" in name]
        members = sorted((Node.parse(name) for name in groups[who] if "->" not in name), key=lambda node: places[str(node)])
        if edges:
            lines.append(_edges(edges, places, colour, bold=who == labels))
        trace = node_trace(members, places, title, colour, {str(node): f"{node}: {', '.join(who)}" for node in members})
        if trace is not None:
            trace.showlegend = title not in titled
            trace.legendgroup = title
            titled.add(title)
            marks.append(trace)
    ends = node_trace([node for node in (INPUT, LOGITS) if has_edges], places, "", GREY)
    drawn = graph_figure([*lines, *marks, *([ends] if ends is not None else [])], places, 78 if has_edges else 52)
    drawn.update_layout(legend={"itemsizing": "trace", "font": {"size": 12}})
    caption = (
        f"Overlap of the circuits of {', '.join(labels)}: heads are circles (layer.head), MLPs squares, layers from bottom to top; the "
        "colour says which circuits have a member."
    )
    rows = tuple(_row(who, labels, groups[who], has_edges) for who in ordered)
    header = ("members of", "heads", "MLPs", *(("edges",) if has_edges else ()), "which")
    return [
        Drawing(file_name("overlap", *labels), drawn, caption),
        Table(header, rows, "The same as names: which members belong to which circuits."),
    ]


def title_of(who: Sequence[str], labels: Sequence[str]) -> str:
    """What a set of circuits is called in the legend."""
    if len(who) == len(labels):
        return f"all {len(labels)}" if len(labels) > 2 else "both"
    if len(who) == 1:
        return f"{who[0]} only"
    return " and ".join(who) if len(labels) <= 3 else f"some (2 to {len(labels) - 1})"


def compared(label: str, body: Comparison, shape: Shape | None = None) -> list[Block]:
    """The numbers of a comparison: sizes, and the overlap of each pair."""
    of_edges = "level" in body
    sizes = tuple((name, each["model"], *_counts(each, of_edges), shown(each["score"], "%")) for name, each in body["circuits"].items())
    titles = ("circuit", "model", "heads", "MLPs", *(("edges",) if of_edges else ()), "score")
    units = "edges" if of_edges else "members"
    pairs = tuple(
        (
            f"{pair['a']} and {pair['b']}",
            str(pair["shared"]),
            shown(pair["jaccard"], digits=2),
            shown(pair["containment"], digits=2),
            _p_value(pair["p_value"]),
        )
        for pair in body["pairs"]
    )
    return [
        Table(titles, sizes, "Size and score of each circuit, in % of the untouched model."),
        Table(
            ("pair", "shared", "Jaccard", "containment", "p"),
            pairs,
            f"Overlap of each pair: {units} in both, that number over the size of the union (Jaccard) and over the smaller circuit "
            "(containment), and the probability of so large an overlap by chance.",
        ),
    ]


def _counts(circuit: ComparedCircuit, of_edges: bool) -> tuple[str, ...]:
    return str(circuit["heads"]), str(circuit["mlps"]), *((str(circuit["n_edges"]),) if of_edges else ())


def _p_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _row(who: Sequence[str], labels: Sequence[str], members: list[str], has_edges: bool) -> tuple[str, ...]:
    names = [name for name in members if "->" not in name]
    n_edges = (str(len(members) - len(names)),) if has_edges else ()
    title = "all" if len(who) == len(labels) else f"{who[0]} only" if len(who) == 1 else " and ".join(who)
    heads = sum(not name.startswith("m") for name in names)
    return title, str(heads), str(len(names) - heads), *n_edges, " ".join(names)


def _edges(edges: Sequence[Edge], places: Mapping[str, tuple[float, float]], colour: str, bold: bool) -> go.Scatter:
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for edge in edges:
        x, y = curve(edge, places)
        xs, ys, texts = [*xs, *x, None], [*ys, *y, None], [*texts, *[str(edge)] * (len(x) + 1)]
    line = {"color": rgba(colour, 0.8 if bold else 0.4), "width": 2.4 if bold else 1.2}
    return go.Scatter(x=xs, y=ys, mode="lines", line=line, hovertext=texts, hoverinfo="text", showlegend=False)
