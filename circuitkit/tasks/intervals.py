"""Questions that ask for the next member of a sequence: numbers at any interval, or words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import final

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.questions import Question
from circuitkit.tasks import words
from circuitkit.tasks.corruptions import shuffled
from circuitkit.tasks.questions import Questions


@final
@dataclass(frozen=True)
class Intervals(Questions):
    """Numbers at a constant interval: "2 4 6" -> "8". Each question begins one interval further than the one before.

    Source of the prompts: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), ablation on other tasks.

    Attributes:
        step: The interval; below zero for numbers that decrease.
        start: The smallest number of the first question.
        length: How many numbers are shown.
    """

    step: int = 1
    start: int = 1
    length: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step == 0 or self.start < 0:
            raise ConfigError(f"{self.name}: step must not be 0 and start not below 0; found step={self.step} and start={self.start}.")
        _check_length(self)

    @property
    def name(self) -> str:
        return f"numerals_{'plus' if self.step > 0 else 'minus'}_{abs(self.step)}"

    def questions(self) -> list[Question]:
        interval = abs(self.step)
        numbers = [str(self.start + place * interval) for place in range(self.n + self.length)]
        windows = [numbers[first : first + self.length + 1] for first in range(self.n)]
        return _questions(windows if self.step > 0 else [window[::-1] for window in windows], self.seed)


VOCABULARIES: Mapping[str, tuple[str, ...]] = {
    "numwords": words.NUMWORDS,
    "months": words.MONTHS,
    "es_numwords": words.ES_NUMWORDS,
    "es_months": words.ES_MONTHS,
    "days": words.DAYS,
    "letters": words.LETTERS,
}
"""Sequences of words, by name."""


@final
@dataclass(frozen=True)
class NextWord(Questions):
    """Words in their order, without wrapping around: "uno dos tres" -> "cuatro".

    Attributes:
        vocabulary: Which words: a name in ``VOCABULARIES``.
        length: How many words are shown.
    """

    vocabulary: str = "months"
    length: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary not in VOCABULARIES:
            raise ConfigError(unknown_choice("vocabulary", self.vocabulary, VOCABULARIES))
        _check_length(self, len(VOCABULARIES[self.vocabulary]))

    @property
    def name(self) -> str:
        return f"next_{self.vocabulary}"

    def questions(self) -> list[Question]:
        members = VOCABULARIES[self.vocabulary]
        n = min(self.n, len(members) - self.length)
        return _questions([members[first : first + self.length + 1] for first in range(n)], self.seed)


def _questions(windows: Sequence[Sequence[str]], seed: int) -> list[Question]:
    """One question a window, whose last member is the answer. The corrupt twin shows the same members in another order."""
    asked = []
    for place, window in enumerate(windows):
        *shown, answer = window
        corrupt = shuffled(shown, window, (), Random(f"{seed}/{place}"))
        asked.append(Question(" ".join(shown), f" {answer}", " ".join(corrupt)))
    return asked


def _check_length(asked: Intervals | NextWord, n_members: int | None = None) -> None:
    if asked.length < 2 or (n_members is not None and asked.length >= n_members):
        most = "" if n_members is None else f" and less than {n_members}, the number of its words"
        raise ConfigError(
            f"{asked.name}: length, the number of members shown, must be 2 or more, because one member is no sequence{most}; "
            f"found {asked.length}."
        )
