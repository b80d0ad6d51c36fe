"""Single edges patched, as many a pass as fit: layer by layer, carrying for each sender what its change does to the residual stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.node import INPUT, LOGITS, PORTS, Edge, Kind, Node
from circuitkit.engine.base import WHOLE, Share
from circuitkit.engine.edges.base import Mlps
from circuitkit.engine.edges.held import EdgePasses, Shift, added, chunks, repeated
from circuitkit.engine.edges.layers import States

Pair = tuple[Node, Node]
"""Sender and receiver."""


@dataclass
class _Patching:
    """Single edges on some prompts, on the way through the layers.

    Attributes:
        rows: The prompts.
        clean: The circuit's states on them.
        shifts: For each sender so far, what its change does to the residual stream here.
        values: Where to put the values, a row per edge of the universe.
        share: Which of the passes to make.
        passes: How many there were so far, those of other processes among them.
    """

    rows: slice
    clean: States
    shifts: dict[Node, Shift]
    values: Float[Tensor, "edge prompt"]
    share: Share = WHOLE
    passes: int = 0


class SingleEdges:
    """Patches edges one at a time. Final.

    Args:
        passes: Runs the circuit.
        mlps: What MLPs between sender and receiver do.
    """

    def __init__(self, passes: EdgePasses, mlps: Mlps) -> None:
        self._passes = passes
        self._mlps = mlps

    def fill(self, edges: set[Edge], rows: slice, values: Tensor, share: Share = WHOLE) -> None:
        """Fills the values of single edges for some prompts, layer by layer, carrying for each sender what its change does."""
        clean, sources = self._passes.states(rows)
        at = _Patching(rows, clean, {INPUT: self._passes.shift(INPUT, clean, sources)}, values, share)
        into: dict[Node, list[Node]] = defaultdict(list)
        for edge in sorted(edges, key=self._passes.universe.index):
            into[edge.dst].append(edge.src)
        n_layers = self._passes.model.n_layers
        deepest = max((n_layers - 1 if dst == LOGITS else dst.layer for dst in into), default=-1)
        for layer in range(deepest + 1):
            receivers = [dst for dst in into if dst.kind is Kind.HEAD and dst.layer == layer]
            self._fill([(src, dst) for dst in receivers for src in into[dst]], at, partial(self._into_heads, layer, at))
            heads = {node: self._passes.shift(node, clean, sources) for node in self._passes.senders(layer, Kind.HEAD)}
            before, after = ({}, heads) if self._passes.universe.parallel else (heads, {})
            at.shifts |= before
            self._through_mlp(layer, set(into.get(Node.of_mlp(layer), ())), at)
            at.shifts |= after | {node: self._passes.shift(node, clean, sources) for node in self._passes.senders(layer, Kind.MLP)}
        self._fill([(src, LOGITS) for src in into.get(LOGITS, ())], at, partial(self._into_logits, at))

    def _into_heads(self, layer: int, at: _Patching, pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into heads of a layer patched, a pair of sender and receiver after the other."""
        base, resid = at.clean.projections[layer], at.clean.resid[layer]
        assert base is not None
        n_pairs = len(pairs)
        changed = {src: self._passes.model.queries_keys_values(layer, added(resid, at.shifts[src])) for src, _ in pairs}
        given = [repeated(part, n_pairs).unflatten(0, (n_pairs, -1)) for part in base]
        for place, (src, dst) in enumerate(pairs):
            for port in PORTS if dst.port is None else (dst.port,):
                which, head = PORTS.index(port), self._passes.slice_of(dst, port)
                given[which][place, ..., head, :] = changed[src][which][..., head, :]
        queries, keys, values = (part.flatten(0, 1) for part in given)
        z = self._passes.layers.attend(layer, (queries, keys, values), at.rows).unflatten(0, (n_pairs, -1))
        # Heads that share keys and values with the receiver, and those that are replaced, stay as they were.
        patched = repeated(at.clean.z[layer], n_pairs).unflatten(0, (n_pairs, -1))
        for place, (_, dst) in enumerate(pairs):
            patched[place, ..., dst.head, :] = z[place, ..., dst.head, :]
        return self._passes.logits(repeated(resid, n_pairs), at.rows, layer, patched.flatten(0, 1))

    def _through_mlp(self, layer: int, patched: set[Node], at: _Patching) -> None:
        """Edges into the MLP of a layer; and what it makes of each sender's change is carried on, if MLPs recompute."""
        mid, out = at.clean.mid[layer], self._passes.layers.added(layer, "mlp", at.clean.mlp[layer]).float()
        recompute = self._mlps == "recompute" and (self._passes.layers.mlps[layer] or not self._passes.layers.skip)
        for senders in chunks([src for src in at.shifts if recompute or src in patched], self._passes.copies(at.rows)):
            given = self._passes.layers.mlp(layer, torch.cat([added(mid, at.shifts[src]) for src in senders]), at.rows)
            new = self._passes.layers.added(layer, "mlp", given).float()
            response = {src: each - out for src, each in zip(senders, new.unflatten(0, (len(senders), -1)), strict=True)}
            pairs = [(src, Node.of_mlp(layer)) for src in senders if src in patched]
            self._fill(pairs, at, partial(self._behind_mlp, layer, at, response))
            if recompute:
                at.shifts |= {src: at.shifts[src] + response[src] for src in senders}

    def _behind_mlp(self, layer: int, at: _Patching, response: dict[Node, Shift], pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into the MLP of a layer patched."""
        after = at.clean.resid[layer + 1] if layer + 1 < len(at.clean.resid) else at.clean.final
        assert after is not None
        return self._passes.logits(torch.cat([added(after, response[src]) for src, _ in pairs]), at.rows, layer + 1)

    def _into_logits(self, at: _Patching, pairs: Sequence[Pair]) -> Tensor:
        """Logits with edges into the logits patched."""
        assert at.clean.final is not None
        final = self._passes.scored(at.clean.final)
        read = torch.cat([added(final, self._passes.scored(at.shifts[src])) for src, _ in pairs])
        return self._passes.logits(read, at.rows, self._passes.model.n_layers)

    def _fill(self, pairs: Sequence[Pair], at: _Patching, logits: Callable[[Sequence[Pair]], Tensor]) -> None:
        """Computes pairs of sender and receiver, as many as fit at a time, and keeps their values."""
        for part in chunks(pairs, self._passes.copies(at.rows)):
            at.passes += 1
            if at.share.takes(at.passes):
                places = [self._passes.universe.index(Edge(src, dst)) for src, dst in part]
                at.values[places, at.rows] = self._passes.measured(logits(part), at.rows)
