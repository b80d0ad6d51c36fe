"""A circuit as a graph, in the formats of other programs: DOT, GraphML, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import INPUT, LOGITS

if TYPE_CHECKING:
    import networkx


def graph_of(
    circuit: Circuit, places: Mapping[str, tuple[float, float]], weights: Mapping[str, float] | None = None
) -> networkx.MultiDiGraph:
    """The circuit as a graph of networkx: an edge a path, its key the port that it leads into (q, k, v, or in).

    Args:
        circuit: Of nodes, or with edges; the input and the logits are in the graph only with edges.
        places: Node name to where it stands in a drawing, (x, y).
        weights: Edge or node name to a number, such as the performance in % left without it.
    """
    import networkx

    weights = weights or {}
    ends = (INPUT, LOGITS) if circuit.edges else ()
    nodes = (*ends[:1], *circuit.nodes, *ends[1:])
    graph = networkx.MultiDiGraph(model=circuit.model, n_layers=circuit.n_layers, n_heads=circuit.n_heads)
    for node in nodes:
        x, y = places[str(node)]
        weight = {"weight": float(weights[str(node)])} if str(node) in weights else {}
        graph.add_node(str(node), kind=str(node.kind), layer=node.layer, x=x, y=y, **weight)
    for edge in circuit.edges:
        weight = {"weight": float(weights[str(edge)])} if str(edge) in weights else {}
        graph.add_edge(str(edge.src), str(edge.dst.component_of_port), key=edge.dst.port or "in", name=str(edge), **weight)
    return graph


def to_graphml(graph: networkx.MultiDiGraph) -> str:
    """The graph as GraphML, which Gephi, Cytoscape and yEd read."""
    import networkx

    return "\n".join(networkx.generate_graphml(graph)) + "\n"


def to_json(graph: networkx.MultiDiGraph) -> str:
    """The graph as JSON of nodes and edges, which D3 and networkx read."""
    import networkx

    return json.dumps(networkx.node_link_data(graph, edges="edges"), indent=2) + "\n"


def to_dot(graph: networkx.MultiDiGraph) -> str:
    """The graph in Graphviz's language, with fixed places for ``neato -n`` and ranks for ``dot``."""
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=ellipse];"]
    for name, each in graph.nodes(data=True):
        shape = {"mlp": "box", "head": "ellipse"}.get(each["kind"], "plaintext")
        lines.append(f'  {_quoted(name)} [shape={shape}, pos="{72 * each["x"]:.0f},{72 * each["y"]:.0f}!"];')
    for src, dst, port, each in graph.edges(keys=True, data=True):
        fields = [f"label={_quoted(port)}"] if port != "in" else []
        fields += [f"weight_percent={each['weight']:.6g}"] if "weight" in each else []
        lines.append(f"  {_quoted(src)} -> {_quoted(dst)}" + (f" [{', '.join(fields)}];" if fields else ";"))
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
