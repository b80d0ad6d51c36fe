"""Units: what a search is over, as a setting."""

from circuitkit.engine.units.attentions import Attentions
from circuitkit.engine.units.base import Units
from circuitkit.engine.units.features import Features
from circuitkit.engine.units.neurons import Neurons
from circuitkit.engine.units.nodes import Nodes

__all__ = ["Attentions", "Features", "Neurons", "Nodes", "Units"]
