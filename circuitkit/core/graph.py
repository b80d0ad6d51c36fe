"""The components of a transformer as named units: Node, Edge and the Graph that orders them.

Names are those that MIB and EAP-IG files use: ``a7.h11`` is head 11 of layer 7, ``m9`` the MLP of layer 9,
``a7.h11<q>`` the query input of that head, ``a4.h4->a7.h11<v>`` an edge. A unit that covers only some
positions carries them behind an at sign: ``a7.h11@last``, ``m9@S4``, ``a0.h1@3``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.errors import CircuitError

_NODE = re.compile(
    r"^(?:(?P<end>input|logits)|a(?P<layer>\d+)\.h(?P<head>\d+)(?:<(?P<port>[qkv])>)?|m(?P<mlp>\d+))(?:@(?P<span>[\w-]+))?\Z"
)


class Level(str, Enum):
    """How fine the units of a circuit are."""

    NODE = "node"
    EDGE = "edge"
    EDGE_QKV = "edge_qkv"

    def __str__(self) -> str:
        return self.value


class Kind(str, Enum):
    """What a node is."""

    INPUT = "input"
    HEAD = "head"
    MLP = "mlp"
    LOGITS = "logits"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Node:
    """One component of the model, or one input port of a head, or a component at some positions.

    Attributes:
        kind: What it is.
        layer: Zero-based layer; -1 for the input, and past the last layer for the logits.
        head: Zero-based head, for heads only.
        port: ``q``, ``k`` or ``v`` when the node stands for one input of a head.
        span: Label or index of the positions covered; None for all positions.
    """

    kind: Kind
    layer: int = -1
    head: int | None = None
    port: str | None = None
    span: str | None = None

    @classmethod
    def parse(cls, name: str) -> Node:
        """Reads a name such as ``a7.h11``, ``m9``, ``a7.h11<q>`` or ``m9@last``.

        Raises:
            CircuitError: The text is no node name.
        """
        match = _NODE.match(name)
        if match is None:
            raise CircuitError(
                f"{name!r} is not a node name. Expected a head such as 'a7.h11', an MLP such as 'm9', 'input' or "
                "'logits', with '<q>', '<k>' or '<v>' behind a head and '@' with a position or a label at the end."
            )
        span = match["span"]
        if match["end"]:
            return cls(Kind(match["end"]), span=span)
        if match["mlp"] is not None:
            return cls(Kind.MLP, int(match["mlp"]), span=span)
        return cls(Kind.HEAD, int(match["layer"]), int(match["head"]), match["port"], span)

    @classmethod
    def of_head(cls, layer: int, head: int) -> Node:
        """The node of one attention head."""
        return cls(Kind.HEAD, layer, head)

    @classmethod
    def of_mlp(cls, layer: int) -> Node:
        """The node of one MLP."""
        return cls(Kind.MLP, layer)

    def at(self, span: str | int) -> Node:
        """The same component at one position or labelled span."""
        return replace(self, span=str(span))

    @property
    def component(self) -> Node:
        """The same node at all positions."""
        return replace(self, span=None)

    @property
    def component_of_port(self) -> Node:
        """The head that an input port belongs to; any other node itself."""
        return replace(self, port=None)

    def __str__(self) -> str:
        port = f"<{self.port}>" if self.port else ""
        span = f"@{self.span}" if self.span is not None else ""
        name = {Kind.HEAD: f"a{self.layer}.h{self.head}", Kind.MLP: f"m{self.layer}"}.get(self.kind, self.kind.value)
        return name + port + span


@dataclass(frozen=True)
class Edge:
    """A direct path from the output of one node to an input of a later one."""

    src: Node
    dst: Node

    @classmethod
    def parse(cls, name: str) -> Edge:
        """Reads a name such as ``a4.h4->a7.h11<v>``.

        Raises:
            CircuitError: The text is no edge name.
        """
        src, arrow, dst = name.partition("->")
        if not arrow:
            raise CircuitError(f"{name!r} is not an edge name. Expected two node names with '->' between them.")
        return cls(Node.parse(src), Node.parse(dst))

    def __str__(self) -> str:
        return f"{self.src}->{self.dst}"


@dataclass(frozen=True)
class Graph:
    """All units of a model at one level, in causal order (heads of a layer, then its MLP).

    A mask over the graph is a boolean vector in this order: True = in the circuit = left as the clean run computes it.

    Attributes:
        n_layers: Number of layers.
        n_heads: Number of query heads a layer.
        spans: Position labels when units are (component, position) pairs; empty for whole components.
    """

    n_layers: int
    n_heads: int
    spans: tuple[str, ...] = ()

    @property
    def level(self) -> Level:
        """How fine the units are."""
        return Level.NODE

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every unit, in causal order."""
        whole = []
        for layer in range(self.n_layers):
            whole += [Node.of_head(layer, head) for head in range(self.n_heads)]
            whole.append(Node.of_mlp(layer))
        if not self.spans:
            return tuple(whole)
        return tuple(node.at(span) for node in whole for span in self.spans)

    @cached_property
    def _places(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.nodes)}

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def index(self, node: Node | str) -> int:
        """The place of a node in a mask.

        Raises:
            CircuitError: The node is not in this graph.
        """
        node = Node.parse(node) if isinstance(node, str) else node
        try:
            return self._places[node]
        except KeyError:
            raise CircuitError(
                f"Node {str(node)!r} is not in this model: it has layers 0-{self.n_layers - 1} and heads "
                f"0-{self.n_heads - 1}" + (f", at positions {', '.join(self.spans)}." if self.spans else ", whole components only.")
            ) from None

    def full(self) -> Bool[Tensor, "node"]:
        """The mask that keeps everything."""
        return torch.ones(len(self), dtype=torch.bool)

    def empty(self) -> Bool[Tensor, "node"]:
        """The mask that removes everything."""
        return torch.zeros(len(self), dtype=torch.bool)

    def mask(self, nodes: Iterable[Node | str]) -> Bool[Tensor, "node"]:
        """The mask that keeps just these nodes."""
        mask = self.empty()
        for node in nodes:
            mask[self.index(node)] = True
        return mask

    def without(self, mask: Bool[Tensor, "node"], nodes: Iterable[Node | str]) -> Bool[Tensor, "node"]:
        """The same mask with these nodes removed."""
        mask = mask.clone()
        for node in nodes:
            mask[self.index(node)] = False
        return mask

    def members(self, mask: Bool[Tensor, "node"]) -> tuple[Node, ...]:
        """The nodes that a mask keeps, in causal order."""
        return tuple(node for node, kept in zip(self.nodes, mask.tolist(), strict=True) if kept)

    def at(self, spans: Sequence[str | int]) -> Graph:
        """The same model with (component, position) pairs as units."""
        return Graph(self.n_layers, self.n_heads, tuple(str(span) for span in spans))
