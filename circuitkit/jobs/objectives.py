"""Objectives: the number that a run returns to a sweeper such as Optuna."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from circuitkit.core.errors import ConfigError, unknown_choice

BELOW = 1e6  # more than any circuit has members


class Objective(ABC):
    """Makes one number of what a run is summed up by."""

    @abstractmethod
    def value(self, numbers: Mapping[str, Any]) -> float:
        """The number to minimise or maximise.

        Args:
            numbers: Those of the whole run, such as ``circuit/score`` and ``circuit/size``.
        """


class Number(Objective):
    """One of the numbers as it is.

    Attributes:
        key: Which, such as ``circuit/size``.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def value(self, numbers: Mapping[str, Any]) -> float:
        """The number.

        Raises:
            ConfigError: The run has no such number.
        """
        return _number(numbers, self.key)


class SizeAbove(Objective):
    """Size of the circuit if its score is high enough; else a number that is larger than any size, and smaller the less is missing.

    Attributes:
        score: In %, what a circuit must reach.
    """

    def __init__(self, score: float) -> None:
        self.score = score

    def value(self, numbers: Mapping[str, Any]) -> float:
        """The number to minimise.

        Raises:
            ConfigError: The run found no circuit.
        """
        missing = self.score - _number(numbers, "circuit/score")
        return _number(numbers, "circuit/size") if missing <= 0 else BELOW + missing


def _number(numbers: Mapping[str, Any], key: str) -> float:
    found = numbers.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        known = [name for name, value in numbers.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
        raise ConfigError(unknown_choice("number of this run for the objective", key, known))
    return float(found)
