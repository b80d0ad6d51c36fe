"""Masks over a universe, laid out as the forward pass meets them: layer by layer, by position where units name positions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks
from circuitkit.core.universe import NodeUniverse


class Layout:
    """Where the units of a universe lie in a prompt set. Final.

    Attributes:
        universe: The units.
        span_at: For every prompt and position the span that covers it, or ``len(universe.spans)`` where none does; None when units cover
            all positions.
    """

    def __init__(self, universe: NodeUniverse, prompts: PromptSet) -> None:
        self.universe = universe
        self.span_at: Int[Tensor, "prompt pos"] | None = _span_table(universe, prompts) if universe.spans else None
        self._places = _component_places(universe)

    def components(self, masks: Masks) -> Bool[Tensor, "mask layer component span"]:
        """Which heads, and behind them the MLP, each layer keeps. What is no unit of the universe is kept."""
        always = torch.ones(len(masks), 1, dtype=torch.bool)
        return torch.cat([masks, always], 1)[:, self._places]

    def removed(self, mask: Bool[Tensor, "unit"], most: int = 6) -> str:
        """The first few units that a mask removes, for people."""
        places = (~mask).nonzero().flatten().tolist()
        names = ", ".join(str(self.universe.unit(place)) for place in places[:most]) or "nothing"
        return names + (f" and {len(places) - most} more" if len(places) > most else "")

    def with_all_mlps(self, masks: Masks) -> Masks:
        """The same masks with every MLP kept."""
        masks = masks.clone()
        masks[:, self.universe.places_of(Kind.MLP)[0]] = True
        return masks

    def first_difference(self, masks: Masks, base: Bool[Tensor, "unit"]) -> Int[Tensor, "mask"]:
        """For each mask the first layer in which it differs from ``base``; the number of layers if it does not."""
        return torch.where(masks != base, self.universe.layers, self.universe.n_layers).amin(-1)

    def first_position(self, masks: Masks, base: Bool[Tensor, "unit"]) -> Int[Tensor, "mask"]:
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
    """

    def __init__(self, layout: Layout, masks: Masks, rows: slice, cut: int = 0) -> None:
        self.n_masks = len(masks)
        self._n_heads = layout.universe.n_heads
        self._units = layout.components(masks)
        self._span_at = None if layout.span_at is None else layout.span_at[rows, cut:]

    def heads(self, layer: int) -> Bool[Tensor, "mask prompt pos head"]:
        """True where a head's output is kept. Axes that make no difference have length 1."""
        return self._spread(self._units[:, layer, : self._n_heads]).permute(0, 2, 3, 1)

    def mlp(self, layer: int) -> Bool[Tensor, "mask prompt pos"]:
        """True where the MLP's output is kept. Axes that make no difference have length 1."""
        return self._spread(self._units[:, layer, self._n_heads :])[:, 0]

    def _spread(self, units: Bool[Tensor, "mask unit span"]) -> Bool[Tensor, "mask unit prompt pos"]:
        if self._span_at is None:
            return units[..., None]
        uncovered = torch.ones(*units.shape[:-1], 1, dtype=torch.bool)
        return torch.cat([units, uncovered], -1)[..., self._span_at]


def _component_places(universe: NodeUniverse) -> Int[Tensor, "layer component span"]:
    """The place in a mask of each head, and behind them of the MLP, of every layer; one past the last for what is no unit."""
    n_heads, n_spans = universe.n_heads, max(1, len(universe.spans))
    table = torch.full((universe.n_layers, n_heads + 1, n_spans), len(universe))
    if {Kind.HEAD, Kind.ATTENTION} <= universe.kinds:
        raise MeasurementError(
            "This universe has both single heads and whole attentions as units, so a mask could contradict itself. Take one of the two."
        )
    places, where = universe.places_of(Kind.ATTENTION)
    table[where[:, 0], :n_heads, where[:, 2]] = places[:, None]
    places, where = universe.places_of(Kind.HEAD)
    table[where[:, 0], where[:, 1], where[:, 2]] = places
    places, where = universe.places_of(Kind.MLP)
    table[where[:, 0], n_heads, where[:, 2]] = places
    return table


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
