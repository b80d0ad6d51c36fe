"""Universe: the units that a mask is over, in causal order, held as arrays and not as objects.

A mask is a boolean vector over a universe (a soft mask one of floats): True = in the circuit = left as the clean run computes it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import CircuitError
from circuitkit.core.node import FEATURE_SITES, Kind, Level, Node, Site, Unit

if TYPE_CHECKING:
    from circuitkit.core.edge_universe import EdgeUniverse


class Universe(ABC):
    """An ordered set of units. Makes masks, and says which units a mask keeps; nobody else counts units.

    ``of_nodes``, ``of_attentions``, ``of_neurons``, ``of_features`` and ``of_edges`` make one; ``|`` joins two of nodes, and ``at`` gives
    one of nodes at positions.
    """

    @property
    @abstractmethod
    def level(self) -> Level:
        """How fine the units are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def unit(self, place: int) -> Unit:
        """The unit at a place of a mask."""

    @abstractmethod
    def index(self, unit: Unit | str) -> int:
        """The place of a unit in a mask.

        Raises:
            CircuitError: The unit is not in this universe; the text says what is.
        """

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the units and their order."""

    def __iter__(self) -> Iterator[Unit]:
        return (self.unit(place) for place in range(len(self)))

    def as_nodes(self) -> NodeUniverse:
        """Itself, if the units are nodes.

        Raises:
            CircuitError: They are edges.
        """
        raise CircuitError(f"Expected masks over nodes, and the units here are edges (level {self.level}). Take an engine over nodes.")

    def as_edges(self) -> EdgeUniverse:
        """Itself, if the units are edges.

        Raises:
            CircuitError: They are nodes.
        """
        raise CircuitError(
            f"Expected masks over edges, and the units here are nodes (level {self.level}). Take the engine that `engine.edges(circuit)` "
            "gives, or `method.over(engine)`, as the Runner does."
        )

    def full(self) -> Bool[Tensor, " unit"]:
        """The mask that keeps everything."""
        return torch.ones(len(self), dtype=torch.bool, device="cpu")

    def empty(self) -> Bool[Tensor, " unit"]:
        """The mask that removes everything."""
        return torch.zeros(len(self), dtype=torch.bool, device="cpu")

    def places(self, units: Iterable[Unit | str]) -> Int[Tensor, " some"]:
        """The places of some units in a mask.

        Raises:
            CircuitError: One is not in this universe.
        """
        return torch.tensor([self.index(unit) for unit in units], dtype=torch.long, device="cpu")

    def mask(self, units: Iterable[Unit | str]) -> Bool[Tensor, " unit"]:
        """The mask that keeps just these units."""
        mask = self.empty()
        mask[self.places(units)] = True
        return mask

    def without(self, mask: Bool[Tensor, " unit"], units: Iterable[Unit | str]) -> Bool[Tensor, " unit"]:
        """The same mask with these units removed."""
        mask = mask.clone()
        mask[self.places(units)] = False
        return mask

    def members(self, mask: Bool[Tensor, " unit"]) -> tuple[Unit, ...]:
        """The units that a mask keeps, in causal order."""
        return tuple(self.unit(place) for place in mask.nonzero().flatten().tolist())

    @staticmethod
    def of_nodes(
        n_layers: int,
        n_heads: int,
        spans: Sequence[str | int] = (),
        *,
        mixers: Collection[int] = (),
        without_attention: Collection[int] = (),
        without_mlp: Collection[int] = (),
    ) -> NodeUniverse:
        """Every head and MLP of a model: heads of a layer, then its MLP.

        Args:
            n_layers: Number of layers.
            n_heads: Number of query heads per layer that has attention heads.
            spans: Position labels if units are (component, position) pairs; none for whole components.
            mixers: Layers that mix positions without attention heads (state space, convolution): one unit, named as a whole attention.
            without_attention: Layers that have neither heads nor a mixer.
            without_mlp: Layers that have no MLP.
        """

        def layers(skipped: Collection[int]) -> Int[Tensor, " layer"]:
            return torch.tensor([layer for layer in range(n_layers) if layer not in skipped], dtype=torch.long, device="cpu")

        with_heads, with_mlp = layers({*mixers, *without_attention}), layers(without_mlp)
        mixing = torch.tensor(sorted(mixers), dtype=torch.long, device="cpu")
        heads = _columns(_HEAD, with_heads.repeat_interleave(n_heads), torch.arange(n_heads, device="cpu").repeat(len(with_heads)))
        others = [_columns(stage, at, torch.zeros_like(at)) for stage, at in ((_ATTENTION, mixing), (_MLP, with_mlp))]
        return NodeUniverse(n_layers, n_heads, torch.cat([heads, *others], 1)).at(spans)

    @staticmethod
    def of_attentions(
        n_layers: int, n_heads: int, attentions: Iterable[int] | None = None, mlps: Iterable[int] | None = None
    ) -> NodeUniverse:
        """Every whole attention (all heads of a layer as one unit) and every MLP: of these layers, of all for None."""
        columns = []
        for stage, layers in ((_ATTENTION, attentions), (_MLP, mlps)):
            at = torch.tensor(list(range(n_layers) if layers is None else layers), dtype=torch.long, device="cpu")
            columns.append(_columns(stage, at, torch.zeros_like(at)))
        return NodeUniverse(n_layers, n_heads, torch.cat(columns, 1))

    @staticmethod
    def of_neurons(n_layers: int, n_heads: int, d_mlp: int, layers: Iterable[int] | None = None) -> NodeUniverse:
        """Every neuron of the MLPs of some layers, of all if they are None."""
        chosen = torch.tensor(list(range(n_layers) if layers is None else layers), dtype=torch.long, device="cpu")
        return NodeUniverse(
            n_layers, n_heads, _columns(_NEURON, chosen.repeat_interleave(d_mlp), torch.arange(d_mlp, device="cpu").repeat(len(chosen)))
        )

    @staticmethod
    def of_features(n_layers: int, n_heads: int, sizes: Mapping[tuple[Site, int], int], *, errors: bool = True) -> NodeUniverse:
        """The features of dictionaries, and for each dictionary its error term.

        Args:
            n_layers, n_heads: Of the model.
            sizes: For the site and the layer of each dictionary, how many features it has.
            errors: Whether the error terms are units too.
        """
        parts = []
        for (site, layer), size in sizes.items():
            stage = _FEATURES[site]
            parts.append(_columns(stage, torch.full((size,), layer, device="cpu"), torch.arange(size, device="cpu")))
            if errors:
                parts.append(_columns(stage + 1, torch.tensor([layer], device="cpu"), torch.tensor([0], device="cpu")))
        return NodeUniverse(n_layers, n_heads, torch.cat(parts, 1) if parts else torch.zeros(4, 0, dtype=torch.long, device="cpu"))

    @staticmethod
    def of_edges(n_layers: int, n_heads: int, level: Level = Level.EDGE_QKV, parallel: bool = False) -> EdgeUniverse:
        """Every direct path between the components of a whole model. Arguments as in ``EdgeUniverse``."""
        from circuitkit.core.edge_universe import EdgeUniverse  # stands on this one

        return EdgeUniverse(Universe.of_nodes(n_layers, n_heads).nodes, level, parallel)


# Units of a layer in the order in which they are computed. A feature's error term stands one behind its features.
_ATTENTION, _HEAD, _ATTN_FEATURE, _NEURON, _MLP, _MLP_FEATURE, _RESID_FEATURE = 0, 1, 2, 4, 5, 6, 8
_FEATURES = {Site.ATTN_OUT: _ATTN_FEATURE, Site.MLP_OUT: _MLP_FEATURE, Site.RESID_POST: _RESID_FEATURE}
_STAGES = {Kind.ATTENTION: _ATTENTION, Kind.HEAD: _HEAD, Kind.NEURON: _NEURON, Kind.MLP: _MLP}
_KINDS = {stage: kind for kind, stage in _STAGES.items()}
_LEVELS = {_HEAD: Level.NODE, _MLP: Level.NODE, _NEURON: Level.NEURON, _ATTENTION: Level.ATTENTION}
_STAGE, _LAYER, _SLOT, _SPAN = range(4)


def stage_of(node: Node) -> int:
    """Where in its layer a unit is computed, as a number that grows from the attention to the residual stream behind the layer."""
    if node.on is not None:
        return _FEATURES[node.on] + (node.kind is Kind.ERROR)
    return _STAGES[node.kind]


class NodeUniverse(Universe):
    """Slices of what flows at sites of a model: heads, MLPs, attentions, neurons, features; at all or at some positions. Final.

    Args:
        n_layers: Number of layers.
        n_heads: Number of query heads per layer.
        columns: Of each unit the stage in its layer, the layer, the slot (which head, neuron or feature) and the span; in any order.
        spans: Position labels when units are (component, position) pairs; empty for whole components.

    Attributes:
        n_layers, n_heads, spans: As given.
        kinds: The kinds that occur.
    """

    def __init__(self, n_layers: int, n_heads: int, columns: Int[Tensor, "4 unit"], spans: Sequence[str | int] = ()) -> None:
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.spans = tuple(str(span) for span in spans)
        self._base = int(columns[_SLOT].max()) + 1 if columns.shape[1] else 1
        keys = self._keys(columns)
        self._sorted, order = keys.sort()
        if len(keys) > 1 and (self._sorted[1:] == self._sorted[:-1]).any():
            raise CircuitError("A universe names each unit once, and here one comes twice. Join universes with `|`, which keeps each once.")
        self._columns = columns[:, order].to(torch.int32)

    def __len__(self) -> int:
        return self._columns.shape[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeUniverse) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        head = f"{self.n_layers} {self.n_heads} {self.spans}".encode()
        return hashlib.sha256(head + self._columns.contiguous().numpy().tobytes()).hexdigest()

    @property
    def level(self) -> Level:
        stages = set(self._columns[_STAGE].unique().tolist())
        found = {_LEVELS.get(stage, Level.FEATURE) for stage in stages}
        if found == {Level.NODE, Level.ATTENTION}:
            return Level.NODE if _HEAD in stages else Level.ATTENTION  # a mixer is a component beside heads
        return found.pop() if len(found) == 1 else Level.MIXED if found else Level.NODE

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """The kinds that occur."""
        return frozenset(_kind_of(stage)[0] for stage in self._columns[_STAGE].unique().tolist())

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every unit as an object, in causal order. For universes of moderate size."""
        return tuple(self.unit(place) for place in range(len(self)))

    def unit(self, place: int) -> Node:
        stage, layer, slot, span = self._columns[:, place].tolist()
        kind, site = _kind_of(stage)
        label = self.spans[span] if self.spans else None
        if kind is Kind.HEAD:
            return Node(kind, layer, slot, span=label)
        return Node(kind, layer, span=label, index=slot if kind in (Kind.NEURON, Kind.FEATURE) else None, on=site)

    def index(self, unit: Unit | str) -> int:
        node = Node.parse(unit) if isinstance(unit, str) and "->" not in unit else unit
        if isinstance(node, Node):
            place = self._place(node)
            if place is not None:
                return place
        what = "Node" if isinstance(node, Node) else "Edge"
        raise CircuitError(f"{what} {str(node)!r} is not in this universe: {_choices(self)}")

    def members(self, mask: Bool[Tensor, " unit"]) -> tuple[Node, ...]:
        return tuple(self.unit(place) for place in mask.nonzero().flatten().tolist())

    def at(self, spans: Sequence[str | int]) -> NodeUniverse:
        """The same units at each of these positions; itself for none."""
        if not len(spans):
            return self
        columns = self._columns.long().repeat_interleave(len(spans), 1)
        columns[_SPAN] = torch.arange(len(spans), device="cpu").repeat(len(self))
        return NodeUniverse(self.n_layers, self.n_heads, columns, spans)

    def as_nodes(self) -> NodeUniverse:
        return self

    def only(self, *kinds: Kind) -> NodeUniverse:
        """The units of these kinds."""
        places = [self.places_of(kind, site)[0] for kind in kinds for site in _sites_of(kind)]
        chosen = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *places])
        return NodeUniverse(self.n_layers, self.n_heads, self._columns[:, chosen].long(), self.spans)

    def __or__(self, other: NodeUniverse) -> NodeUniverse:
        """The units of both.

        Raises:
            CircuitError: They belong to models of different shape, or name different positions.
        """
        if (self.n_layers, self.n_heads, self.spans) != (other.n_layers, other.n_heads, other.spans):
            raise CircuitError(
                f"Universes of {self.n_layers} layers x {self.n_heads} heads at {self.spans or 'all positions'} and of {other.n_layers} x "
                f"{other.n_heads} at {other.spans or 'all positions'} cannot be joined. Make both for one model and the same positions."
            )
        columns = torch.cat([self._columns, other._columns], 1).long()
        return NodeUniverse(self.n_layers, self.n_heads, columns.unique(dim=1), self.spans)

    def places_of(self, kind: Kind, on: Site | None = None) -> tuple[Int[Tensor, " some"], Int[Tensor, "some 3"]]:
        """Where units of a kind stand in a mask, and of each its layer, its slot (which head, neuron or feature) and its span."""
        stage = _STAGES[kind] if kind in _STAGES else _FEATURES[on or Site.RESID_POST] + (kind is Kind.ERROR)
        places = (self._columns[_STAGE] == stage).nonzero().flatten()
        return places, self._columns[_LAYER:, places].long().T

    @cached_property
    def layers(self) -> Int[Tensor, " unit"]:
        """The layer of each unit."""
        return self._columns[_LAYER].long()

    def _keys(self, columns: Int[Tensor, "4 unit"]) -> Int[Tensor, " unit"]:
        stage, layer, slot, span = columns.long()
        keys: Tensor = ((layer * 16 + stage) * self._base + slot) * max(1, len(self.spans)) + span
        return keys

    def _place(self, node: Node) -> int | None:
        has_span = node.span is not None
        if node.port is not None or has_span != bool(self.spans) or (has_span and node.span not in self.spans) or not len(self):
            return None
        if node.kind not in _STAGES and node.on is None:
            return None
        slot = node.head if node.kind is Kind.HEAD else node.index
        slot = 0 if slot is None else slot
        if slot >= self._base:
            return None
        span = self.spans.index(node.span) if node.span is not None else 0
        key = self._keys(torch.tensor([[stage_of(node)], [node.layer], [slot], [span]], device="cpu"))
        place = int(torch.searchsorted(self._sorted, key))
        return place if place < len(self) and self._sorted[place] == key else None


def _choices(universe: NodeUniverse) -> str:
    """Which units a universe has, in words."""
    shape = f"it has layers 0-{universe.n_layers - 1}"
    if Kind.HEAD in universe.kinds:
        shape += f" and heads 0-{universe.n_heads - 1}"
    for kind in (Kind.NEURON, Kind.FEATURE):
        if kind in universe.kinds:
            shape += f" and {kind}s such as {next(unit for unit in map(universe.unit, range(len(universe))) if unit.kind is kind)}"
    others = ", ".join(sorted(kind.value for kind in universe.kinds - {Kind.HEAD, Kind.MLP}))
    shape += f" (units: {others})" if others else ""
    return shape + (f", at positions {', '.join(universe.spans)}." if universe.spans else ", whole components only.")


def _columns(stage: int, layers: Int[Tensor, " unit"], slots: Int[Tensor, " unit"]) -> Int[Tensor, "4 unit"]:
    return torch.stack([torch.full_like(layers, stage), layers, slots, torch.zeros_like(layers)])


def _sites_of(kind: Kind) -> tuple[Site | None, ...]:
    return tuple(_FEATURES) if kind in (Kind.FEATURE, Kind.ERROR) else (None,) if kind in _STAGES else ()


def _kind_of(stage: int) -> tuple[Kind, Site | None]:
    if stage in _KINDS:
        return _KINDS[stage], None
    for site, first in _FEATURES.items():
        if stage == first:
            return Kind.FEATURE, site
        if stage == first + 1:
            return Kind.ERROR, site
    raise AssertionError(stage)


assert set(_FEATURES) == set(FEATURE_SITES.values())
