"""Where the nodes of a circuit stand in a drawing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from circuitkit.core.node import INPUT, LOGITS, Kind, Node

_IN_A_ROW = 12  # heads; a layer with more takes several rows


def layered(nodes: Iterable[Node]) -> dict[str, tuple[float, float]]:
    """Where each node stands: layers from bottom to top, heads (or neurons, features) side by side, MLPs in a column to their right.

    Layers without a node take no space. The unit is the width of a head.

    Args:
        nodes: Members in any order; the input and the logits, where they are among them, stand below and above the others.

    Returns:
        Name to (x, y).
    """
    nodes = set(nodes)
    inner = sorted((node for node in nodes if node not in (INPUT, LOGITS)), key=_order)
    found: dict[str, tuple[float, float]] = {}
    widest = 1
    row = 0.0
    for _, layer in groupby(inner, key=lambda node: node.layer):
        members = list(layer)
        heads = [node for node in members if node.kind is not Kind.MLP]
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


def _order(node: Node) -> tuple[int, bool, int, str]:
    return (node.layer, node.kind is Kind.MLP, node.head or node.index or 0, node.span or "")
