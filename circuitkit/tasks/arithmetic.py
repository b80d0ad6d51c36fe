"""Questions that ask for the result of an operation: "12 + 30 =" -> "42"."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import final

from circuitkit.core.errors import ConfigError
from circuitkit.core.questions import Question
from circuitkit.tasks.questions import Questions

_RANGES = {1: range(10), 2: range(10, 100)}


@dataclass(frozen=True)
class Arithmetic(Questions):
    """Pairs of numbers, each pair once. The corrupt twin has another pair, with another result.

    Source of the prompts: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), ablation on other tasks.

    Attributes:
        digits: Of each number: 1 for 0 to 9, 2 for 10 to 99.
    """

    digits: int = 1

    operation = ""
    sign = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits not in _RANGES:
            raise ConfigError(f"{self.name}: digits must be 1 (0 to 9) or 2 (10 to 99); found {self.digits}.")

    @property
    def name(self) -> str:
        return f"{self.operation}_{self.digits}_digit"

    @abstractmethod
    def result(self, a: int, b: int) -> int:
        """What the operation makes of two numbers."""

    def pairs(self) -> list[tuple[int, int]]:
        """Everything that can be asked."""
        return [(a, b) for a in _RANGES[self.digits] for b in _RANGES[self.digits]]

    def questions(self) -> list[Question]:
        pairs, rng = self.pairs(), Random(self.seed)
        chosen = rng.sample(pairs, min(self.n, len(pairs)))
        return [Question(self._text(pair), f" {self.result(*pair)}", self._text(self._twin(pair, pairs, rng))) for pair in chosen]

    def _text(self, pair: tuple[int, int]) -> str:
        return f"{pair[0]} {self.sign} {pair[1]} ="

    def _twin(self, pair: tuple[int, int], pairs: Sequence[tuple[int, int]], rng: Random) -> tuple[int, int]:
        while True:
            other = rng.choice(pairs)
            if self.result(*other) != self.result(*pair):
                return other


@final
class Addition(Arithmetic):
    """a + b."""

    operation = "addition"
    sign = "+"

    def result(self, a: int, b: int) -> int:
        return a + b


@final
class Subtraction(Arithmetic):
    """a - b, with a no less than b."""

    operation = "subtraction"
    sign = "-"

    def result(self, a: int, b: int) -> int:
        return a - b

    def pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a, b in super().pairs() if a >= b]


@final
class Multiplication(Arithmetic):
    """a * b."""

    operation = "multiplication"
    sign = "*"

    def result(self, a: int, b: int) -> int:
        return a * b
