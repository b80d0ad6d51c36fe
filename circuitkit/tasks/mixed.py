"""Two sequences in one prompt, one in order and one at random: "12 January 19 February 17 March 18 April 7" -> " May".

A control for heads that look at similar members: months should look at months here, and not at the numbers beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from random import Random
from typing import final

from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.tasks import words
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.corruptions import random_members
from circuitkit.tasks.drawing import draw
from circuitkit.tasks.encoding import Encoder, encode

_LENGTH = 4


@final
@dataclass(frozen=True)
class MixedMonths(Task):
    """Four months in order, each behind a random number. The months are labelled S1 to S4, the numbers N1 to N5.

    Attributes:
        n: Number of prompts, balanced over the first month.
        seed: Of the draw.
        filter: Whether prompts that the untouched model cannot do are drawn again.
        bos: None begins texts as the tokenizer does on its own, True with its BOS token, False with no special token.
        top: Numbers go from 1 to this; those that are not one token are left out.
    """

    n: int = 256
    seed: int = 0
    filter: bool = False
    bos: bool | None = None
    top: int = 20

    name = "mixed_months"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"task.n, the number of prompts, must be 1 or more; found {self.n}.")
        if not _LENGTH < self.top <= len(words.NUMERALS):
            raise ConfigError(f"task.top, the largest number, must be from {_LENGTH + 1} to {len(words.NUMERALS)}; found {self.top}.")

    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        n, seed = self.n if n is None else n, self.seed if seed is None else seed
        encoder = Encoder(tokenizer, self.bos)
        numbers = self._one_token(encoder)
        starts = len(words.MONTHS) - _LENGTH

        def candidate(start: int, k: int) -> Prompt:
            return _prompt(start, numbers, Random(f"{seed}/{start}/{k}"))

        quotas = {start: len(range(start, n, starts)) for start in range(min(n, starts))}
        kept = draw(quotas, candidate, lambda batch: encode(batch, encoder), accept if self.filter else None)
        in_turn = chain.from_iterable(zip_longest(*kept.values()))
        return encode([prompt for prompt in in_turn if prompt is not None], encoder)

    def _one_token(self, encoder: Encoder) -> tuple[str, ...]:
        """The numbers that are one token behind a word, and as long as the number 1 at the beginning of a text."""
        pool = words.NUMERALS[: self.top]
        behind, opening = encoder.added("May", [f" {number}" for number in pool]), [len(ids) for ids in encoder.ids(pool)]
        shortest = min(map(len, behind))  # two where the tokenizer makes a token of the space
        usable = [
            number
            for number, ids, length in zip(pool, behind, opening, strict=True)
            if len(ids) == shortest and length == opening[0] and encoder.knows(ids)
        ]
        if len(usable) <= _LENGTH:
            raise PromptError(
                f"This task needs at least {_LENGTH + 1} numbers that are one token, and of 1 to {self.top} only {len(usable)} are. Use "
                "another model, or a larger range (task.top)."
            )
        return tuple(usable)


def _prompt(start: int, numbers: Sequence[str], rng: Random) -> Prompt:
    *shown, answer = words.MONTHS[start : start + _LENGTH + 1]
    beside = rng.sample(list(numbers), _LENGTH + 1)
    clean, spans = _said(shown, beside)
    corrupt, corrupt_spans = _said(random_members(shown, words.MONTHS, (), rng), beside)
    return Prompt(clean, corrupt, f" {answer}", f" {shown[-1]}", "mixed", shown[0], spans, corrupt_spans)


def _said(months: Sequence[str], numbers: Sequence[str]) -> tuple[str, dict[str, tuple[int, int]]]:
    text, spans = "", {}
    for place, number in enumerate(numbers, start=1):
        for label, word in (("N", number), ("S", months[place - 1] if place <= len(months) else "")):
            if word:
                text += " " if text else ""
                spans[f"{label}{place}"] = (len(text), len(text) + len(word))
                text += word
    return text, spans
