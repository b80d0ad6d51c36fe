"""Sequences to be continued, in sentences: "Van done in 1. Hat done in 2. Ring done in 3. Desk done in 4. Sun done in" -> " 5".

The final tasks differ only in their members, which is why they share a file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, final

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.tasks import words
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.corruptions import CORRUPTIONS, Corruption
from circuitkit.tasks.drawing import draw
from circuitkit.tasks.encoding import Encoder, encode
from circuitkit.tasks.fitting import check_members, usable_fillers, usable_openers
from circuitkit.tasks.templates import TEMPLATES, Template

_TRIES = 200


@dataclass(frozen=True)
class SequenceTask(Task):
    """Consecutive members are shown and the next one is asked for; the wrong answer is the last one shown.

    Prompts are balanced over the first member. A subclass gives ``name`` and ``vocabulary``.

    Attributes:
        n: Prompts per template. Fewer, with a warning, if there are not that many different ones that pass the filter.
        seed: Of the draw.
        templates: Names of the sentences to use.
        filter: Whether prompts that the untouched model cannot do are drawn again.
        bos: None begins texts as the tokenizer does on its own, True with its BOS token, False with no special token.
        corruption: Name of the corruption, or a function like those in ``circuitkit.tasks.corruptions``.
        length: How many members are shown.
        top: How many members there are, from the first of the vocabulary.
    """

    n: int = 512
    seed: int = 0
    templates: Sequence[str] = ("names", "lost", "done")
    filter: bool = True
    bos: bool | None = None
    corruption: str | Corruption = "random"
    length: int = 4
    top: int = 12

    offered: ClassVar[Mapping[str, Template]] = TEMPLATES
    others: ClassVar[tuple[str, ...]] = words.MONTHS

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Everything that can be a member, in order. A subclass writes it as a class attribute."""

    def __post_init__(self) -> None:
        names = (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
        object.__setattr__(self, "templates", names)
        for name in names:
            if name not in self.offered:
                raise ConfigError(unknown_choice("template", name, self.offered))
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"task.templates must name at least one template, each once; found {list(names)}.")
        if not callable(self.corruption) and self.corruption not in tuple(CORRUPTIONS):
            raise ConfigError(unknown_choice("corruption", self.corruption, CORRUPTIONS))
        if self.length < 2:
            raise ConfigError(f"task.length must be 2 or more, because one member is no sequence; found {self.length}.")
        if not self.length < self.top <= len(self.vocabulary):
            raise ConfigError(
                f"task.top must be more than task.length={self.length}, because one more member is the answer, and at most "
                f"{len(self.vocabulary)}, the number of members of {self.name}; found {self.top}."
            )
        _check_n(self.n)

    @property
    def members(self) -> tuple[str, ...]:
        """The members in use, in order."""
        return self.vocabulary[: self.top]

    @property
    def n_starts(self) -> int:
        """How many members a prompt can begin with, so that neither the shown ones nor the answer wrap around."""
        return self.top - self.length

    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        n, seed = self.n if n is None else n, self.seed if seed is None else seed
        _check_n(n)
        encoder = Encoder(tokenizer, self.bos)
        templates = {name: self.offered[name] for name in self.templates}
        for template in templates.values():
            check_members(encoder, template, self.members, self.length)
        fillers = usable_fillers(encoder, templates, self.members[: self.length])
        openers = self._openers(encoder)

        def candidate(stratum: tuple[str, int], k: int) -> Prompt:
            # A source of its own for every candidate: what is drawn for one depends on no other, nor on n, nor on the filter.
            rng = Random(f"{seed}/{stratum}/{k}")
            return self._prompt(*stratum, fillers[stratum[0]], openers, rng)

        # Prompt i of a template begins with member i mod n_starts, so each start is a stratum with its own quota.
        quotas = {(name, start): len(range(start, n, self.n_starts)) for name in templates for start in range(min(n, self.n_starts))}
        kept = draw(quotas, candidate, lambda batch: encode(batch, encoder), accept if self.filter else None)
        ordered = []
        for name in templates:
            for i in range(n):
                k, start = divmod(i, self.n_starts)
                ordered += kept[name, start][k : k + 1]  # Nothing where the stratum fell short.
        return encode(ordered, encoder)

    def _prompt(self, name: str, start: int, pool: Sequence[str], openers: frozenset[str], rng: Random) -> Prompt:
        template = self.offered[name]
        *shown, answer = self.members[start : start + self.length + 1]
        fillers = rng.sample(pool, self.length + 1) if template.fillers else ()
        clean = template.fill(shown, fillers)
        corrupt = template.fill(self._corrupt(shown, openers if template.opens_with_member else None, rng), fillers)
        return Prompt(
            clean=clean.text,
            corrupt=corrupt.text,
            answer=clean.gap + answer,
            wrong=clean.gap + shown[-1],
            group=name,
            stratum=shown[0],
            spans=clean.spans,
            corrupt_spans=corrupt.spans,
        )

    def _corrupt(self, shown: Sequence[str], openers: frozenset[str] | None, rng: Random) -> tuple[str, ...]:
        """Corrupt members, the first of which can open a text if it has to."""
        corruption = CORRUPTIONS[self.corruption] if isinstance(self.corruption, str) else self.corruption
        for _ in range(_TRIES):
            members = tuple(corruption(shown, self.members, self.others, rng))
            if len(members) != len(shown):
                raise ConfigError(f"A corruption must return as many members as are shown, {len(shown)}; {corruption} returned {members}.")
            if openers is None or members[0] in openers:
                return members
        raise ConfigError(
            f"The corruption {self.corruption!r} must put a member first that has as many tokens there as {shown[0]!r}, but it puts "
            f"{members[0]!r}. Use another corruption (task.corruption: {', '.join(CORRUPTIONS)}) or a shorter range (task.top)."
        )

    def _openers(self, encoder: Encoder) -> frozenset[str]:
        """The members that a text can begin with; none if no template begins with a member."""
        if not any(self.offered[name].opens_with_member for name in self.templates):
            return frozenset()
        return usable_openers(encoder, tuple(dict.fromkeys((*self.members, *self.others))), self.members[: self.n_starts])


def _check_n(n: int) -> None:
    if n < 1:
        raise ConfigError(f"task.n, the number of prompts a template, must be 1 or more; found {n}.")


@final
class Numerals(SequenceTask):
    """1 to 12. Up to 100 with ``top``."""

    name = "numerals"
    vocabulary = words.NUMERALS


@final
class Numwords(SequenceTask):
    """one to twelve. Up to twenty with ``top``."""

    name = "numwords"
    vocabulary = words.NUMWORDS


@final
class Months(SequenceTask):
    """January to December."""

    name = "months"
    vocabulary = words.MONTHS
    others = words.NUMWORDS[:12]


@final
class EsNumwords(SequenceTask):
    """uno to doce. Up to veinte with ``top``."""

    name = "es_numwords"
    vocabulary = words.ES_NUMWORDS
    others = words.ES_MONTHS


@final
class EsMonths(SequenceTask):
    """enero to diciembre."""

    name = "es_months"
    vocabulary = words.ES_MONTHS
    others = words.ES_NUMWORDS[:12]


@final
@dataclass(frozen=True)
class Days(SequenceTask):
    """Monday to Sunday."""

    top: int = 7

    name = "days"
    vocabulary = words.DAYS


@final
@dataclass(frozen=True)
class Letters(SequenceTask):
    """A to Z."""

    top: int = 26

    name = "letters"
    vocabulary = words.LETTERS
