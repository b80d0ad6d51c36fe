"""The circuit as a picture: layers from bottom to top, heads beside MLPs, and the paths between them by the port they lead into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import INPUT, LOGITS, Edge, Kind, Node
from circuitkit.report.blocks import Drawing
from circuitkit.report.figures.layout import layered
from circuitkit.report.figures.maps import file_name
from circuitkit.report.figures.style import BLUE, GREY, ORANGE, PORT_COLOURS, figure, rgba

Places = Mapping[str, tuple[float, float]]

_OTHERS = (Kind.ATTENTION, Kind.NEURON, Kind.FEATURE, Kind.ERROR)
_STEPS = 14  # straight pieces of a curve
_SIZE = 34  # pixels of a node
_ACROSS = 13.0  # head widths that a figure is wide
_PORT_SHIFT = {"q": -0.2, "k": 0.0, "v": 0.2, "": 0.0}
_STRENGTHS = (0.18, 0.4, 0.68, 0.95)


def circuit_graph(label: str, circuit: Circuit, costs: Mapping[str, float] | None = None) -> Drawing:
    """The drawing of one circuit.

    Args:
        label: Of the circuit.
        circuit: With or without edges.
        costs: Edge name to points of performance that it costs to remove it, for how visible edges are; None to draw all alike.
    """
    nodes = [*circuit.nodes, *([INPUT, LOGITS] if circuit.edges else [])]
    places = spread(layered(nodes))
    heads = [node for node in nodes if node.kind is Kind.HEAD]
    traces = [*edge_traces(circuit.edges, places, costs or {}), *(port_dots(circuit.edges, places) if circuit.edges else [])]
    traces += [
        node_trace(heads, places, "head", BLUE),
        node_trace([node for node in nodes if node.kind is Kind.MLP], places, "MLP", ORANGE),
        node_trace([node for node in nodes if node.kind in _OTHERS], places, "attention, neuron or feature", BLUE),
        node_trace([node for node in nodes if node in (INPUT, LOGITS)], places, "", GREY),
    ]
    strength = ", the more visible the more it costs to remove it" if costs else ""
    paths = (
        f"Lines are the {len(circuit.edges)} direct paths that were kept, by what they lead into: queries (blue), keys (green) or values "
        f"(orange) of a head, an MLP or the output (grey){strength}."
        if circuit.edges
        else "Paths between members were not searched, so none are drawn: each member may read all members below it."
    )
    return Drawing(
        file_name("circuit", label),
        graph_figure([trace for trace in traces if trace is not None], places, 78 if circuit.edges else 52),
        f"Circuit {label}: {circuit.summary}; heads are circles (layer.head), MLPs squares, layers from bottom to top. {paths}",
    )


def spread(places: Places) -> Places:
    """The same places, drawn apart as far as the width of a figure lets them."""
    across = [x for x, _ in places.values()] or [0.0]
    factor = min(3.0, (_ACROSS - 2.5) / max(1.0, max(across) - min(across)))
    return {name: (factor * x, y) for name, (x, y) in places.items()}


def graph_figure(traces: Sequence[Any], places: Places, row_height: int) -> go.Figure:
    """Traces on a ground where the layers are named at the left.

    Args:
        traces: What is drawn.
        places: Where the nodes stand, already spread.
        row_height: Pixels of a layer.
    """
    across = [x for x, _ in places.values()] or [0.0]
    middle = (max(across) + min(across)) / 2
    up = [y for _, y in places.values()] or [0.0]
    rows: dict[float, str] = {}
    for name, (_, y) in places.items():
        node = Node.parse(name)
        if node not in (INPUT, LOGITS):
            rows[int(y) if node.kind is Kind.MLP else y] = f"layer {node.layer}"
    return figure(
        int(min(1250, 100 + row_height * (max(up) - min(up) + 1))),
        traces,
        xaxis={"visible": False, "range": [middle - _ACROSS / 2, middle + _ACROSS / 2]},
        yaxis={
            "showgrid": False,
            "showline": False,
            "tickvals": list(rows),
            "ticktext": list(rows.values()),
            "range": [min(up) - 0.6, max(up) + 0.6],
        },
    )


def node_trace(nodes: Sequence[Node], places: Places, name: str, colour: str, hover: Mapping[str, str] | None = None) -> go.Scatter | None:
    """Nodes of one colour; None where there are none."""
    if not nodes:
        return None
    return go.Scatter(
        x=[places[str(node)][0] for node in nodes],
        y=[places[str(node)][1] for node in nodes],
        mode="markers+text",
        marker={
            "size": _SIZE,
            "symbol": ["square" if node.kind is Kind.MLP else "circle" for node in nodes],
            "color": colour,
            "line": {"color": "white", "width": 1.5},
        },
        text=[short(node) for node in nodes],
        textfont={"size": 10, "color": "white"},
        hovertext=[(hover or {}).get(str(node), str(node)) for node in nodes],
        hoverinfo="text",
        name=name,
        showlegend=bool(name),
        cliponaxis=False,
    )


def edge_traces(edges: Iterable[Edge], places: Places, costs: Mapping[str, float]) -> list[go.Scatter]:
    """Curves, one trace for each port and visibility, so that also thousands of paths are quick to draw."""
    largest = max((max(0.0, cost) for cost in costs.values()), default=0.0)
    pieces: dict[tuple[str, float], tuple[list[float | None], list[float | None], list[str]]] = {}
    for edge in edges:
        share = max(0.0, costs.get(str(edge), 0.0)) / largest if largest else 0.4
        strength = _STRENGTHS[min(len(_STRENGTHS) - 1, int(share * len(_STRENGTHS)))]
        xs, ys, texts = pieces.setdefault((edge.dst.port or "", strength), ([], [], []))
        x, y = curve(edge, places)
        cost = f": {costs[str(edge)]:.2f} points" if str(edge) in costs else ""
        xs += [*x, None]
        ys += [*y, None]
        texts += [f"{edge}{cost}"] * len(x) + [""]
    titles = {"q": "into queries", "k": "into keys", "v": "into values", "": "into MLP, head or output"}
    first: set[str] = set()
    traces = []
    for (port, strength), (xs, ys, texts) in sorted(pieces.items(), key=lambda item: item[0][1]):
        colour = rgba(PORT_COLOURS[port], strength)
        line = {"color": colour, "width": 1.0 + 1.6 * strength}
        shared: dict[str, Any] = {"mode": "lines", "legendgroup": port}
        traces.append(go.Scatter(x=xs, y=ys, line=line, hovertext=texts, hoverinfo="text", showlegend=False, **shared))
        if port not in first:
            first.add(port)
            key = {"color": PORT_COLOURS[port], "width": 2.5}
            traces.append(go.Scatter(x=[None], y=[None], line=key, name=titles[port], **shared))
    return traces


def port_dots(edges: Iterable[Edge], places: Places) -> list[go.Scatter]:
    """A dot for each port of a head that a path leads into."""
    ports = sorted({edge.dst for edge in edges if edge.dst.port}, key=str)
    if not ports:
        return []
    spots = [_entry(port, places) for port in ports]
    return [
        go.Scatter(
            x=[x for x, _ in spots],
            y=[y for _, y in spots],
            mode="markers",
            marker={"size": 8, "color": [PORT_COLOURS[port.port or ""] for port in ports], "line": {"color": "white", "width": 1}},
            hovertext=[str(port) for port in ports],
            hoverinfo="text",
            showlegend=False,
        )
    ]


def curve(edge: Edge, places: Places) -> tuple[list[float], list[float]]:
    """A curve that leaves its sender upward and enters its receiver from below; between nodes of one column it makes a bow."""
    x0, y0 = places[str(edge.src)]
    x1, y1 = _entry(edge.dst, places)
    rise = y1 - y0
    bow = 0.0 if abs(x1 - x0) > 0.6 or rise < 1.3 else min(1.4, 0.28 + 0.13 * rise)
    points = ((x0, y0), (x0 + bow, y0 + 0.4 * rise), (x1 + bow, y1 - 0.4 * rise), (x1, y1))
    xs, ys = [], []
    for step in range(_STEPS + 1):
        t = step / _STEPS
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        xs.append(round(sum(weight * x for weight, (x, _) in zip(weights, points, strict=True)), 3))
        ys.append(round(sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)), 3))
    return xs, ys


def short(node: Node) -> str:
    """A name that fits into a node: 7.11 for a head, m9 for an MLP."""
    span = f"\n{node.span}" if node.span else ""
    return {Kind.HEAD: f"{node.layer}.{node.head}", Kind.INPUT: "in", Kind.LOGITS: "out"}.get(node.kind, str(node.component)) + span


def _entry(dst: Node, places: Places) -> tuple[float, float]:
    x, y = places[str(dst.component_of_port)]
    return (x + _PORT_SHIFT[dst.port or ""], y - 0.27) if dst.port else (x, y)
