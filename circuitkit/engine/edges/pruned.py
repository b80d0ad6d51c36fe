"""Pruned edge graphs run whole, as many masks per pass as fit: every reader of the residual stream is given one of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.node import INPUT, LOGITS, PORTS, Kind, Level, Node
from circuitkit.engine.edges.addends import NormedAddend, part_of
from circuitkit.engine.edges.held import EdgePasses, repeated
from circuitkit.engine.edges.sent import Sources
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
        removed = _Removed(self._passes.universe, masks)
        removed.changes[INPUT] = self._passes.shift(INPUT, clean, sources)[None]
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
        senders = [node for node in removed.senders if node.layer == layer and node.kind is kind]
        if senders and passes.layers.is_normed(layer, part_of(kind)):
            removed.addends[layer, kind] = passes.addend(layer, senders, act, sources)
        else:
            removed.changes |= {node: passes.change(node, act, sources).unflatten(0, (n_masks, -1)) for node in senders}

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
    """Which edges some masks remove, receiver by receiver, and what that does to what receivers read. Final.

    Attributes:
        senders: From whom some edge is removed.
        changes: By how much what removed edges carry differs from what their senders add to the stream in this run.
        addends: For senders with a norm behind them instead: what their attention or MLP adds as a whole.
    """

    def __init__(self, universe: EdgeUniverse, masks: Bool[Tensor, "mask edge"]) -> None:
        self.names_ports = universe.level is Level.EDGE_QKV
        self._n_masks = len(masks)
        places = (~masks).any(0).nonzero().flatten()
        senders = universe.src[places]
        receivers, counts = universe.dst[places].unique_consecutive(return_counts=True)  # edges are in the order of their receivers
        parts = zip(senders.split(counts.tolist()), (~masks[:, places]).split(counts.tolist(), 1), strict=True)
        self._into: dict[Node, dict[Node, Tensor]] = {
            universe.receivers[dst]: {universe.senders[src]: one for src, one in zip(into.tolist(), removed.unbind(1), strict=True)}
            for dst, (into, removed) in zip(receivers.tolist(), parts, strict=True)
        }
        self.senders = [universe.senders[src] for src in senders.unique().tolist()]
        self.changes: dict[Node, ByMask] = {}
        self.addends: dict[tuple[int, Kind], NormedAddend] = {}

    def any(self, dst: Node) -> bool:
        """Whether an edge into this receiver is removed."""
        return dst in self._into

    def applied(self, resid: Resid, dst: Node) -> Resid:
        """What a receiver reads, of what its neighbours read."""
        if dst not in self._into:
            return resid
        changed: Tensor = resid.float().unflatten(0, (self._n_masks, -1))
        together: dict[tuple[int, Kind], dict[Node, Tensor]] = defaultdict(dict)
        for src, removed in self._into[dst].items():
            if src in self.changes:
                changed = changed + removed.float().view(-1, 1, 1, 1).to(resid.device) * self.changes[src].to(resid.device)
            else:
                together[src.layer, src.kind][src] = removed
        for group, removed_there in together.items():
            shift = self.addends[group].shift(removed_there, changed.shape[1]).to(resid.device)
            changed = changed + shift.unflatten(0, (self._n_masks, -1))
        return changed.flatten(0, 1).to(resid.dtype)
