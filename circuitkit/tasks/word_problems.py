"""Questions in words about months and days.

Source of the prompts: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), ablation on other tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import TypeVar, final

from circuitkit.core.questions import Question
from circuitkit.tasks.questions import Questions
from circuitkit.tasks.words import MONTHS

_YEAR = 2024
_MONTH = re.compile(rf"\b({'|'.join(MONTHS)})\b")

Drawn = TypeVar("Drawn")


@final
@dataclass(frozen=True)
class DateProblem(Questions):
    """ "If today is March 3th, then in 4 days it will be" -> "March 7th", in the calendar of 2024. Days are always written with "th"."""

    n: int = 100

    @property
    def name(self) -> str:
        return "date_problem"

    def questions(self) -> list[Question]:
        def draw(rng: Random) -> tuple[int, int, int]:
            return rng.randint(1, 12), rng.randint(1, 28), rng.randint(1, 28)

        def ask(month: int, day: int, days: int) -> str:
            return f"If today is {MONTHS[month - 1]} {day}th, then in {days} days it will be"

        asked = []
        for problem, twin in _problems(draw, lambda drawn: _widths(drawn[1:]), self.n, self.seed):
            month, day, days = problem
            then = date(_YEAR, month, day) + timedelta(days)
            asked.append(Question(ask(*problem), f" {MONTHS[then.month - 1]} {then.day}th", ask(*twin)))
        return asked


@final
@dataclass(frozen=True)
class MonthProblem(Questions):
    """ "If this month is March, and 4 months pass, what month is it? Answer:" -> "July", anywhere in what is generated."""

    n: int = 100
    n_new_tokens: int | None = 20

    @property
    def name(self) -> str:
        return "month_problem"

    def questions(self) -> list[Question]:
        def draw(rng: Random) -> tuple[int, int]:
            return rng.randrange(12), rng.randint(1, 12)

        def ask(month: int, months: int) -> str:
            return f"If this month is {MONTHS[month]}, and {months} months pass, what month is it? Answer:"

        return [
            Question(ask(*problem), f" {MONTHS[sum(problem) % 12]}", ask(*twin))
            for problem, twin in _problems(draw, lambda drawn: _widths(drawn[1:]), self.n, self.seed)
        ]

    def is_right(self, question: Question, generated: str) -> bool:
        return question.answer.strip() in _MONTH.findall(generated)


@final
@dataclass(frozen=True)
class MonthList(Questions):
    """The months of the year, answered freely; right if the first twelve months that are named are all months in their order."""

    n: int = 1
    n_new_tokens: int | None = 100

    @property
    def name(self) -> str:
        return "month_list"

    def questions(self) -> list[Question]:
        return [Question("What are the months in a year? Give all of them as a list. Be concise.", f" {', '.join(MONTHS)}")]

    def is_right(self, question: Question, generated: str) -> bool:
        return tuple(_MONTH.findall(generated)[:12]) == MONTHS


def _widths(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(str(number)) for number in numbers)


def _problems(draw: Callable[[Random], Drawn], shape: Callable[[Drawn], object], n: int, seed: int) -> list[tuple[Drawn, Drawn]]:
    """Different problems, each with another of the same shape: numbers with equally many digits."""
    rng = Random(seed)
    problems: dict[Drawn, Drawn] = {}
    for _ in range(100 * n):  # there may be fewer different ones
        problem, twin = draw(rng), draw(rng)
        if twin != problem and shape(twin) == shape(problem):
            problems.setdefault(problem, twin)
        if len(problems) == n:
            break
    return list(problems.items())
