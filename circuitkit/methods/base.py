"""Method: chooses which masks to score next, and what the answer is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.node import Level
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import Step
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine
from circuitkit.engine.featurizing import Featurizers
from circuitkit.engine.units import Nodes, Units
from circuitkit.models.hooked import HookedModel

NODES = Nodes()
"""Heads and MLPs: what a method searches if it is not told otherwise."""

OnStep = Callable[[Step], None]


class Method(Part):
    """A search. It asks the engine for scores, tells ``on_step`` of every evaluated candidate, and returns what it found.

    Attributes:
        name: As it is logged and configured.
        level: How fine the units are that it searches.
        units: What it searches; a method that can search others than heads and MLPs takes them as an argument.
        threshold: Share of the untouched model's score at which it decides; None for a method that decides by no threshold.
    """

    name: str
    level: Level = Level.NODE
    units: Units = NODES
    threshold: float | None = None

    def universe(self, model: HookedModel, prompts: PromptSet) -> NodeUniverse:
        """The units that the method wants an engine over. By default those of ``units``."""
        return self.units.universe(model)

    def featurizers(self) -> Featurizers:
        """What makes features of activations, for units that are features."""
        return self.units.featurizers()

    def over(self, engine: Engine) -> Engine:
        """The engine to search with, made from one over ``universe``: that one, or one over edges. By default that one."""
        return engine

    @abstractmethod
    def discover(self, engine: Any, *, on_step: OnStep, history: Sequence[Step] = ()) -> Circuit | Scores:
        """Runs the search.

        Args:
            engine: Scores masks; what ``over`` returned, or the same spread over several processes.
            on_step: To be called after each decision, in order.
            history: The first decisions, made by an earlier process of the same run: to be told to ``on_step`` like any other. A method
                that scores them again instead gives the same steps, which are compared.
        """
