"""What circuits of one model share, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import reduce
from itertools import combinations
from math import comb
from operator import and_, or_
from typing import Any

from circuitkit.core.bodies import ComparedCircuit, Comparison, Pair
from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Kind, Level


def shared_by_all(circuits: Mapping[str, Circuit]) -> Circuit:
    """The sub-circuit that all circuits have, which may be empty; its score was not measured.

    Raises:
        CircuitError: No circuit, or circuits of different models or levels.
    """
    return reduce(and_, _some(circuits))


def union(circuits: Mapping[str, Circuit]) -> Circuit:
    """All that any of the circuits has. Raises as ``shared_by_all``."""
    return reduce(or_, _some(circuits))


def containment(a: Circuit, b: Circuit) -> float | None:
    """Number of shared members over the size of the smaller circuit: 1.0 where one lies within the other; None if one is empty.

    Members are the nodes, or the edges of circuits of edges.
    """
    smaller = min(len(a.members), len(b.members))
    return len((a & b).members) / smaller if smaller else None


def p_value(a: Circuit, b: Circuit) -> float | None:
    """Probability that two random circuits of the sizes of these share at least as many members as they do; exact.

    Of circuits of nodes as many heads and as many MLPs are drawn, apart and without replacement, so each count is hypergeometric and their
    sum a convolution; whole attentions count as heads do. None for circuits whose members cover only some positions, or are neurons or
    features, because what they are drawn from is not known.

    Of circuits of edges as many edges are drawn without replacement, so their count is hypergeometric. They are drawn from the edges
    between all components between which either of the two was searched (the union of their frames) and not from those of the whole
    model: of two searches in small frames nearly any result would be no chance there.
    """
    if a.level.of_edges:
        by_edges = _shared_counts(_n_edges(a | b), len(a.edges), len(b.edges))
        return float(Fraction(sum(by_edges[len((a & b).edges) :]), sum(by_edges)))
    nodes = (*a.nodes, *b.nodes)
    if any(node.span is not None or node.kind not in (Kind.HEAD, Kind.ATTENTION, Kind.MLP) for node in nodes):
        return None
    n_shared = len(a & b)
    heads = a.n_layers if a.level is Level.ATTENTION else a.n_layers * a.n_heads
    by_heads = _shared_counts(heads, len(a) - len(a.mlps), len(b) - len(b.mlps))
    by_mlps = _shared_counts(a.n_layers, len(a.mlps), len(b.mlps))
    ways = sum(x * y for i, x in enumerate(by_heads) for j, y in enumerate(by_mlps) if i + j >= n_shared)
    return float(Fraction(ways, sum(by_heads) * sum(by_mlps)))


def compare(circuits: Mapping[str, Circuit], provenance: Mapping[str, Any] | None = None) -> Finding[Comparison]:
    """Sizes, the overlap of each pair, and what all of them share.

    Of circuits of edges the overlap is that of the edges, and the sizes name them too.

    Args:
        circuits: At least two, by label.
        provenance: Settings and versions to keep with the result.

    Returns:
        A finding of kind ``compare``.

    Raises:
        CircuitError: Circuits of different models or levels, or fewer than two.
    """
    if len(circuits) < 2:
        raise CircuitError(f"A comparison needs at least two circuits, found {len(circuits)}. Name more files.")
    shared, every = shared_by_all(circuits), union(circuits)
    body: Comparison = {
        "circuits": {label: _compared(each) for label, each in circuits.items()},
        "pairs": [_pair(a, b, circuits[a], circuits[b]) for a, b in combinations(circuits, 2)],
        "shared_by_all": shared.member_names,
        "union": every.member_names,
        "universe": {"heads": every.n_layers * every.n_heads, "mlps": every.n_layers},
    }
    if every.level.of_edges:
        body["level"] = every.level.value
        body["universe"]["edges"] = _n_edges(every)
    return Finding("compare", f"What {', '.join(circuits)} share in {every.model}", body, provenance or {})


def _compared(each: Circuit) -> ComparedCircuit:
    heads, mlps = len(each.heads), len(each.mlps)
    row: ComparedCircuit = {"model": each.model, "heads": heads, "mlps": mlps, "score": each.score, "nodes": list(each.names)}
    if each.level.of_edges:
        row |= {"n_edges": len(each.edges), "edges": each.member_names}
    return row


def _pair(a: str, b: str, first: Circuit, second: Circuit) -> Pair:
    return {
        "a": a,
        "b": b,
        "shared": len((first & second).members),
        "jaccard": first.jaccard(second),
        "containment": containment(first, second),
        "p_value": p_value(first, second),
    }


def _n_edges(circuit: Circuit) -> int:
    """How many edges there can be between the components between which a circuit was searched."""
    return len(EdgeUniverse(circuit.within, circuit.level, circuit.parallel))


def _shared_counts(universe: int, a: int, b: int) -> list[int]:
    """For each number of shared members, in how many ways a set of size b can share so many with a given one of size a."""
    return [comb(a, shared) * comb(universe - a, b - shared) for shared in range(min(a, b) + 1)]


def _some(circuits: Mapping[str, Circuit]) -> list[Circuit]:
    if not circuits:
        raise CircuitError("There is no circuit to combine. Give at least one.")
    return list(circuits.values())
