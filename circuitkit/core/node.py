"""Units by name: Node (a slice of what flows at a site of the model) and Edge (a direct path between two nodes).

Names are those that MIB and EAP-IG files use: ``a7.h11`` is head 11 of layer 7, ``m9`` the MLP of layer 9,
``a7.h11<q>`` the query input of that head, ``a4.h4->a7.h11<v>`` an edge. In the same spirit ``a7`` is a whole attention, ``m9.n512``
neuron 512 of the MLP of layer 9, ``r8.f1034`` feature 1034 of a dictionary on the residual stream behind layer 8 (``a8.f3``, ``m8.f3``
of one on what its attention or MLP adds) and ``r8.e`` what that dictionary leaves unexplained. A unit that covers only some
positions carries them behind an at sign: ``a7.h11@last``, ``m9@S4``, ``a0.h1@3``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from circuitkit.core.errors import CircuitError

_NODE = re.compile(
    r"^(?:(?P<end>input|logits)"
    r"|a(?P<layer>\d+)\.h(?P<head>\d+)(?:<(?P<port>[qkv])>)?"
    r"|m(?P<of_neuron>\d+)\.n(?P<neuron>\d+)"
    r"|(?P<place>[amr])(?P<of_feature>\d+)\.(?:f(?P<feature>\d+)|(?P<error>e))"
    r"|a(?P<attention>\d+)|m(?P<mlp>\d+))(?:@(?P<span>[\w-]+))?\Z"
)


class Level(str, Enum):
    """How fine the units of a circuit are."""

    NODE = "node"
    ATTENTION = "attention"
    NEURON = "neuron"
    FEATURE = "feature"
    MIXED = "mixed"
    EDGE = "edge"
    EDGE_QKV = "edge_qkv"

    @property
    def of_edges(self) -> bool:
        """Whether the units are edges; else they are nodes of some kind."""
        return self in (Level.EDGE, Level.EDGE_QKV)

    def __str__(self) -> str:
        return self.value


class Site(str, Enum):
    """A place in the model where a tensor can be read and replaced."""

    EMBED = "embed"
    Q = "q"
    K = "k"
    V = "v"
    PATTERN = "pattern"
    Z = "z"
    ATTN_OUT = "attn_out"
    MLP_ACT = "mlp_act"
    MLP_OUT = "mlp_out"
    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    LOGITS = "logits"

    def __str__(self) -> str:
        return self.value


class Kind(str, Enum):
    """What a unit is."""

    INPUT = "input"
    HEAD = "head"
    ATTENTION = "attention"
    MLP = "mlp"
    NEURON = "neuron"
    FEATURE = "feature"
    ERROR = "error"
    LOGITS = "logits"
    EDGE = "edge"

    def __str__(self) -> str:
        return self.value


FEATURE_SITES = {"a": Site.ATTN_OUT, "m": Site.MLP_OUT, "r": Site.RESID_POST}
"""Where a dictionary can lie, by the letter that names its features. ``attn_out`` and ``mlp_out`` mean for it what is added to the residual
stream: behind a norm that may lie there."""
_LETTERS = {site: letter for letter, site in FEATURE_SITES.items()}
_SITES = {Kind.INPUT: Site.EMBED, Kind.HEAD: Site.Z, Kind.ATTENTION: Site.Z, Kind.MLP: Site.MLP_OUT, Kind.NEURON: Site.MLP_ACT,
          Kind.LOGITS: Site.LOGITS}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A slice of what flows at one site of the model: a component, one input port of a head, a neuron, a feature; at all or some positions.

    Attributes:
        kind: What it is.
        layer: Zero-based layer; -1 for the input, and past the last layer for the logits.
        head: Zero-based head, for heads only.
        port: ``q``, ``k`` or ``v`` when the node stands for one input of a head.
        span: Label or index of the positions covered; None for all positions.
        index: Which neuron or feature, from 0; None for all at once, as patchers are told of them.
        on: The site of the dictionary, for features and error terms.
    """

    kind: Kind
    layer: int = -1
    head: int | None = None
    port: str | None = None
    span: str | None = None
    index: int | None = None
    on: Site | None = None

    @classmethod
    def parse(cls, name: str) -> Node:
        """Reads a name such as ``a7.h11``, ``m9``, ``a7.h11<q>``, ``m9.n512``, ``r8.f1034`` or ``m9@last``.

        Raises:
            CircuitError: The text is no node name.
        """
        match = _NODE.match(name)
        if match is None:
            raise CircuitError(
                f"{name!r} is not a node name. Expected a head such as 'a7.h11', an MLP such as 'm9', 'input' or "
                "'logits', a whole attention such as 'a7', a neuron such as 'm9.n512', a feature such as 'r8.f1034' or an error term such "
                "as 'r8.e', with '<q>', '<k>' or '<v>' behind a head and '@' with a position or a label at the end."
            )
        span = match["span"]
        if match["end"]:
            return cls(Kind(match["end"]), span=span)
        if match["mlp"] is not None:
            return cls(Kind.MLP, int(match["mlp"]), span=span)
        if match["attention"] is not None:
            return cls(Kind.ATTENTION, int(match["attention"]), span=span)
        if match["neuron"] is not None:
            return cls(Kind.NEURON, int(match["of_neuron"]), span=span, index=int(match["neuron"]))
        if match["place"] is not None:
            kind, index = (Kind.ERROR, None) if match["error"] else (Kind.FEATURE, int(match["feature"]))
            return cls(kind, int(match["of_feature"]), span=span, index=index, on=FEATURE_SITES[match["place"]])
        return cls(Kind.HEAD, int(match["layer"]), int(match["head"]), match["port"], span)

    @classmethod
    def of_head(cls, layer: int, head: int) -> Node:
        """The node of one attention head."""
        return cls(Kind.HEAD, layer, head)

    @classmethod
    def of_mlp(cls, layer: int) -> Node:
        """The node of one MLP."""
        return cls(Kind.MLP, layer)

    @classmethod
    def of_attention(cls, layer: int) -> Node:
        """The node of all heads of a layer together."""
        return cls(Kind.ATTENTION, layer)

    @classmethod
    def of_neuron(cls, layer: int, neuron: int) -> Node:
        """The node of one neuron: what the MLP's output projection reads, one coordinate of it."""
        return cls(Kind.NEURON, layer, index=neuron)

    @classmethod
    def of_feature(cls, layer: int, feature: int | None, on: Site = Site.RESID_POST) -> Node:
        """The node of one feature of a dictionary, or for None of what the dictionary leaves unexplained."""
        return cls(Kind.ERROR if feature is None else Kind.FEATURE, layer, index=feature, on=on)

    @property
    def site(self) -> Site:
        """Where it is read and replaced; for a port what the head reads there."""
        if self.port is not None:
            return Site(self.port)
        return self.on if self.on is not None else _SITES[self.kind]

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
        return self._name + port + span

    @property
    def _name(self) -> str:
        match self.kind:
            case Kind.HEAD:
                return f"a{self.layer}.h{self.head}"
            case Kind.ATTENTION:
                return f"a{self.layer}"
            case Kind.MLP:
                return f"m{self.layer}"
            case Kind.NEURON:
                return f"m{self.layer}.n{'*' if self.index is None else self.index}"
            case Kind.FEATURE | Kind.ERROR:
                assert self.on is not None
                which = "e" if self.kind is Kind.ERROR else f"f{'*' if self.index is None else self.index}"
                return f"{_LETTERS[self.on]}{self.layer}.{which}"
        return str(self.kind.value)


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

    @property
    def kind(self) -> Kind:
        """That it is an edge."""
        return Kind.EDGE

    def __str__(self) -> str:
        return f"{self.src}->{self.dst}"


Unit = Node | Edge
"""What a mask has one entry for."""


INPUT = Node(Kind.INPUT)
"""The embedding: where every path begins."""
LOGITS = Node(Kind.LOGITS)
"""What the unembedding reads: where every path ends."""
PORTS = ("q", "k", "v")
"""What a head reads: its queries, keys and values."""


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
    same_layer = src.kind in (Kind.HEAD, Kind.ATTENTION) and dst.kind is Kind.MLP and not parallel
    return src.layer < dst.layer or (same_layer and src.layer == dst.layer)
