"""Masks over a graph, laid out as the forward pass meets them: layer by layer, by position where units name positions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.graph import Graph
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks


class Layout:
    """Where the units of a graph lie in a prompt set. Final.

    Attributes:
        graph: The units.
        span_at: For every prompt and position the span that covers it, or ``len(graph.spans)`` where none does; None when units cover
            all positions.
    """

    def __init__(self, graph: Graph, prompts: PromptSet) -> None:
        self.graph = graph
        self.span_at: Int[Tensor, "prompt pos"] | None = _span_table(graph, prompts) if graph.spans else None

    def by_layer(self, masks: Masks) -> Bool[Tensor, "mask layer unit"]:
        """Masks with the layers as an axis of their own."""
        return masks.view(len(masks), self.graph.n_layers, -1)

    def first_difference(self, masks: Masks, base: Bool[Tensor, "node"]) -> Int[Tensor, "mask"]:
        """For each mask the first layer in which it differs from ``base``; the number of layers if it does not."""
        differs = self.by_layer(masks != base).any(-1)
        layers = differs.int().argmax(-1)
        return torch.where(differs.any(-1), layers, self.graph.n_layers)

    def first_position(self, masks: Masks, base: Bool[Tensor, "node"]) -> Int[Tensor, "mask"]:
        """For each mask the first position, in any prompt, at which it differs from ``base``; 0 where units cover all positions."""
        if self.span_at is None:
            return torch.zeros(len(masks), dtype=torch.long)
        n_spans, n_pos = len(self.graph.spans), self.span_at.shape[1]
        differs = (masks != base).unflatten(-1, (-1, n_spans)).any(1)
        at = [int((self.span_at == span).any(0).int().argmax()) for span in range(n_spans)]
        return torch.where(differs, torch.tensor(at), n_pos).amin(-1)


class Edits:
    """Which outputs are kept in a pass whose rows are masks x prompts. Final.

    Args:
        layout: Of the units.
        masks: One row a mask.
        rows: The prompts of the pass.
        cut: First position that the pass computes.
    """

    def __init__(self, layout: Layout, masks: Masks, rows: slice, cut: int = 0) -> None:
        graph = layout.graph
        self.n_masks = len(masks)
        self._n_heads = graph.n_heads
        self._units = layout.by_layer(masks).unflatten(-1, (graph.n_heads + 1, -1))
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


def _span_table(graph: Graph, prompts: PromptSet) -> Int[Tensor, "prompt pos"]:
    n_groups = len(prompts.group_names)
    table = torch.full((n_groups, prompts.n_pos), len(graph.spans))
    for index, span in enumerate(graph.spans):
        for group in range(n_groups):
            position = prompts.position(span, group)
            taken = int(table[group, position])
            if taken != len(graph.spans):
                raise MeasurementError(
                    f"Positions {graph.spans[taken]!r} and {span!r} are both token {position} in prompts of group "
                    f"{prompts.group_names[group]!r}, so a mask could contradict itself. Name each position once."
                )
            table[group, position] = index
    return table[prompts.groups]
