"""Heads and MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.units.base import Units
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class Nodes(Units):
    """Every attention head and every MLP. Final."""

    def universe(self, model: HookedModel) -> NodeUniverse:
        return model.universe
