"""Masks over a universe, laid out as the forward pass meets them: layer by layer, by position where units name positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.featurizing import FEATURE_PLACES, Place


@dataclass(frozen=True)
class Coordinates:
    """The neurons or features at one place that are units.

    Attributes:
        slots: Which ones.
        places: The place of each in a mask; one past the last for what is no unit.
        error: The place of the error term, likewise.
    """

    slots: Int[Tensor, " some"]
    places: Int[Tensor, "some span"]
    error: Int[Tensor, " span"]


@dataclass(frozen=True)
class Removed:
    """The neurons or features at one place that some mask of a pass removes. Axes that make no difference have length 1.

    Attributes:
        slots: Which ones.
        keep: True where one is kept.
        keep_error: True where the error term is kept.
    """

    slots: Int[Tensor, " some"]
    keep: Bool[Tensor, "mask prompt pos some"]
    keep_error: Bool[Tensor, "mask prompt pos"]

    @property
    def untouched(self) -> Bool[Tensor, "mask prompt pos"]:
        """True where nothing is removed."""
        return self.keep.all(-1) & self.keep_error

    def last(self) -> Removed:
        """The same at the last position alone."""
        return Removed(self.slots, self.keep[:, :, -1:], self.keep_error[:, :, -1:])


class Layout:
    """Where the units of a universe lie in a prompt set. Final.

    Attributes:
        universe: The units.
        span_at: For every prompt and position the span that covers it, or ``len(universe.spans)`` where none does; None when units cover
            all positions.
        coordinates: Where the neurons and features at each place lie.
        n_slots: How many heads a layer has at most; one for a model of mixers alone.
    """

    def __init__(self, universe: NodeUniverse, prompts: PromptSet) -> None:
        self.universe = universe
        self.n_slots = _n_slots(universe)
        self.span_at: Int[Tensor, "prompt pos"] | None = _span_table(universe, prompts) if universe.spans else None
        self._places = _component_places(universe)
        self.coordinates = _coordinate_places(universe)

    def components(self, masks: Masks) -> Bool[Tensor, "mask layer component span"]:
        """Which heads, and behind them the MLP, each layer keeps. What is no unit of the universe is kept."""
        always = torch.ones(len(masks), 1, dtype=torch.bool)
        return torch.cat([masks, always], 1)[:, self._places]

    def with_all_mlps(self, masks: Masks) -> Masks:
        """The same masks with every MLP kept."""
        masks = masks.clone()
        masks[:, self.universe.places_of(Kind.MLP)[0]] = True
        return masks

    def first_difference(self, masks: Masks, base: Bool[Tensor, " unit"]) -> Int[Tensor, " mask"]:
        """For each mask the first layer in which it differs from ``base``; the number of layers if it does not."""
        differs = masks != base
        first = differs.view(torch.uint8).argmax(-1)  # the first of the largest: units are in the order of layers
        return torch.where(differs.any(-1), self.universe.layers[first], self.universe.n_layers)

    def first_position(self, masks: Masks, base: Bool[Tensor, " unit"]) -> Int[Tensor, " mask"]:
        """For each mask the first position, in any prompt, at which it differs from ``base``; 0 where units cover all positions."""
        if self.span_at is None:
            return torch.zeros(len(masks), dtype=torch.long)
        n_spans, n_pos = len(self.universe.spans), self.span_at.shape[1]
        differs = (masks != base).unflatten(-1, (-1, n_spans)).any(1)
        at = [int((self.span_at == span).any(0).int().argmax()) for span in range(n_spans)]
        return torch.where(differs, torch.tensor(at), n_pos).amin(-1)


class Edits:
    """Which outputs are kept in a pass whose rows are masks x prompts. Final.

    Args:
        layout: Of the units.
        masks: One row per mask.
        rows: The prompts of the pass.
        cut: First position that the pass computes.

    Attributes:
        n_masks: How many masks the rows are a product with; 1 where each row has its own.
    """

    def __init__(self, layout: Layout, masks: Masks, rows: slice, cut: int = 0) -> None:
        self.n_masks = len(masks)
        self._by_row = False
        self._n_heads = layout.n_slots
        self._units = layout.components(masks)
        self._coordinates = layout.coordinates
        self._masks = masks
        self._span_at = None if layout.span_at is None else layout.span_at[rows, cut:]

    @classmethod
    def by_row(cls, layout: Layout, masks: Masks) -> Edits:
        """Of a pass each of whose rows is a prompt under a mask of its own. The universe has units at all positions only."""
        assert layout.span_at is None
        edits = cls(layout, masks, slice(0, len(masks)))
        edits.n_masks, edits._by_row = 1, True
        return edits

    def heads(self, layer: int) -> Bool[Tensor, "mask prompt pos head"]:
        """True where a head's output is kept; for a mixer all say the same. Axes that make no difference have length 1."""
        return self._spread(self._units[:, layer, : self._n_heads]).permute(0, 2, 3, 1)

    def mlp(self, layer: int) -> Bool[Tensor, "mask prompt pos"]:
        """True where the MLP's output is kept. Axes that make no difference have length 1."""
        return self._spread(self._units[:, layer, self._n_heads :])[:, 0]

    def coordinates(self, site: Site, layer: int) -> Removed | None:
        """What is removed of the neurons or features at a place; None if nothing is."""
        there = self._coordinates.get((site, layer))
        if there is None:
            return None
        always = torch.ones(len(self._masks), 1, dtype=torch.bool)
        error = torch.cat([self._masks, always], 1)[:, there.error]
        units = torch.cat([self._masks, always], 1)[:, there.places]
        some = ~units.all(-1).all(0)
        if not some.any() and error.all():
            return None
        keep = self._spread(units[:, some]).permute(0, 2, 3, 1)
        return Removed(there.slots[some], keep, self._spread(error[:, None])[:, 0])

    def _spread(self, units: Bool[Tensor, "mask unit span"]) -> Bool[Tensor, "#mask unit prompt pos"]:
        if self._by_row:
            return units.transpose(0, 1)[None]
        if self._span_at is None:
            return units[..., None]
        uncovered = torch.ones(*units.shape[:-1], 1, dtype=torch.bool)
        return torch.cat([units, uncovered], -1)[..., self._span_at]


def _n_slots(universe: NodeUniverse) -> int:
    return max(1, universe.n_heads)


def _component_places(universe: NodeUniverse) -> Int[Tensor, "layer component span"]:
    """The place in a mask of each head, and behind them of the MLP, of every layer; one past the last for what is no unit."""
    n_heads, n_spans = _n_slots(universe), max(1, len(universe.spans))
    table = torch.full((universe.n_layers, n_heads + 1, n_spans), len(universe))
    places, where = universe.places_of(Kind.ATTENTION)
    table[where[:, 0], :n_heads, where[:, 2]] = places[:, None]
    places, where = universe.places_of(Kind.HEAD)
    table[where[:, 0], where[:, 1], where[:, 2]] = places
    places, where = universe.places_of(Kind.MLP)
    table[where[:, 0], n_heads, where[:, 2]] = places
    return table


def _coordinate_places(universe: NodeUniverse) -> dict[Place, Coordinates]:
    found: dict[Place, Coordinates] = {}
    n_spans = max(1, len(universe.spans))
    for kind, site in ((Kind.NEURON, Site.MLP_ACT), *((Kind.FEATURE, site) for site in FEATURE_PLACES)):
        units, where = universe.places_of(kind, site)
        errors, of_errors = universe.places_of(Kind.ERROR, site) if kind is Kind.FEATURE else (units[:0], where[:0])
        for layer in torch.cat([where[:, 0], of_errors[:, 0]]).unique().tolist():
            here = where[:, 0] == layer
            slots, row = where[here, 1].unique(return_inverse=True)
            places = torch.full((len(slots), n_spans), len(universe), device="cpu")
            places[row, where[here, 2]] = units[here]
            error = torch.full((n_spans,), len(universe), device="cpu")
            here = of_errors[:, 0] == layer
            error[of_errors[here, 2]] = errors[here]
            found[site, layer] = Coordinates(slots, places, error)
    return found


def _span_table(universe: NodeUniverse, prompts: PromptSet) -> Int[Tensor, "prompt pos"]:
    n_spans, rows = len(universe.spans), torch.arange(len(prompts))
    table = torch.full((len(prompts), prompts.n_pos), n_spans)
    for index, span in enumerate(universe.spans):
        columns = prompts.columns(span)
        taken = table[rows, columns]
        if (taken != n_spans).any():
            row = int((taken != n_spans).int().argmax())
            place = int(columns[row] - prompts.pads[row])
            raise MeasurementError(
                f"Positions {universe.spans[int(taken[row])]!r} and {span!r} are both token {place} in prompts of group "
                f"{prompts.group_names[int(prompts.groups[row])]!r}, so a mask could contradict itself. Name each position once."
            )
        table[rows, columns] = index
    return table
