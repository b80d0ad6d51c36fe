"""What passes over edges share: states of the circuit that are held, slices of prompts that fit, and logits from a layer on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.node import INPUT, Kind, Node
from circuitkit.core.shapes import Values
from circuitkit.engine.edges.addends import NormedAddend, part_of
from circuitkit.engine.edges.layers import CircuitLayers, States
from circuitkit.engine.edges.sent import Sent, Sources, apart
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.packed.memory import free_room, within_memory
from circuitkit.models.hooked import Heads, Resid
from circuitkit.patchers.base import Patcher

Shift = Float[Tensor, "prompt pos d_model"]
"""By how much the residual stream that someone reads differs from that of the clean run, float32."""
Held = tuple[States, Sources]
"""The circuit's states on some prompts, and what the values of removed edges are made of."""


class EdgePasses:
    """Runs a circuit from held states. Final.

    Args:
        engine: For nodes; its row budget bounds the passes here too.
        universe: The edges.
        mask: The circuit.
        patcher: Of the edges.

    Attributes:
        model: The model.
        universe: The edges.
        layers: The circuit, layer by layer.
        sent: What removed edges carry.
    """

    def __init__(self, engine: PackedEngine, universe: EdgeUniverse, mask: Bool[Tensor, " node"], patcher: Patcher) -> None:
        self.model = engine.model
        self.universe = universe
        self.layers = CircuitLayers(engine.model, mask, engine.replacements(mask), engine.prompts, skip=engine.skips)
        self.sent = Sent(patcher, engine.prompts, self.layers)
        self._runs = 2 if patcher.needs.source == "run" else 1
        self._engine = engine
        self._held: dict[tuple[int, int], Held] = {}

    def states(self, rows: slice) -> Held:
        """The circuit's states on some prompts, and what removed edges carry there; kept for all of them if they fit the memory."""
        key = rows.start, rows.stop
        if key not in self._held:
            prompts = self._engine.prompts
            held = self.layers.states(prompts.clean[rows], rows), self.sent.sources(rows)
            self._engine.work.add(self._runs * (rows.stop - rows.start), self.model.n_layers, prompts.n_pos, corrupt=False)
            size = _bytes(held[0]) + sum(tensor.nbytes for tensor in held[1].tensors())
            if size * len(prompts) > 0.3 * free_room(self.model) * (rows.stop - rows.start):
                self._held.clear()
            self._held[key] = held
        return self._held[key]

    def shift(self, node: Node, clean: States, sources: Sources) -> Shift:
        """What the removal of a sender's edge does to the stream that its receiver reads, while all else is as in the clean run."""
        if node == INPUT:
            return apart(self.sent.value(node, clean.resid[0], sources), clean.resid[0])
        act = clean.mlp[node.layer] if node.kind is Kind.MLP else clean.z[node.layer]
        if self.layers.is_normed(node.layer, part_of(node.kind)):
            addend = self.addend(node.layer, [node], act, sources)
            return addend.shift({node: torch.ones(1, dtype=torch.bool)}, len(act))
        return self.change(node, act, sources)

    def change(self, node: Node, act: Heads | Resid, sources: Sources) -> Shift:
        """By how much what a removed edge carries differs from what its sender adds, where no norm lies behind.

        Args:
            node: A head or an MLP.
            act: The outputs of its layer's heads, or of its MLP, as they are now.
            sources: For these prompts.
        """
        if node.kind is Kind.MLP:
            return apart(self.sent.value(node, act, sources), act)
        assert node.head is not None
        own = act[..., node.head, :]
        return self.layers.share(node.layer, node.head, self.sent.value(node, own, sources).to(own.device) - own)

    def addend(self, layer: int, nodes: Sequence[Node], act: Heads | Resid, sources: Sources) -> NormedAddend:
        """What some heads of a layer, or its MLP, add through the norm behind them. Other arguments as for ``change``."""
        own = {node: act if node.kind is Kind.MLP else act[..., node.head, :] for node in nodes}
        values = {node: self.sent.value(node, each, sources) for node, each in own.items()}
        return NormedAddend(self.layers, layer, nodes[0].kind, act, values)

    def slice_of(self, node: Node, port: str) -> int:
        """Which slice of queries, keys or values a head reads."""
        assert node.head is not None
        return node.head if port == "q" else node.head * self.model.n_kv_heads // self.model.n_heads

    def senders(self, layer: int, kind: Kind) -> list[Node]:
        return [node for node in self.universe.nodes if node.layer == layer and node.kind is kind]

    def logits(self, resid: Resid, rows: slice, layer: int, z: Heads | None = None) -> Float[Tensor, "row *step d_vocab"]:
        n_layers = self.model.n_layers
        if layer < n_layers:
            self._engine.work.add(len(resid), n_layers - layer, resid.shape[1], corrupt=False)
        return self.layers.logits(layer, resid, rows, z)

    def scored(self, resid: Resid) -> Float[Tensor, "row some d_model"]:
        """The positions that are scored, which are all that the logits there depend on behind the last layer."""
        return resid[:, -self._engine.prompts.n_kept :]

    def measured(self, logits: Float[Tensor, "row *step d_vocab"], rows: slice) -> Values:
        return self._engine.measure(logits.unflatten(0, (-1, rows.stop - rows.start)), rows)

    def copies(self, rows: slice) -> int:
        return max(1, self._engine.budget.rows // int(rows.stop - rows.start))

    def in_slices(self, fill: Callable[[slice], None]) -> None:
        """Calls for one slice of the prompts after the other; with smaller ones if memory runs out."""
        if self.sent.lacks_means:
            self._in_slices(self._add_means)
            self.sent.close()
        self._in_slices(fill)

    def _add_means(self, rows: slice) -> None:
        self.sent.add(rows)
        self._engine.work.add(rows.stop - rows.start, self.model.n_layers, self._engine.prompts.n_pos, corrupt=True)

    def _in_slices(self, fill: Callable[[slice], None]) -> None:
        budget = self._engine.budget

        def split(rows: slice) -> Iterator[slice]:
            self._held.clear()
            return budget.slices(rows)

        for _ in within_memory(budget.slices(slice(0, len(self._engine.prompts))), fill, budget, split):
            pass


def added(resid: Resid, shift: Shift) -> Resid:
    """A residual stream that was changed, in its own dtype."""
    return (resid.float() + shift.to(resid.device)).to(resid.dtype)


def repeated(value: Tensor, copies: int) -> Tensor:
    """Rows of some prompts, as often as there are copies."""
    return value.repeat(copies, *[1] * (value.ndim - 1))


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Parts of at most so many items."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _bytes(states: States) -> int:
    parts = [*states.resid, *states.z, *states.mid, *states.mlp, *(part for each in states.projections if each for part in each)]
    return sum(part.nbytes for part in parts)
