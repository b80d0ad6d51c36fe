"""Soft masks over nodes: each unit's output is blended, where it flows, with what the patcher gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.dense.base import DensePass
from circuitkit.engine.dense.blend import accumulator, blend
from circuitkit.engine.dense.values import PatchedValues
from circuitkit.engine.featurizing import Place
from circuitkit.engine.packed.layout import Layout
from circuitkit.models import differentiable
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

SITES = {Kind.HEAD: Site.Z, Kind.ATTENTION: Site.Z, Kind.MLP: Site.MLP_OUT, Kind.NEURON: Site.MLP_ACT}
"""Where units of a kind are blended as they are. Features are not: their site is read through a dictionary."""


@dataclass(frozen=True)
class Slots:
    """The units at one site of a layer.

    Attributes:
        places: Where they stand in a mask.
        slots: Which head or neuron each is; 0 for an MLP or a whole attention.
        spans: Which span each covers.
        width: How many slots the site has.
    """

    places: Int[Tensor, " some"]
    slots: Int[Tensor, " some"]
    spans: Int[Tensor, " some"]
    width: int

    def spread(
        self, masks: Float[Tensor, "#row unit"], span_at: Int[Tensor, "row pos"] | None, n_spans: int
    ) -> Float[Tensor, "#row #pos slot"]:
        """The mask of every slot at every position; 1 for what is no unit."""
        table = masks.new_ones(len(masks), n_spans + 1, self.width)
        table = table.index_put((torch.arange(len(masks))[:, None], self.spans, self.slots), masks[:, self.places])
        if span_at is None:
            return table[:, :1]
        return table.expand(len(span_at), -1, -1)[torch.arange(len(span_at))[:, None], span_at]


class DenseNodes(DensePass):
    """Soft masks over heads, whole attentions, MLPs and neurons, at all positions or at spans. Final.

    Args:
        model, prompts, patcher: As for every engine.
        universe: The units.

    Raises:
        MeasurementError: A kind of unit that is not blended as it is.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, patcher: Patcher, universe: NodeUniverse) -> None:
        unknown = universe.kinds - SITES.keys()
        if unknown:
            raise MeasurementError(
                f"Soft masks over {', '.join(sorted(f'{kind}s' for kind in unknown))} need their dictionary. Here units can be "
                f"{', '.join(f'{kind}s' for kind in SITES)}."
            )
        self._model = model
        self._prompts = prompts
        self._n_spans = len(universe.spans)
        self._span_at = Layout(universe, prompts).span_at
        self._at = {place: slots for kind in universe.kinds for place, slots in _slots(model, universe, kind)}
        self._values = PatchedValues(model, prompts, patcher, self._at)

    def prepare(self, rows_a_pass: int) -> None:
        self._values.collect(rows_a_pass)

    def logits(self, masks: Float[Tensor, "#row unit"], rows: slice) -> Float[Tensor, "row d_vocab"]:
        span_at = None if self._span_at is None else self._span_at[rows]
        edits = {place: partial(self._blended, place, masks, span_at, rows) for place in self._at}
        with differentiable.edited(self._model, edits):
            return differentiable.logits(self._model, self._prompts.clean[rows], **self._prompts.padding(rows))

    def _blended(self, place: Place, masks: Tensor, span_at: Tensor | None, rows: slice, act: Tensor) -> Tensor:
        mask = self._at[place].spread(masks, span_at, self._n_spans)
        whole = bool((mask == 1).all())
        mask = mask.to(act.device, accumulator(act.dtype))
        return blend(act, self._values.at(place, act, rows), mask[..., None] if place[0] is Site.Z else mask, whole=whole)


def _slots(model: HookedModel, universe: NodeUniverse, kind: Kind) -> Iterable[tuple[Place, Slots]]:
    widths = {Kind.HEAD: model.n_heads, Kind.NEURON: model.d_mlp}
    places, where = universe.places_of(kind)
    layers, slots, spans = where.T
    for layer in layers.unique().tolist():
        here = layers == layer
        site = Site.ATTN_OUT if kind is Kind.ATTENTION and model.map.blocks[layer].is_mixer else SITES[kind]
        yield (site, layer), Slots(places[here], slots[here], spans[here], widths.get(kind, 1))
