"""Neurons of MLPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitkit.core.errors import ConfigError
from circuitkit.core.universe import NodeUniverse, Universe
from circuitkit.engine.units.base import Units
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class Neurons(Units):
    """Every neuron of the MLPs of some layers: what the MLP's output projection reads. Final.

    Attributes:
        layers: Which, from 0; None for all.
    """

    layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        layers = None if self.layers is None else tuple(self.layers)
        if layers is not None and (not layers or not all(type(layer) is int for layer in layers) or len(set(layers)) < len(layers)):
            raise ConfigError(f"units.layers must be a list of layers such as [3,4], each once, or null for all; found {list(layers)}.")
        object.__setattr__(self, "layers", layers)

    def universe(self, model: HookedModel) -> NodeUniverse:
        bad = [layer for layer in self.layers or () if not 0 <= layer < model.n_layers]
        if bad:
            raise ConfigError(f"{model.name} has layers 0 to {model.n_layers - 1}, found {bad[0]} in units.layers. Name one of these.")
        layers = [layer for layer in range(model.n_layers) if self.layers is None or layer in self.layers]
        without = [layer for layer in layers if model.map.blocks[layer].neurons is None]
        if without:
            others = [layer for layer, block in enumerate(model.map.blocks) if block.neurons is not None]
            raise ConfigError(
                f"Layer {without[0]} of {model.name} ({model.map.family}) has no neurons of its own: its MLP is routed experts, or it has "
                f"none. Layers with neurons: {', '.join(map(str, others)) or 'none'}. Name some of these (units.layers)."
            )
        return Universe.of_neurons(model.n_layers, model.n_heads, model.d_mlp, layers)
