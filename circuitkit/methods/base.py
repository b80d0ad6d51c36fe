"""Method: chooses which masks to score next, and what the answer is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.node import Level
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import Step
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine

OnStep = Callable[[Step], None]


class Method(Part):
    """A search. It asks the engine for scores, tells ``on_step`` of every evaluated candidate, and returns what it found.

    Attributes:
        name: As it is logged and configured.
        level: How fine the units are that it searches.
    """

    name: str
    level: Level = Level.NODE

    def units(self, universe: NodeUniverse, prompts: PromptSet) -> NodeUniverse:
        """The units that the method wants to search, made from a model's heads and MLPs. By default these."""
        return universe

    @abstractmethod
    def discover(self, engine: Engine, *, on_step: OnStep, history: Sequence[Step] = ()) -> Circuit | Scores:
        """Runs the search.

        Args:
            engine: Scores masks.
            on_step: To be called after each decision, in order.
            history: The first decisions, made by an earlier process of the same run: to be told to ``on_step`` like any other, without
                scoring them again. A method may leave this argument out; it is then run from its start, and its steps are compared.
        """
