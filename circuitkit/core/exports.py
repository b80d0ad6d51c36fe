"""A circuit as a drawing: where its nodes stand, and the graph in the formats of other programs (DOT, GraphML, JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import INPUT, LOGITS, Kind, Node

if TYPE_CHECKING:
    import networkx

_IN_A_ROW = 12  # heads; a layer with more takes several rows


def layered(nodes: Iterable[Node]) -> dict[str, tuple[float, float]]:
    """Where each node stands: layers from bottom to top, heads side by side, MLPs in a column to their right.

    Layers without a node take no space. The unit is the width of a head.

    Args:
        nodes: Heads and MLPs in any order; the input and the logits, where they are among them, stand below and above the others.

    Returns:
        Name to (x, y).
    """
    nodes = set(nodes)
    inner = sorted((node for node in nodes if node.kind in (Kind.HEAD, Kind.MLP)), key=_order)
    found: dict[str, tuple[float, float]] = {}
    widest = 1
    row = 0.0
    for _, layer in groupby(inner, key=lambda node: node.layer):
        members = list(layer)
        heads = [node for node in members if node.kind is Kind.HEAD]
        mlps = [node for node in members if node.kind is Kind.MLP]
        rows = [heads[start : start + _IN_A_ROW] for start in range(0, len(heads), _IN_A_ROW)] or [[]]
        for place, some in enumerate(rows):
            widest = max(widest, len(some))
            # Rows are shifted to and fro, so that a path over a layer does not run through the head between.
            aside = 0.3 if (row + place) % 2 else -0.3
            found |= {str(node): (spot - (len(some) - 1) / 2 + aside, row + place) for spot, node in enumerate(some)}
        row += len(rows) - 1
        # Half a row higher: the MLP of a layer reads what its heads write.
        found |= {str(node): (float(spot), row + 0.5) for spot, node in enumerate(mlps)}
        row += 1
    shift = (widest - 1) / 2 + 1.5
    for node in inner:
        if node.kind is Kind.MLP:
            x, y = found[str(node)]
            found[str(node)] = (x + shift, y)
    ends = ((INPUT, -1.0), (LOGITS, row + 0.25))
    return found | {str(node): (0.0, y) for node, y in ends if node in nodes}


def graph_of(circuit: Circuit, weights: Mapping[str, float] | None = None) -> networkx.MultiDiGraph:
    """The circuit as a graph of networkx: an edge a path, its key the port that it leads into (q, k, v, or in).

    Args:
        circuit: Of nodes, or with edges; the input and the logits are drawn only with edges.
        weights: Edge or node name to a number, such as the performance in % left without it.
    """
    import networkx

    weights = weights or {}
    ends = (INPUT, LOGITS) if circuit.edges else ()
    nodes = (*ends[:1], *circuit.nodes, *ends[1:])
    places = layered(nodes)
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


def _order(node: Node) -> tuple[int, bool, int, str]:
    return (node.layer, node.kind is Kind.MLP, node.head or 0, node.span or "")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
