"""Pruned edge graphs run whole, as many masks per pass as fit: every reader of the residual stream is given one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.node import INPUT, LOGITS, PORTS, Kind, Level, Node
from circuitkit.engine.edges.held import EdgePasses, part_of, repeated
from circuitkit.engine.edges.layers import CircuitLayers
from circuitkit.engine.edges.sent import Sources
from circuitkit.models.blocks import Part
from circuitkit.models.hooked import Heads, Resid

ByMask = Float[Tensor, "#mask prompt pos d_model"]
"""Of each mask, or the same of all."""


class PrunedEdges:
    """Runs a circuit with some of its edges removed. Final.

    Args:
        passes: Runs the circuit.
    """

    def __init__(self, passes: EdgePasses) -> None:
        self._passes = passes
        n_layers = passes.model.n_layers
        self._layers = torch.tensor([n_layers if dst == LOGITS else dst.layer for dst in passes.universe.receivers], device="cpu")

    def first_layers(self, masks: Bool[Tensor, "mask edge"]) -> Int[Tensor, " mask"]:
        """For each mask the first layer into which an edge is removed.

        The number of layers if only edges into the logits are, one more if none is.
        """
        first = masks.view(torch.uint8).argmin(-1)  # the first of the smallest: edges are in the order of their receivers
        layers = self._layers[self._passes.universe.dst[first].long()]
        return torch.where(masks.all(-1), self._passes.model.n_layers + 1, layers)

    def logits(self, start: int, masks: Bool[Tensor, "mask edge"], rows: slice) -> Float[Tensor, "row *step d_vocab"]:
        """Logits of masks none of which removes an edge into a layer before ``start``."""
        clean, sources = self._passes.states(rows)
        model, n_masks = self._passes.model, len(masks)
        removed = _Removed(self._passes.universe, masks, self._passes.layers)
        removed.give({INPUT: self._passes.shift(INPUT, clean, sources)[None]}, lambda: clean.resid[0][None])
        for layer in range(start):
            self._send(removed, layer, Kind.HEAD, clean.z[layer], sources, 1)
            self._send(removed, layer, Kind.MLP, clean.mlp[layer], sources, 1)
        assert clean.final is not None
        resid = repeated(clean.resid[start] if start < model.n_layers else clean.final, n_masks)
        for layer in range(start, model.n_layers):
            z = self._heads(layer, resid, removed, rows)
            self._send(removed, layer, Kind.HEAD, z, sources, n_masks)
            mid, attention = self._passes.layers.mid(layer, resid, z)
            mlp = self._passes.layers.mlp(layer, removed.applied(mid, Node.of_mlp(layer)), rows)
            self._send(removed, layer, Kind.MLP, mlp, sources, n_masks)
            resid = self._passes.layers.summed(resid, attention, self._passes.layers.added(layer, "mlp", mlp))
        return self._passes.logits(self._passes.scored(removed.applied(resid, LOGITS)), rows, model.n_layers)

    def _send(self, removed: _Removed, layer: int, kind: Kind, act: Heads | Resid, sources: Sources, n_masks: int) -> None:
        """Notes by how much what removed edges from heads or MLP of a layer carry differs from what these give."""
        passes = self._passes
        change: Callable[..., Tensor] = passes.head_change if kind is Kind.HEAD else passes.mlp_change
        senders = [node for node in removed.senders if node.layer == layer and node.kind is kind]
        changes = {node: change(node, act, sources).unflatten(0, (n_masks, -1)) for node in senders}
        removed.give(changes, lambda: passes.layers.given(layer, kind, act).unflatten(0, (n_masks, -1)))

    def _heads(self, layer: int, resid: Resid, removed: _Removed, rows: slice) -> Heads:
        """What the heads of a layer give when each port reads a stream of its own."""
        projections = self._passes.layers.projections(layer, resid)
        if projections is None:
            return self._passes.layers.z(layer, None, rows, len(resid))
        group = self._passes.model.n_heads // self._passes.model.n_kv_heads
        queries = projections[0].clone()
        keys, values = (part.repeat_interleave(group, 2) for part in projections[1:])
        touched = False
        for node in self._passes.senders(layer, Kind.HEAD):
            for port, target in zip(PORTS, (queries, keys, values), strict=True):
                dst = replace(node, port=port) if removed.names_ports else node
                if removed.any(dst):
                    read = self._passes.model.queries_keys_values(layer, removed.applied(resid, dst))
                    target[..., node.head, :] = read[PORTS.index(port)][..., self._passes.slice_of(node, port), :]
                    touched = touched or port != "q"
        if group == 1 or not touched:
            z = self._passes.layers.attend(layer, (queries, keys[:, :, ::group], values[:, :, ::group]), rows)
        else:  # heads that share keys and values may now each have their own: one attention for each place in the groups
            taken = ((queries, keys[:, :, at::group], values[:, :, at::group]) for at in range(group))
            parts = [self._passes.layers.attend(layer, each, rows) for each in taken]
            z = torch.stack([parts[head % group][:, :, head] for head in range(self._passes.model.n_heads)], 2)
        return self._passes.layers.replaced(layer, z, rows)


class _Removed:
    """Which edges some masks remove, receiver by receiver, and what that does to what receivers read. Final."""

    def __init__(self, universe: EdgeUniverse, masks: Bool[Tensor, "mask edge"], layers: CircuitLayers) -> None:
        self.names_ports = universe.level is Level.EDGE_QKV
        self._layers = layers
        self._n_masks = len(masks)
        places = (~masks).any(0).nonzero().flatten()
        senders = universe.src[places]
        receivers, counts = universe.dst[places].unique_consecutive(return_counts=True)  # edges are in the order of their receivers
        parts = zip(senders.split(counts.tolist()), (~masks[:, places]).split(counts.tolist(), 1), strict=True)
        self._into: dict[Node, tuple[list[Node], Bool[Tensor, "mask sender"]]] = {
            universe.receivers[dst]: ([universe.senders[src] for src in into.tolist()], removed)
            for dst, (into, removed) in zip(receivers.tolist(), parts, strict=True)
        }
        self.senders = [universe.senders[src] for src in senders.unique().tolist()]
        self._changes: dict[Node, ByMask] = {}
        self._outs: dict[tuple[int, Part], Callable[[], ByMask]] = {}

    def any(self, dst: Node) -> bool:
        """Whether an edge into this receiver is removed."""
        return dst in self._into

    def give(self, changes: Mapping[Node, ByMask], out: Callable[[], ByMask]) -> None:
        """Takes by how much what removed edges carry differs from what their senders give.

        Args:
            changes: For each sender of one attention, or for an MLP, or for the embedding.
            out: What that gives as a whole in this run. Not asked for, nor held, where it is added to the stream as it is.
        """
        self._changes |= changes
        known = cache(out)
        self._outs |= {key: known for key in map(self._norm_of, changes) if key is not None}

    def _norm_of(self, src: Node) -> tuple[int, Part] | None:
        """Behind which layer's attention or MLP the norm lies through which a sender adds to the stream; None for no norm."""
        return (src.layer, part_of(src)) if src != INPUT and self._layers.is_normed(src.layer, part_of(src)) else None

    def applied(self, resid: Resid, dst: Node) -> Resid:
        """What a receiver reads, of what its neighbours read."""
        if dst not in self._into:
            return resid
        changed: Tensor = resid.float().unflatten(0, (self._n_masks, -1))
        together: dict[tuple[int, Part], Tensor] = {}  # heads whose outputs a norm behind the attention takes as a sum
        senders, removed = self._into[dst]
        for place, src in enumerate(senders):
            change = removed[:, place].float().view(-1, 1, 1, 1).to(resid.device) * self._changes[src].to(resid.device)
            norm = self._norm_of(src)
            if norm is None:
                changed = changed + change
            else:
                together[norm] = together[norm] + change if norm in together else change
        for (layer, part), change in together.items():
            changed = changed + self._layers.moved(layer, part, change, self._outs[layer, part]).to(resid.device)
        return changed.flatten(0, 1).to(resid.dtype)
