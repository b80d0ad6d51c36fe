"""EdgeGraph: the direct paths between the members of a circuit, in the order in which a model computes their receivers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.errors import CircuitError
from circuitkit.core.graph import Edge, Kind, Level, Node

INPUT = Node(Kind.INPUT)
"""The embedding: where every path begins."""
LOGITS = Node(Kind.LOGITS)
"""What the unembedding reads: where every path ends."""
PORTS = ("q", "k", "v")
"""What a head reads: its queries, keys and values."""


@dataclass(frozen=True)
class EdgeGraph:
    """All edges that can be between some nodes. A mask over it is a boolean vector in the order of ``edges``: True = left as it is.

    Attributes:
        nodes: Heads and MLPs, in causal order. The input and the logits are always there.
        level: ``edge_qkv`` for an edge into each of a head's queries, keys and values; ``edge`` for one into the head.
        parallel: Whether the MLP of a layer reads what the attention of that layer reads, so that no edge runs between them.
    """

    nodes: tuple[Node, ...]
    level: Level = Level.EDGE_QKV
    parallel: bool = False

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """The input and every node, in causal order."""
        return (INPUT, *self.nodes)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """What edges lead into, in causal order: heads or their ports, MLPs, the logits."""
        found: list[Node] = []
        for node in self.nodes:
            split = node.kind is Kind.HEAD and self.level is Level.EDGE_QKV
            found += [replace(node, port=port) for port in PORTS] if split else [node]
        return (*found, LOGITS)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge: receivers in causal order, for each its senders in causal order."""
        return tuple(Edge(src, dst) for dst in self.receivers for src in self.senders if precedes(src, dst, self.parallel))

    @cached_property
    def _places(self) -> dict[Edge, int]:
        return {edge: place for place, edge in enumerate(self.edges)}

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def index(self, edge: Edge | str) -> int:
        """The place of an edge in a mask.

        Raises:
            CircuitError: It is not in this graph; the text says why.
        """
        edge = Edge.parse(edge) if isinstance(edge, str) else edge
        if edge in self._places:
            return self._places[edge]
        for end, choices in ((edge.src, self.senders), (edge.dst, self.receivers)):
            if end not in choices:
                raise CircuitError(
                    f"Edge {str(edge)!r} cannot be in this circuit: {end} is not among its "
                    f"{'senders' if choices is self.senders else 'receivers'}, which are {', '.join(map(str, choices))}."
                )
        raise CircuitError(f"Edge {str(edge)!r} runs against the causal order: {edge.dst} is computed before {edge.src}, or beside it.")

    def full(self) -> Bool[Tensor, "edge"]:
        """The mask that keeps every edge."""
        return torch.ones(len(self), dtype=torch.bool)

    def empty(self) -> Bool[Tensor, "edge"]:
        """The mask that removes every edge."""
        return torch.zeros(len(self), dtype=torch.bool)

    def mask(self, edges: Iterable[Edge | str]) -> Bool[Tensor, "edge"]:
        """The mask that keeps just these edges."""
        mask = self.empty()
        for edge in edges:
            mask[self.index(edge)] = True
        return mask

    def without(self, mask: Bool[Tensor, "edge"], edges: Iterable[Edge | str]) -> Bool[Tensor, "edge"]:
        """The same mask with these edges removed."""
        mask = mask.clone()
        for edge in edges:
            mask[self.index(edge)] = False
        return mask

    def members(self, mask: Bool[Tensor, "edge"]) -> tuple[Edge, ...]:
        """The edges that a mask keeps, in order."""
        return tuple(edge for edge, kept in zip(self.edges, mask.tolist(), strict=True) if kept)

    def live(self, mask: Bool[Tensor, "edge"]) -> tuple[tuple[Node, ...], tuple[Edge, ...]]:
        """The nodes from which kept edges lead to the logits, and the kept edges into these nodes and the logits."""
        kept = self.members(mask)
        reached = {LOGITS}
        for edge in reversed(kept):  # receivers in causal order, so one sweep back finds every path
            if edge.dst.component_of_port in reached:
                reached.add(edge.src)
        return (
            tuple(node for node in self.nodes if node in reached),
            tuple(edge for edge in kept if edge.dst.component_of_port in reached),
        )


def precedes(src: Node, dst: Node, parallel: bool = False) -> bool:
    """Whether the output of one node is read directly by another.

    Args:
        src: A sender.
        dst: A receiver.
        parallel: Whether MLP and attention of a layer read the same.
    """
    if src.kind is Kind.LOGITS or dst.kind is Kind.INPUT:
        return False
    if src.kind is Kind.INPUT or dst.kind is Kind.LOGITS:
        return True
    same_layer = src.kind is Kind.HEAD and dst.kind is Kind.MLP and not parallel
    return src.layer < dst.layer or (same_layer and src.layer == dst.layer)
