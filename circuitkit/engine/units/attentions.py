"""Whole attentions and MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from circuitkit.core.universe import NodeUniverse, Universe
from circuitkit.engine.units.base import Units
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class Attentions(Units):
    """Every attention, all its heads as one unit, and every MLP. Final."""

    def universe(self, model: HookedModel) -> NodeUniverse:
        return Universe.of_attentions(model.n_layers, model.n_heads, model.map.layers_with_attention, model.map.layers_with_mlps)
