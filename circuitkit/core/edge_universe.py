"""EdgeUniverse: the direct paths between components, as units that a mask is over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import CircuitError
from circuitkit.core.node import INPUT, LOGITS, PORTS, Edge, Kind, Level, Node, Unit, precedes
from circuitkit.core.universe import Universe


@dataclass(frozen=True)
class EdgeUniverse(Universe):
    """All direct paths that can be between some components: receivers in causal order, for each its senders in causal order. Final.

    Attributes:
        nodes: Heads and MLPs, in causal order. The input and the logits are always there.
        edge_level: ``edge_qkv`` for an edge into each of a head's queries, keys and values; ``edge`` for one into the head.
        parallel: Whether the MLP of a layer reads what the attention of that layer reads, so that no edge runs between them.
    """

    nodes: tuple[Node, ...]
    edge_level: Level = Level.EDGE_QKV
    parallel: bool = False

    @property
    def level(self) -> Level:
        return self.edge_level

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """The input and every node, in causal order."""
        return (INPUT, *self.nodes)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """What edges lead into, in causal order: heads or their ports, MLPs, the logits."""
        found: list[Node] = []
        for node in self.nodes:
            split = node.kind is Kind.HEAD and self.edge_level is Level.EDGE_QKV
            found += [replace(node, port=port) for port in PORTS] if split else [node]
        return (*found, LOGITS)

    @cached_property
    def offsets(self) -> Int[Tensor, " receiver_and_end"]:
        """Where the edges into each receiver begin; its senders are the first so many."""
        # Senders in causal order: those that precede a receiver are a prefix, the longer the later the receiver.
        counts, known = [], 0
        for dst in self.receivers:
            while known < len(self.senders) and precedes(self.senders[known], dst, self.parallel):
                known += 1
            fewer = known
            while fewer and not precedes(self.senders[fewer - 1], dst, self.parallel):
                fewer -= 1
            counts.append(fewer)
        return torch.tensor([0, *counts], device="cpu").cumsum(0)

    @cached_property
    def dst(self) -> Int[Tensor, " edge"]:
        """Of each edge the receiver, as its place in ``receivers``."""
        return torch.repeat_interleave(torch.arange(len(self.receivers), dtype=torch.int32, device="cpu"), self.offsets.diff())

    @cached_property
    def src(self) -> Int[Tensor, " edge"]:
        """Of each edge the sender, as its place in ``senders``."""
        return (torch.arange(len(self), device="cpu") - self.offsets[self.dst.long()]).to(torch.int32)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge as an object, in order. For universes of moderate size."""
        return tuple(Edge(self.senders[src], self.receivers[dst]) for src, dst in zip(self.src.tolist(), self.dst.tolist(), strict=True))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def unit(self, place: int) -> Edge:
        return Edge(self.senders[int(self.src[place])], self.receivers[int(self.dst[place])])

    def index(self, unit: Unit | str) -> int:
        edge = Edge.parse(unit) if isinstance(unit, str) else unit
        if not isinstance(edge, Edge):
            raise CircuitError(f"{str(edge)!r} is a node, and this universe has edges. Expected two nodes with '->' between them.")
        for end, choices, where in ((edge.src, self._sender_at, "senders"), (edge.dst, self._receiver_at, "receivers")):
            if end not in choices:
                raise CircuitError(
                    f"Edge {str(edge)!r} cannot be in this circuit: {end} is not among its {where}, which are {_listed(choices)}."
                )
        src, dst = self._sender_at[edge.src], self._receiver_at[edge.dst]
        place = int(self.offsets[dst]) + src
        if place < int(self.offsets[dst + 1]):
            return place
        raise CircuitError(f"Edge {str(edge)!r} runs against the causal order: {edge.dst} is computed before {edge.src}, or beside it. "
                           "Expected the sender first: turn it round, or leave it out.")  # fmt: skip

    def as_edges(self) -> EdgeUniverse:
        return self

    def digest(self) -> str:
        return hashlib.sha256(repr((self.edge_level.value, self.parallel, tuple(map(str, self.nodes)))).encode()).hexdigest()

    def members(self, mask: Bool[Tensor, " edge"]) -> tuple[Edge, ...]:
        kept = mask.nonzero().flatten()
        ends = zip(self.src[kept].tolist(), self.dst[kept].tolist(), strict=True)
        return tuple(Edge(self.senders[src], self.receivers[dst]) for src, dst in ends)

    def live(self, mask: Bool[Tensor, " edge"]) -> tuple[tuple[Node, ...], tuple[Edge, ...]]:
        """The nodes from which kept edges lead to the logits, and the kept edges into these nodes and the logits."""
        reached, kept = self.live_mask(mask)
        return tuple(self.nodes[place] for place in reached.nonzero().flatten().tolist()), self.members(kept)

    def live_mask(self, mask: Bool[Tensor, " edge"]) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
        """The same as masks over ``nodes`` and over the edges: for universes of any size."""
        reached = torch.zeros(len(self.senders), dtype=torch.bool, device="cpu")
        kept = torch.zeros_like(mask)
        bounds = self.offsets.tolist()
        for place in range(len(self.receivers) - 1, -1, -1):  # receivers in causal order, so one sweep back finds every path
            dst = self.receivers[place]
            if dst == LOGITS or reached[self._sender_at[dst.component_of_port]]:
                into = mask[bounds[place] : bounds[place + 1]]
                kept[bounds[place] : bounds[place + 1]] = into
                reached[: len(into)] |= into
        return reached[1:], kept

    @cached_property
    def _sender_at(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.senders)}

    @cached_property
    def _receiver_at(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.receivers)}


def _listed(choices: Iterable[Node]) -> str:
    names = list(map(str, choices))
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
