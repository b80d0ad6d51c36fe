"""What a search returns: a Circuit (a set of nodes, perhaps with edges) or Scores (a number per node), with where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.errors import CircuitError
from circuitkit.core.node import INPUT, LOGITS, PORTS, Edge, Kind, Level, Node, Unit, precedes
from circuitkit.core.sealed import Savable, reading, seal, size, unseal
from circuitkit.core.universe import NodeUniverse, Universe, stage_of

# What can be a member, by level.
_COMPONENTS = frozenset((Kind.HEAD, Kind.ATTENTION, Kind.MLP))  # an attention beside heads is a mixer, which has none
_UNITS = _COMPONENTS | {Kind.NEURON, Kind.FEATURE, Kind.ERROR}
_KINDS = {
    Level.NODE: _COMPONENTS,
    Level.ATTENTION: frozenset((Kind.ATTENTION, Kind.MLP)),
    Level.NEURON: frozenset((Kind.NEURON,)),
    Level.FEATURE: frozenset((Kind.FEATURE, Kind.ERROR)),
    Level.MIXED: _UNITS,
    Level.EDGE: _COMPONENTS,
    Level.EDGE_QKV: _COMPONENTS,
}


@dataclass(frozen=True)
class Circuit(Savable):
    """A subset of a model's components, immutable. ``&``, ``|`` and ``-`` are the set operations.

    Attributes:
        nodes: The members, in causal order.
        n_layers: Number of layers of the model.
        n_heads: Number of query heads per layer.
        model: Name of the model, for people; ``provenance`` has its fingerprint.
        score: Performance in %, of the untouched model; None where it was not measured.
        level: How fine its members are: ``node`` for heads and MLPs, ``attention``, ``neuron``, ``feature`` or ``mixed`` for other units,
            ``edge`` or ``edge_qkv`` for edges.
        provenance: Settings, seed, versions, model revision and hashes of the run that found it.
        edges: The direct paths that are kept between the members, the input and the logits; none for a circuit of nodes alone.
        within: For a circuit of edges the components between which they were searched, the members among them; everything else was
            replaced throughout. Empty for a circuit of nodes alone.
        parallel: For a circuit of edges, whether the MLP of a layer reads what the attention of that layer reads, so that no edge runs
            between them in this model.
    """

    nodes: tuple[Node, ...]
    n_layers: int
    n_heads: int
    model: str = ""
    score: float | None = None
    level: Level = Level.NODE
    provenance: Mapping[str, Any] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    within: tuple[Node, ...] = ()
    parallel: bool = False

    def __post_init__(self) -> None:
        for node in self.nodes:
            head = node.head if node.head is not None else -1
            if node.kind not in _UNITS or not (0 <= node.layer < self.n_layers and head < self.n_heads):
                raise CircuitError(
                    f"Node {str(node)!r} cannot be in a circuit of a model with {self.n_layers} layers and {self.n_heads} heads a layer. "
                    "Take a head, MLP or other unit of that model; layers and heads count from 0."
                )
            if node.kind not in _KINDS[self.level]:
                kinds = " and ".join(sorted(f"{kind}s" for kind in _KINDS[self.level]))
                raise CircuitError(
                    f"Node {str(node)!r} cannot be in a circuit of level {self.level}, whose members are {kinds}. Make it with "
                    "Circuit.of(universe, mask), or with the level of its members."
                )
        members = set(self.nodes)
        object.__setattr__(self, "nodes", tuple(sorted(members, key=_causal)))
        for edge in self.edges:
            ends = {edge.src, edge.dst.component_of_port} - {INPUT, LOGITS}
            split = self.level is Level.EDGE_QKV and edge.dst.kind is Kind.HEAD
            fits = self.level.of_edges and split == (edge.dst.port is not None)
            if not fits or not ends <= members or not precedes(edge.src, edge.dst):
                raise CircuitError(
                    f"Edge {str(edge)!r} cannot be in this circuit: an edge needs level edge, or edge_qkv with <q>, <k> or <v> behind a "
                    f"head that it leads into, here {self.level}; both ends among the members; and a sender computed before the receiver."
                )
        object.__setattr__(self, "edges", tuple(sorted(set(self.edges), key=_edge_order)))
        if self.level.of_edges:
            object.__setattr__(self, "within", tuple(sorted({*self.within, *members}, key=_causal)))

    @classmethod
    def of(cls, universe: NodeUniverse, mask: Bool[Tensor, " node"], **fields: Any) -> Circuit:
        """The circuit that a mask over a universe stands for."""
        return cls(universe.members(mask), universe.n_layers, universe.n_heads, **{"level": universe.level, **fields})

    @property
    def names(self) -> tuple[str, ...]:
        """The members by name."""
        return tuple(str(node) for node in self.nodes)

    @property
    def heads(self) -> tuple[Node, ...]:
        """The members that are attention heads."""
        return tuple(node for node in self.nodes if node.kind is Kind.HEAD)

    @property
    def mlps(self) -> tuple[Node, ...]:
        """The members that are MLPs."""
        return tuple(node for node in self.nodes if node.kind is Kind.MLP)

    @property
    def summary(self) -> str:
        """How many members there are of each kind, in words."""
        counts = Counter(node.kind for node in self.nodes)
        names = {Kind.HEAD: "heads", Kind.MLP: "MLPs", Kind.ERROR: "error terms"}
        always = {Kind.HEAD, Kind.MLP} if self.level is Level.NODE or self.level.of_edges else set()
        told = [kind for kind in Kind if counts[kind] or kind in always]
        return ", ".join(f"{counts[kind]} {names.get(kind, f'{kind}s')}" for kind in told) or "no members"

    @property
    def members(self) -> tuple[Unit, ...]:
        """What a mask has entries for: the edges of a circuit of edges, else the nodes."""
        return self.edges if self.level.of_edges else self.nodes

    @property
    def member_names(self) -> list[str]:
        """The members by name, for files."""
        return [str(member) for member in self.members]

    @property
    def frame(self) -> Circuit:
        """The circuit of nodes in which this one's edges lie; of a circuit of nodes itself, without its score."""
        whole = replace(self, nodes=self.within) if self.level.of_edges else self
        return whole.nodes_only() if self.level.of_edges else replace(self, score=None)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: Node | str) -> bool:
        return (Node.parse(node) if isinstance(node, str) else node) in self.nodes

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, set(self.nodes) & set(other.nodes), set(self.edges) & set(other.edges))

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, set(self.nodes) | set(other.nodes), set(self.edges) | set(other.edges))

    def __sub__(self, other: Circuit) -> Circuit:
        """The members and edges that the other has not; of the edges those that still have both ends."""
        nodes = set(self.nodes) - set(other.nodes)
        ends = nodes | {INPUT, LOGITS}
        edges = {edge for edge in set(self.edges) - set(other.edges) if {edge.src, edge.dst.component_of_port} <= ends}
        return self._combined(other, nodes, edges)

    def jaccard(self, other: Circuit) -> float:
        """Members of both over members of either, nodes or edges as the circuits are of; 1.0 for two empty circuits."""
        union = len((self | other).members)
        return len((self & other).members) / union if union else 1.0

    def check_level(self, other: Circuit) -> None:
        """Refuses a circuit of another level.

        Raises:
            CircuitError: Its units are of another kind.
        """
        if other.level is not self.level:
            raise CircuitError(
                f"A circuit of level {self.level} and one of level {other.level} cannot be combined. Compare circuits of one level, such "
                "as the nodes of both (Circuit.nodes_only())."
            )

    def mask(self, universe: Universe) -> Bool[Tensor, " unit"]:
        """The mask over a universe that keeps just the members.

        Raises:
            CircuitError: The circuit belongs to a model of another shape, or its members are no units of this universe.
        """
        if not isinstance(universe, NodeUniverse):
            if universe.level is not self.level:
                raise CircuitError(
                    f"This is a circuit of level {self.level}, and the masks here are over edges of level {universe.level}. Take a circuit "
                    "of that level."
                )
            return universe.mask(self.edges)
        self.check_fits(universe.n_layers, universe.n_heads)
        if self.level.of_edges:
            raise CircuitError(
                f"This is a circuit of edges (level {self.level}), and a circuit of nodes was expected. Take the file of the node "
                "circuit that it was made from, or its nodes alone with Circuit.nodes_only()."
            )
        if not universe.spans:
            return universe.mask(self.nodes)
        return universe.mask(node.at(span) for node in self.nodes for span in universe.spans if node.span in (None, span))

    def nodes_only(self) -> Circuit:
        """The circuit of the same nodes, with every edge between them; its score was not measured."""
        level = Level.NODE if self.level.of_edges else self.level
        return replace(self, score=None, level=level, edges=(), within=(), parallel=False)

    def check_fits(self, n_layers: int, n_heads: int, model: str = "") -> None:
        """Refuses a circuit that was found in a model of another shape or name.

        Raises:
            CircuitError: It does not fit; the text says how.
        """
        if (self.n_layers, self.n_heads) != (n_layers, n_heads):
            raise CircuitError(
                f"This circuit was found in {self.model or 'a model'} with {self.n_layers} layers x {self.n_heads} "
                "heads, but the model here "
                f"has {n_layers} x {n_heads}. Load the model that it was found in, or find a circuit in this one."
            )
        if model and self.model and model != self.model:
            raise CircuitError(
                f"This circuit was found in the model {self.model!r}, not in {model!r}. Load that model, or find a circuit in this one."
            )

    def to_json(self) -> str:
        """The circuit as the text of a file."""
        body = {
            "model": self.model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "level": self.level.value,
            "score": self.score,
            "nodes": list(self.names),
            **(self._edges_to_json() if self.level.of_edges else {}),
            "provenance": dict(self.provenance),
        }
        return seal(body)

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Circuit:
        """The circuit that the text of a file stands for.

        Args:
            text: What ``to_json`` returned.
            where: What to call it in an error.

        Raises:
            CircuitError: Not a circuit, another format version, or damaged.
        """
        body = unseal(text, where)
        with reading(where, "circuit") as entry:
            nodes = tuple(Node.parse(name) for name in entry(body, "nodes", list))
            edges = tuple(Edge.parse(name) for name in entry({"edges": [], **body}, "edges", list))
            provenance = entry(body, "provenance", dict)
            dropped = provenance.get("dropped_nodes", ()) if edges else ()  # files of earlier versions say no more
            within = tuple(Node.parse(name) for name in entry({"within": list(dropped), **body}, "within", list))
            score = None if body["score"] is None else float(entry(body, "score", int, float))
            shape = size(body, "n_layers"), size(body, "n_heads")
            parallel = entry({"parallel": False, **body}, "parallel", bool)
            return cls(nodes, *shape, entry(body, "model", str), score, Level(body["level"]), provenance, edges, within, parallel)

    def _edges_to_json(self) -> dict[str, Any]:
        edges: dict[str, Any] = {"edges": [str(edge) for edge in self.edges], "within": [str(node) for node in self.within]}
        return edges | ({"parallel": True} if self.parallel else {})

    def _combined(self, other: Circuit, nodes: Iterable[Node], edges: Iterable[Edge]) -> Circuit:
        other.check_fits(self.n_layers, self.n_heads, self.model)
        self.check_level(other)
        shape, within = (self.n_layers, self.n_heads), (*self.within, *other.within)
        return Circuit(tuple(nodes), *shape, self.model, None, self.level, {}, tuple(edges), within, self.parallel or other.parallel)


@dataclass(frozen=True)
class Scores(Savable):
    """A number for each node, such as the performance left when it alone is removed.

    Attributes:
        values: Node name to number, in causal order.
        unit: Of the numbers.
        n_layers: Number of layers of the model.
        n_heads: Number of query heads per layer.
        model: Name of the model.
        provenance: Settings of the run.
    """

    values: Mapping[str, float]
    unit: str
    n_layers: int
    n_heads: int
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def top(self, n: int, *, lowest: bool = True) -> list[tuple[str, float]]:
        """The n nodes with the lowest (or highest) numbers."""
        return sorted(self.values.items(), key=lambda item: item[1] if lowest else -item[1])[:n]

    def to_json(self) -> str:
        """The scores as the text of a file."""
        body = {
            "model": self.model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "unit": self.unit,
            "values": dict(self.values),
            "provenance": dict(self.provenance),
        }
        return seal(body)

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Scores:
        """The scores that the text of a file stands for.

        Args:
            text: What ``to_json`` returned.
            where: What to call it in an error.

        Raises:
            CircuitError: No scores, another format version, or damaged.
        """
        body = unseal(text, where)
        with reading(where, "scores") as entry:
            values = entry(body, "values", dict)
            values = {name: float(entry(values, name, int, float)) for name in values}  # nodes, or draws of random circuits
            shape = size(body, "n_layers"), size(body, "n_heads")
            return cls(values, entry(body, "unit", str), *shape, entry(body, "model", str), entry(body, "provenance", dict))


def _edge_order(edge: Edge) -> tuple[Any, ...]:
    last = edge.dst.kind is Kind.LOGITS
    port = PORTS.index(edge.dst.port) if edge.dst.port else -1
    return (last, *_causal(edge.dst), port, *_causal(edge.src))


def _causal(node: Node) -> tuple[int, int, int, str]:
    slot = node.head if node.kind is Kind.HEAD else node.index
    stage = -1 if node.kind in (Kind.INPUT, Kind.LOGITS) else stage_of(node)
    return (node.layer, stage, slot if slot is not None else -1, node.span or "")
