"""The fast path for edges: many of them a pass, from states of the circuit that are computed once.

Exact: it gives the numbers of the naive path in ``reference_edges.py``, which tests compare it with. Up to its receiver an edge takes no
forward pass of its own: what the receiver then reads is a sum of states that are held, and, where MLPs recompute, of what these make of it.
From the receiver on, edges x prompts are the rows of one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_graph import INPUT, LOGITS, PORTS
from circuitkit.core.graph import Edge, Kind, Node
from circuitkit.core.shapes import Values
from circuitkit.engine.circuit_layers import CircuitLayers, States
from circuitkit.engine.edges import EdgeEngine
from circuitkit.engine.memory import free_bytes, is_out_of_memory
from circuitkit.engine.packed import PackedEngine
from circuitkit.engine.reference_edges import ReferenceEdges
from circuitkit.models.hooked import Heads, Resid

Shift = Float[Tensor, "prompt pos d_model"]
"""By how much the residual stream that someone reads differs from that of the clean run, float32."""
ByMask = dict[Node, Float[Tensor, "mask prompt pos d_model"]]
Held = tuple[States, States]
"""States of the circuit on clean and on corrupt prompts."""


Pair = tuple[Node, Node]
"""Sender and receiver."""


@dataclass
class _Patching:
    """Single edges on some prompts, on the way through the layers.

    Attributes:
        rows: The prompts.
        clean: The circuit's states on them.
        shifts: For each sender so far, what its change does to the residual stream here.
        values: Where to put the values, a row an edge of the graph.
    """

    rows: slice
    clean: States
    shifts: dict[Node, Shift]
    values: Float[Tensor, "edge prompt"]


class PackedEdges(EdgeEngine):
    """Scores many edges a pass. Final.

    Args:
        engine: A packed engine for nodes; its row budget bounds the passes here too.
        circuit: The node circuit.
        options: As for every edge engine.
    """

    def __init__(self, engine: PackedEngine, circuit: Circuit, **options: Any) -> None:
        super().__init__(engine, circuit, **options)
        self._packed = engine
        self._circuit = circuit
        self.layers = CircuitLayers(engine.model, self.mask, engine.replacements(self.mask), skip=engine.skips)
        self._held: dict[tuple[int, int], Held] = {}

    @property
    def batch(self) -> int:
        return self._packed.batch

    @cached_property
    def oracle(self) -> EdgeEngine:
        nodes = self._packed.oracle
        return ReferenceEdges(nodes, self._circuit, level=self.graph.level, mlps=self.mlps)

    def alone(self, edges: Sequence[Edge]) -> Float[Tensor, "edge prompt"]:
        places = [self.graph.index(edge) for edge in edges]
        values = torch.empty(len(self.graph), len(self.engine.prompts))
        self._in_slices(lambda rows: self._alone(set(edges), rows, values))
        return values[places]

    def score(self, masks: Bool[Tensor, "mask edge"]) -> Values:
        masks = self.checked(masks)
        starts = torch.tensor([self._first_layer(mask) for mask in masks])
        values = torch.empty(len(masks), len(self.engine.prompts))
        whole = starts > self.engine.model.n_layers
        if whole.any():  # with every edge the circuit is the node circuit
            values[whole] = self.engine.score(self.mask[None])
        groups = [(int(start), (starts == start).nonzero().flatten()) for start in starts[~whole].unique().tolist()]

        def fill(rows: slice) -> None:
            for start, chosen in groups:
                for part in chosen.split(self._copies(rows)):
                    values[part, rows] = self._measured(self._pruned(start, masks[part], rows), rows)

        if groups:
            self._in_slices(fill)
        return values

    # --- Single edges -----------------------------------------------------------------------------------------------------------------

    def _alone(self, edges: set[Edge], rows: slice, values: Tensor) -> None:
        """Fills the values of single edges for some prompts, layer by layer, carrying for each sender what its change does."""
        clean, corrupt = self._states(rows)
        at = _Patching(rows, clean, {INPUT: corrupt.resid[0].float() - clean.resid[0].float()}, values)
        into: dict[Node, list[Node]] = defaultdict(list)
        for edge in sorted(edges, key=self.graph.index):
            into[edge.dst].append(edge.src)
        n_layers = self.engine.model.n_layers
        deepest = max((n_layers - 1 if dst == LOGITS else dst.layer for dst in into), default=-1)
        for layer in range(deepest + 1):
            receivers = [dst for dst in into if dst.kind is Kind.HEAD and dst.layer == layer]
            self._fill([(src, dst) for dst in receivers for src in into[dst]], at, partial(self._into_heads, layer, at))
            heads = {node: self._head_shift(node, clean, corrupt) for node in self._senders(layer, Kind.HEAD)}
            before, after = ({}, heads) if self.graph.parallel else (heads, {})
            at.shifts |= before
            self._through_mlp(layer, set(into.get(Node.of_mlp(layer), ())), at)
            at.shifts |= after | {node: _difference(corrupt.mlp, clean.mlp, layer) for node in self._senders(layer, Kind.MLP)}
        self._fill([(src, LOGITS) for src in into.get(LOGITS, ())], at, partial(self._into_logits, at))

    def _into_heads(self, layer: int, at: _Patching, pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into heads of a layer patched, a pair of sender and receiver after the other."""
        base, resid = at.clean.projections[layer], at.clean.resid[layer]
        assert base is not None
        n_pairs = len(pairs)
        changed = {src: self.engine.model.queries_keys_values(layer, _added(resid, at.shifts[src])) for src, _ in pairs}
        given = [_repeated(part, n_pairs).unflatten(0, (n_pairs, -1)) for part in base]
        for place, (src, dst) in enumerate(pairs):
            for port in PORTS if dst.port is None else (dst.port,):
                which, head = PORTS.index(port), self._slice(dst, port)
                given[which][place, ..., head, :] = changed[src][which][..., head, :]
        queries, keys, values = (part.flatten(0, 1) for part in given)
        z = self.layers.attend(layer, (queries, keys, values)).unflatten(0, (n_pairs, -1))
        # Heads that share keys and values with the receiver, and those that are replaced, stay as they were.
        patched = _repeated(at.clean.z[layer], n_pairs).unflatten(0, (n_pairs, -1))
        for place, (_, dst) in enumerate(pairs):
            patched[place, ..., dst.head, :] = z[place, ..., dst.head, :]
        return self._logits(_repeated(resid, n_pairs), at.rows, layer, patched.flatten(0, 1))

    def _through_mlp(self, layer: int, patched: set[Node], at: _Patching) -> None:
        """Edges into the MLP of a layer; and what it makes of each sender's change is carried on, if MLPs recompute."""
        mid, out = at.clean.mid[layer], at.clean.mlp[layer].float()
        recompute = self.mlps == "recompute" and (self.layers.mlps[layer] or not self.layers.skip)
        for senders in _chunks([src for src in at.shifts if recompute or src in patched], self._copies(at.rows)):
            new = self.layers.mlp(layer, torch.cat([_added(mid, at.shifts[src]) for src in senders]), at.rows).float()
            response = {src: each - out for src, each in zip(senders, new.unflatten(0, (len(senders), -1)), strict=True)}
            pairs = [(src, Node.of_mlp(layer)) for src in senders if src in patched]
            self._fill(pairs, at, partial(self._behind_mlp, layer, at, response))
            if recompute:
                at.shifts |= {src: at.shifts[src] + response[src] for src in senders}

    def _behind_mlp(self, layer: int, at: _Patching, response: dict[Node, Shift], pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into the MLP of a layer patched."""
        after = at.clean.resid[layer + 1] if layer + 1 < len(at.clean.resid) else at.clean.final
        assert after is not None
        return self._logits(torch.cat([_added(after, response[src]) for src, _ in pairs]), at.rows, layer + 1)

    def _into_logits(self, at: _Patching, pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into the logits patched."""
        assert at.clean.final is not None
        last = at.clean.final[:, -1:]
        return self._logits(torch.cat([_added(last, at.shifts[src][:, -1:]) for src, _ in pairs]), at.rows, self.engine.model.n_layers)

    def _fill(self, pairs: Sequence[Pair], at: _Patching, logits: Callable[[Sequence[Pair]], Tensor]) -> None:
        """Computes pairs of sender and receiver, as many as fit at a time, and keeps their values."""
        for part in _chunks(pairs, self._copies(at.rows)):
            places = [self.graph.index(Edge(src, dst)) for src, dst in part]
            at.values[places, at.rows] = self._measured(logits(part), at.rows)

    # --- Masks ------------------------------------------------------------------------------------------------------------------------

    def _pruned(self, start: int, masks: Bool[Tensor, "mask edge"], rows: slice) -> Float[Tensor, "row d_vocab"]:
        """Logits of masks none of which removes an edge into a layer before ``start``."""
        clean, corrupt = self._states(rows)
        model, n_masks = self.engine.model, len(masks)
        removed = _Removed(self.graph.edges, masks)
        shifts: ByMask = {INPUT: (corrupt.resid[0].float() - clean.resid[0].float())[None]}
        for node in removed.senders:
            if node.layer < start and node != INPUT:
                of_head, layer = node.kind is Kind.HEAD, node.layer
                shifts[node] = (self._head_shift(node, clean, corrupt) if of_head else _difference(corrupt.mlp, clean.mlp, layer))[None]
        assert clean.final is not None
        resid = _repeated(clean.resid[start] if start < model.n_layers else clean.final, n_masks)
        for layer in range(start, model.n_layers):
            z = self._pruned_heads(layer, resid, removed, shifts, rows)
            senders = [node for node in removed.senders if node.layer == layer]
            heads = {node: self._moved(node, z, corrupt.z[layer], n_masks) for node in senders if node.kind is Kind.HEAD}
            before, after = ({}, heads) if self.graph.parallel else (heads, {})
            shifts |= before
            mid, attention = self.layers.mid(layer, resid, z)
            mlp = self.layers.mlp(layer, removed.applied(mid, Node.of_mlp(layer), shifts), rows)
            for node in senders:
                if node.kind is Kind.MLP:
                    after[node] = (_repeated(corrupt.mlp[layer], n_masks).float() - mlp.float()).unflatten(0, (n_masks, -1))
            shifts |= after
            resid = self.layers.summed(resid, attention, mlp)
        return self._logits(removed.applied(resid, LOGITS, shifts)[:, -1:], rows, model.n_layers)

    def _moved(self, node: Node, z: Heads, corrupt: Heads, n_masks: int) -> Float[Tensor, "mask prompt pos d_model"]:
        """By how much what a head adds differs between the corrupt run and this one."""
        assert node.head is not None
        apart = _repeated(corrupt[..., node.head, :], n_masks) - z[..., node.head, :]
        return self.layers.share(node.layer, node.head, apart).unflatten(0, (n_masks, -1))

    def _pruned_heads(self, layer: int, resid: Resid, removed: _Removed, shifts: ByMask, rows: slice) -> Heads:
        """What the heads of a layer give when each port reads a stream of its own."""
        projections = self.layers.projections(layer, resid)
        if projections is None:
            return self.layers.z(layer, None, rows, len(resid))
        group = self.engine.model.n_heads // self.engine.model.n_kv_heads
        queries = projections[0].clone()
        keys, values = (part.repeat_interleave(group, 2) for part in projections[1:])
        touched = False
        for node in self._senders(layer, Kind.HEAD):
            for port, target in zip(PORTS, (queries, keys, values), strict=True):
                dst = replace(node, port=port) if removed.names_ports else node
                if removed.any(dst):
                    read = self.engine.model.queries_keys_values(layer, removed.applied(resid, dst, shifts))
                    target[..., node.head, :] = read[PORTS.index(port)][..., self._slice(node, port), :]
                    touched = touched or port != "q"
        if group == 1 or not touched:
            z = self.layers.attend(layer, (queries, keys[:, :, ::group], values[:, :, ::group]))
        else:  # heads that share keys and values may now each have their own: one attention for each place in the groups
            parts = [self.layers.attend(layer, (queries, keys[:, :, at::group], values[:, :, at::group])) for at in range(group)]
            z = torch.stack([parts[head % group][:, :, head] for head in range(self.engine.model.n_heads)], 2)
        return self.layers.replaced(layer, z, rows)

    def _first_layer(self, mask: Bool[Tensor, "edge"]) -> int:
        """The first layer into which an edge is removed: the number of layers if only into the logits, one more if none is."""
        receivers = {edge.dst for edge, kept in zip(self.graph.edges, mask.tolist(), strict=True) if not kept}
        n_layers = self.engine.model.n_layers
        return min((n_layers if dst == LOGITS else dst.layer for dst in receivers), default=n_layers + 1)

    # --- Shared -----------------------------------------------------------------------------------------------------------------------

    def _states(self, rows: slice) -> Held:
        """The circuit's states on some prompts, clean and corrupt; kept for all of them if they fit the memory."""
        key = rows.start, rows.stop
        if key not in self._held:
            prompts = self.engine.prompts
            held = self.layers.states(prompts.clean[rows], rows), self.layers.states(prompts.corrupt[rows], rows)
            self._packed.work.add(2 * (rows.stop - rows.start), self.engine.model.n_layers, prompts.n_pos, corrupt=False)
            size = sum(_bytes(states) for states in held)
            if size * len(prompts) > 0.3 * free_bytes(self.engine.model.device) * (rows.stop - rows.start):
                self._held.clear()
            self._held[key] = held
        return self._held[key]

    def _head_shift(self, node: Node, clean: States, corrupt: States) -> Shift:
        assert node.head is not None
        apart = corrupt.z[node.layer][..., node.head, :] - clean.z[node.layer][..., node.head, :]
        return self.layers.share(node.layer, node.head, apart)

    def _slice(self, node: Node, port: str) -> int:
        """Which slice of queries, keys or values a head reads."""
        assert node.head is not None
        return node.head if port == "q" else node.head * self.engine.model.n_kv_heads // self.engine.model.n_heads

    def _senders(self, layer: int, kind: Kind) -> list[Node]:
        return [node for node in self.graph.nodes if node.layer == layer and node.kind is kind]

    def _logits(self, resid: Resid, rows: slice, layer: int, z: Heads | None = None) -> Float[Tensor, "row d_vocab"]:
        n_layers = self.engine.model.n_layers
        if layer < n_layers:
            self._packed.work.add(len(resid), n_layers - layer, resid.shape[1], corrupt=False)
        return self.layers.logits(layer, resid, rows, z)

    def _measured(self, logits: Float[Tensor, "row d_vocab"], rows: slice) -> Values:
        return self.engine.measure(logits.unflatten(0, (-1, rows.stop - rows.start)), rows)

    def _copies(self, rows: slice) -> int:
        return max(1, self._packed.budget.rows // (rows.stop - rows.start))

    def _in_slices(self, fill: Callable[[slice], None]) -> None:
        """Calls for one slice of the prompts after the other; with smaller ones if memory runs out."""
        waiting = list(self._slices(slice(0, len(self.engine.prompts))))
        while waiting:
            rows = waiting.pop(0)
            try:
                fill(rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._packed.budget.halve(error)
                self._held.clear()
                waiting = [piece for other in (rows, *waiting) for piece in self._slices(other)]

    def _slices(self, within: slice) -> Iterator[slice]:
        step = self._packed.budget.rows
        for first in range(within.start, within.stop, step):
            yield slice(first, min(first + step, within.stop))


class _Removed:
    """Which edges some masks remove, receiver by receiver. Final."""

    def __init__(self, edges: Sequence[Edge], masks: Bool[Tensor, "mask edge"]) -> None:
        self.names_ports = any(edge.dst.port for edge in edges)
        self._n_masks = len(masks)
        self._into: dict[Node, dict[Node, Tensor]] = defaultdict(dict)
        for place in (~masks).any(0).nonzero().flatten().tolist():
            self._into[edges[place].dst][edges[place].src] = ~masks[:, place]
        self.senders = {src for into in self._into.values() for src in into}

    def any(self, dst: Node) -> bool:
        """Whether an edge into this receiver is removed."""
        return dst in self._into

    def applied(self, resid: Resid, dst: Node, shifts: ByMask) -> Resid:
        """What a receiver reads, of what its neighbours read."""
        if dst not in self._into:
            return resid
        changed = resid.float().unflatten(0, (self._n_masks, -1))
        for src, removed in self._into[dst].items():
            changed = changed + removed.float().view(-1, 1, 1, 1).to(resid.device) * shifts[src].to(resid.device)
        return changed.flatten(0, 1).to(resid.dtype)


def _difference(corrupt: list[Resid], clean: list[Resid], layer: int) -> Shift:
    return corrupt[layer].float() - clean[layer].float()


def _added(resid: Resid, shift: Shift) -> Resid:
    return (resid.float() + shift.to(resid.device)).to(resid.dtype)


def _repeated(value: Tensor, copies: int) -> Tensor:
    return value.repeat(copies, *[1] * (value.ndim - 1))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _bytes(states: States) -> int:
    parts = [*states.resid, *states.z, *states.mid, *states.mlp, *(part for each in states.projections if each for part in each)]
    return sum(part.nbytes for part in parts)
