"""Soft masks over edges: every receiver reads a residual stream of its own, in which its senders are partly replaced.

x of a receiver = residual stream + sum over senders of (1 - mask) x (value - what the sender computes); what is computed follows from such
streams upstream. Where a norm lies behind attention or MLP, the differences are added to what that norm reads instead, and it is computed
anew for each receiver. At the full mask all receivers read the same, the model runs as it is, and the gradients at their ports are held
against the senders' differences once they are all there (edge attribution patching, arXiv 2310.10348). At any other mask each receiver's
stream is made for few tokens at a time, and made anew on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.node import PORTS, Kind, Level, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.dense.base import DensePass, Score
from circuitkit.engine.dense.blend import accumulator, blend
from circuitkit.engine.dense.chunks import by_chunks, token_slices
from circuitkit.engine.dense.senders import Differences, HeadMatrices
from circuitkit.engine.dense.values import PatchedValues
from circuitkit.engine.edges.possible import check_gradients
from circuitkit.engine.featurizing import Place
from circuitkit.models import blocks, differentiable
from circuitkit.models.blocks import Part, norm_before, norm_behind, reader
from circuitkit.models.differentiable import Edit
from circuitkit.models.hooked import HookedModel
from circuitkit.models.norms import back_through
from circuitkit.patchers.base import Patcher


@dataclass(frozen=True)
class Reading:
    """Receivers that read the residual stream at the same point.

    Attributes:
        first: Place of their first edge in a mask.
        receivers: How many they are.
        senders: How many precede each of them.
        parts: As how many differences.
    """

    first: int
    receivers: int
    senders: int
    parts: int

    @property
    def edges(self) -> slice:
        """Their edges in a mask: receiver by receiver, for each its senders."""
        return slice(self.first, self.first + self.receivers * self.senders)


class DenseEdges(DensePass):
    """Soft masks over the edges between some nodes; all other nodes are replaced throughout. Final.

    Args:
        model, prompts, patcher: As for every engine.
        universe: The edges.
        outside: By what all other nodes are replaced.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, patcher: Patcher, universe: EdgeUniverse, outside: Patcher) -> None:
        check_gradients(model)
        self._model = model
        self._prompts = prompts
        layers = range(model.n_layers)
        members = set(universe.nodes)
        self._heads = [[node.head or 0 for node in universe.nodes if node.kind is Kind.HEAD and node.layer == layer] for layer in layers]
        self._mlps = [layer for layer in layers if any(node.kind is Kind.MLP and node.layer == layer for node in universe.nodes)]
        self._outside: list[Place] = [(Site.Z, layer) for layer in layers if len(self._heads[layer]) < model.n_heads]
        self._outside += [(Site.MLP_OUT, layer) for layer in layers if layer not in self._mlps]
        self._senders: list[Place] = [(Site.EMBED, 0)]
        for layer in layers:
            self._senders += [(Site.Z, layer)] * bool(self._heads[layer]) + [(Site.MLP_OUT, layer)] * (layer in self._mlps)
        self._norms = [None if site is Site.EMBED else norm_behind(model, layer, _PARTS[site]) for site, layer in self._senders]
        self._split = universe.level is Level.EDGE_QKV
        self._attentions = [layer for layer in layers if self._heads[layer]]
        self._readings = self._found(universe)
        self._n_edges = len(universe)
        self._matrices = HeadMatrices(model, self._heads)
        self._outside_values = PatchedValues(model, prompts, outside, self._outside)
        self._values = PatchedValues(model, prompts, patcher, self._senders, self._replaced)
        self.full_is_clean = len(members) == len(model.universe)

    def prepare(self, rows_a_pass: int) -> None:
        self._outside_values.collect(rows_a_pass)
        self._values.collect(rows_a_pass)

    # --- Any mask -------------------------------------------------------------------------------------------------------------------

    def logits(self, masks: Float[Tensor, "#row unit"], rows: slice) -> Float[Tensor, "row d_vocab"]:
        differences = Differences(self._matrices, self._norms)
        entered: dict[int, Tensor] = {}
        removed = 1 - masks

        def of(reading: Reading) -> Tensor:
            there: Tensor = removed[:, reading.edges].unflatten(1, (reading.receivers, reading.senders))
            return there

        def stream(reading: Reading, resid: Tensor, differences: Differences = differences) -> Tensor:
            """What a single receiver reads."""
            if not _any(of(reading)):
                return resid

            def make(removed: Tensor, resid: Tensor, *tensors: Tensor) -> Tensor:
                return differences.mixed(reading.parts, removed, resid, tensors)[0].to(resid.dtype)

            width = differences.width(reading.parts, 1, reading.senders)
            return by_chunks(make, of(reading), [resid, *differences.tensors(reading.parts)], resid.shape[-1:], width)

        def last_stream(resid: Tensor) -> Tensor:
            reading = self._readings["logits", 0]
            if not _any(of(reading)):
                return resid
            last = differences.map(lambda tensor: tensor[:, -1:])
            return torch.cat([resid[:, :-1], stream(reading, resid[:, -1:], last)], 1)

        def ports(layer: int) -> differentiable.PortEdit:
            made: dict[str, Tensor] = {}

            def edit(port: str, live: Tensor) -> Tensor:
                if not _any(of(self._readings["heads", layer])):
                    return live
                if port == "q":
                    made.update(self._read(layer, of(self._readings["heads", layer]), entered.pop(layer), differences))
                return self._with_members(layer, live, made.pop(port))

            return edit

        with ExitStack() as stack:
            stack.enter_context(self._running(rows, differences))
            entering = {(Site.RESID_PRE, at): partial(entered.setdefault, at) for at in self._attentions}
            stack.enter_context(differentiable.edited(self._model, entering))
            for layer in self._attentions:
                stack.enter_context(differentiable.ports(self._model, layer, ports(layer)))
            for layer in self._mlps:
                at_mlp = reader(self._model, layer, "mlp")
                stack.enter_context(differentiable.before(at_mlp, partial(stream, self._readings["mlp", layer])))
            stack.enter_context(differentiable.before(self._final_norm, last_stream))
            return differentiable.logits(self._model, self._prompts.clean[rows], **self._prompts.padding(rows))

    def _read(self, layer: int, removed: Tensor, resid: Tensor, differences: Differences) -> dict[str, Tensor]:
        """Queries, keys and values of the members of a layer, each made of a stream of its own."""
        reading = self._readings["heads", layer]
        n_heads = len(self._heads[layer])

        def make(removed: Tensor, resid: Tensor, *tensors: Tensor) -> Float[Tensor, "token 3 head d_head"]:
            streams = differences.mixed(reading.parts, removed, resid, tensors).to(resid.dtype)
            own = blocks.read(self._model, layer, "attention", streams).unflatten(0, (n_heads, -1))  # a stream for each port, or for all
            read = [self._matrices.read(layer, port, own[:, port % own.shape[1]]) for port in range(3)]
            return torch.stack(read).permute(2, 0, 1, 3)

        width = differences.width(reading.parts, reading.receivers, reading.senders)
        out = by_chunks(make, removed, [resid, *differences.tensors(reading.parts)], (3, n_heads, self._model.d_head), width)
        return dict(zip(PORTS, out.unbind(2), strict=True))

    def _with_members(self, layer: int, live: Tensor, made: Tensor) -> Tensor:
        heads = self._heads[layer]
        if len(heads) == self._model.n_heads:
            return made
        return live.index_copy(2, torch.tensor(heads, device=live.device), made)

    # --- The full mask --------------------------------------------------------------------------------------------------------------

    def total(self, mask: Float[Tensor, " unit"], rows: slice, score: Score) -> Float[Tensor, " unit"]:
        if bool((mask != 1).any()):
            return super().total(mask, rows, score)
        return self._contracted(*self._at_full_mask(rows, score))

    def each(self, mask: Float[Tensor, " unit"], rows: slice, score: Score) -> Float[Tensor, "row unit"]:
        if bool((mask != 1).any()):
            return super().each(mask, rows, score)
        differences, entered, grads = self._at_full_mask(rows, score)
        found = []
        for row in range(rows.stop - rows.start):
            one = slice(row, row + 1)
            here = [{key: value[one] for key, value in table.items()} for table in (entered, grads)]
            found.append(self._contracted(differences.map(partial(_of_rows, one)), *here))
        return torch.stack(found)

    def _at_full_mask(self, rows: slice, score: Score) -> tuple[Differences, dict[Any, Tensor], dict[Any, Tensor]]:
        """Senders' differences, what enters layers, and gradients at ports and at what MLPs and the final norm read."""
        differences, entered, taps = Differences(self._matrices, self._norms), {}, {}

        def enter(layer: int, resid: Tensor) -> Tensor:
            entered[layer] = resid.detach()
            return resid

        def tap(key: tuple[str, int], flowing: Tensor) -> Tensor:
            taps[key] = flowing.view_as(flowing) if flowing.requires_grad else flowing.detach().requires_grad_()
            return taps[key]

        with ExitStack() as stack:
            stack.enter_context(self._running(rows, differences))
            stack.enter_context(differentiable.edited(self._model, {(Site.RESID_PRE, at): partial(enter, at) for at in self._attentions}))
            for layer in self._attentions:
                edit = partial(lambda layer, port, flowing: tap((port, layer), flowing), layer)
                stack.enter_context(differentiable.ports(self._model, layer, edit))
            for layer in self._mlps:
                stack.enter_context(differentiable.before(reader(self._model, layer, "mlp"), partial(tap, ("mlp", layer))))
            stack.enter_context(differentiable.before(self._final_norm, partial(tap, ("logits", 0))))
            logits = differentiable.logits(self._model, self._prompts.clean[rows], **self._prompts.padding(rows))
        found = torch.autograd.grad(score(logits).sum(), list(taps.values()))
        return differences.map(Tensor.detach), entered, dict(zip(taps, found, strict=True))

    def _contracted(self, differences: Differences, entered: dict[Any, Tensor], grads: dict[Any, Tensor]) -> Float[Tensor, " unit"]:
        """Of each edge the gradient at its receiver times what its sender computes minus what the patcher gives, summed over tokens."""
        differences = differences.map(lambda tensor: tensor.flatten(0, 1))
        entered, grads = ({key: value.flatten(0, 1) for key, value in table.items()} for table in (entered, grads))
        first = differences.parts[0]
        dtype = accumulator(first.dtype)
        out = torch.zeros(self._n_edges, dtype=dtype, device=first.device)
        n_senders = self._readings["logits", 0].senders
        held = sum(part.nbytes for part in differences.parts)
        for chunk in token_slices(len(first), n_senders * self._model.d_model * dtype.itemsize, held):
            written = differences.map(partial(_of_rows, chunk)).added()
            for layer in self._attentions:
                reading = self._readings["heads", layer]
                back = self._at_streams(layer, [grads[port, layer][chunk] for port in PORTS], entered[layer][chunk])
                found = back.to(written).flatten(1) @ written[: reading.senders].flatten(1).T
                # Port by port there, head by head in the universe.
                out[reading.edges] -= found.unflatten(0, (-1, len(self._heads[layer]))).transpose(0, 1).flatten()
            single = [key for key in self._readings if key[0] != "heads"]
            back = torch.stack([grads[key][chunk] for key in single]).to(written)
            for key, found in zip(single, back.flatten(1) @ written.flatten(1).T, strict=True):
                out[self._readings[key].edges] -= found[: self._readings[key].senders]
        return out

    def _at_streams(
        self, layer: int, grads: list[Float[Tensor, "token head d_head"]], resid: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "receiver token d_model"]:
        """The gradient at the stream that each receiver in a layer's attention reads, port by port, from those at its ports."""
        by_head = [grad.transpose(0, 1) for grad in grads]
        if len(self._heads[layer]) < self._model.n_heads:
            by_head = [grad[self._heads[layer]] for grad in by_head]
        at_norm = self._matrices.backward(layer, by_head, resid)
        back = at_norm.flatten(0, 1) if self._split else at_norm.sum(0)
        norm = norm_before(self._model, layer, "attention")
        return back if norm is None else back_through(norm, resid, back)

    # --- Both -----------------------------------------------------------------------------------------------------------------------

    def _running(self, rows: slice, differences: Differences) -> ExitStack:
        """Within this context a pass replaces what is outside, and records what senders compute."""

        def record(place: Place, act: Tensor) -> Tensor:
            site, layer = place
            apart = self._values.at(place, act, rows) - act
            if site is Site.Z:
                heads = self._heads[layer]
                differences.add(apart if len(heads) == self._model.n_heads else apart[:, :, heads], act, heads_of=layer)
            else:
                differences.add(apart, act)
            return act

        with ExitStack() as stack:
            stack.enter_context(differentiable.own_keys_and_values(self._model))
            stack.enter_context(differentiable.edited(self._model, self._replaced(rows)))
            stack.enter_context(differentiable.edited(self._model, {place: partial(record, place) for place in self._senders}))
            return stack.pop_all()

    def _replaced(self, rows: slice) -> Mapping[Place, Edit]:
        def replace(place: Place, act: Tensor) -> Tensor:
            kept = torch.zeros((), dtype=accumulator(act.dtype), device=act.device)
            if place[0] is Site.Z:
                kept = kept.expand(self._model.n_heads, 1).index_fill(
                    0, torch.tensor(self._heads[place[1]], dtype=torch.long).to(act.device), 1
                )
            return blend(act, self._outside_values.at(place, act, rows), kept, whole=False)

        return {place: partial(replace, place) for place in self._outside}

    @property
    def _final_norm(self) -> torch.nn.Module:
        norm: torch.nn.Module = self._model.final_norm or self._model.unembedding
        return norm

    def _found(self, universe: EdgeUniverse) -> dict[tuple[str, int], Reading]:
        """The points at which receivers read, in causal order."""
        counts = [len(self._heads[layer]) if site is Site.Z else 1 for site, layer in self._senders]
        parts = {sum(counts[:part]): part for part in range(len(counts) + 1)}
        offsets = universe.offsets.tolist()
        found: dict[tuple[str, int], Reading] = {}
        for place, receiver in enumerate(universe.receivers):
            kind = {Kind.HEAD: "heads", Kind.MLP: "mlp"}.get(receiver.kind, "logits")
            key = (kind, 0 if kind == "logits" else receiver.layer)
            first, senders = offsets[place], offsets[place + 1] - offsets[place]
            before = found.get(key)
            found[key] = Reading(before.first if before else first, before.receivers + 1 if before else 1, senders, parts[senders])
        return found


_PARTS: dict[Site, Part] = {Site.Z: "attention", Site.MLP_OUT: "mlp"}
"""Through which part of a layer senders at a site add to the residual stream."""


def _any(removed: Tensor) -> bool:
    """Whether a reading has to be made: something is removed, or autograd has to know what if."""
    return removed.requires_grad or bool((removed != 0).any())


def _of_rows(rows: slice, tensor: Tensor) -> Tensor:
    """Some rows, or tokens, alone."""
    return tensor[rows]
