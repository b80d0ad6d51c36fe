"""The paths inside a circuit: which were kept, and what each is worth."""

from __future__ import annotations

from circuitkit.core.bodies import EdgeSearch
from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Edge, Kind, Level, Node
from circuitkit.report.blocks import Block, Table
from circuitkit.report.figures.circuit_graph import circuit_graph
from circuitkit.report.figures.maps import Shape, model_shape
from circuitkit.report.figures.style import number, shown

_ROWS = 15


def circuit_of(body: EdgeSearch, shape: Shape | None = None) -> Circuit:
    """The circuit of nodes and kept edges that a search of edges found."""
    nodes = tuple(node for node in map(Node.parse, body["nodes"]) if node.kind in (Kind.HEAD, Kind.MLP))
    shape = model_shape(shape, map(str, nodes))
    kept = tuple(map(Edge.parse, body["kept"]))
    return Circuit(nodes, *shape, str(body["model"]), number(body["score"]), Level(body["level"]), edges=kept)


def costs_of(body: EdgeSearch) -> dict[str, float]:
    """Edge name to the points of performance that the circuit of nodes loses without it."""
    before = number(body["node_score"])
    scores = {name: number(score) for name, score in body["edges"].items()}
    return {name: before - score for name, score in scores.items() if score is not None and before is not None}


def edges(label: str, body: EdgeSearch, shape: Shape | None = None) -> list[Block]:
    """The picture, the main numbers and the most important edges."""
    circuit, costs = circuit_of(body, shape), costs_of(body)
    kept = set(body["kept"])
    dropped = " ".join(body["dropped_nodes"] or ()) or "none"
    mlps = {"recompute": "computed anew", "freeze": "held fixed"}.get(str(body["mlps"]), str(body["mlps"]))
    rows = (
        ("edges tested", str(len(body["edges"]))),
        ("edges kept", str(len(kept))),
        ("rule", f"{body['rule']}, threshold {shown(number(body['threshold']), '%')}, MLPs between {mlps}"),
        ("score before, of the circuit of nodes", shown(number(body["node_score"]), "%")),
        ("score with the kept edges alone", shown(number(body["score"]), "%")),
        ("nodes without a path to the output", dropped),
    )
    top = sorted(costs.items(), key=lambda item: -item[1])[:_ROWS]
    strongest = tuple((name, shown(cost, "points", 2), "kept" if name in kept else "removed") for name, cost in top)
    return [
        circuit_graph(label, circuit, costs),
        Table(("", ""), rows, "Main numbers of the search of edges."),
        Table(("edge", "cost", ""), strongest, "The edges whose removal costs most, in percentage points of the circuit's score."),
    ]
