"""Draws prompts until every stratum has its quota, or a bounded number of draws is spent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TypeVar

from circuitkit.core.errors import PromptError
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.tasks.base import Accept

_log = logging.getLogger(__name__)

DRAWS_PER_PROMPT = 8
"""How many prompts are drawn at most for each that is asked for: enough if the model can do one in eight."""

Stratum = TypeVar("Stratum", bound=Hashable)


@dataclass
class _Tally:
    quota: int
    name: str = ""
    drawn: int = 0
    seen: set[str] = field(default_factory=set)
    kept: list[Prompt] = field(default_factory=list)

    def wanted(self) -> int:
        """How many to draw next, from the share that was kept so far."""
        share = max(len(self.kept) / self.drawn, 1 / DRAWS_PER_PROMPT) if self.drawn else 1.0
        missing = ceil((self.quota - len(self.kept)) / share)
        return min(missing, DRAWS_PER_PROMPT * self.quota - self.drawn)

    def draw(self, candidate: Callable[[int], Prompt]) -> list[Prompt]:
        """The next prompts, less those drawn before."""
        fresh = []
        for _ in range(self.wanted()):
            prompt = candidate(self.drawn)
            self.drawn += 1
            self.name = f"{prompt.group}/{prompt.stratum}"
            if prompt.clean not in self.seen:
                self.seen.add(prompt.clean)
                fresh.append(prompt)
        return fresh


def draw(
    quotas: Mapping[Stratum, int],
    candidate: Callable[[Stratum, int], Prompt],
    encode: Callable[[Sequence[Prompt]], PromptSet],
    accept: Accept | None = None,
) -> dict[Stratum, list[Prompt]]:
    """Distinct prompts for each stratum, as many as its quota if that many are found.

    Candidates are numbered within their stratum and kept in that order, so a smaller quota keeps the first of a larger one.

    Args:
        quotas: How many prompts each stratum should have.
        candidate: Makes candidate number k of a stratum: a pure function.
        encode: Tokenizes candidates for the filter.
        accept: The filter; None keeps all.

    Raises:
        PromptError: The filter refused every prompt.
    """
    tallies = {stratum: _Tally(quota) for stratum, quota in quotas.items()}
    distinct = passed = 0
    while any(tally.wanted() for tally in tallies.values()):
        fresh = [(tally, prompt) for stratum, tally in tallies.items() for prompt in tally.draw(partial(candidate, stratum))]
        prompts = [prompt for _, prompt in fresh]
        verdicts = accept(encode(prompts)).tolist() if accept and prompts else [True] * len(prompts)
        distinct, passed = distinct + len(verdicts), passed + sum(verdicts)
        for (tally, prompt), accepted in zip(fresh, verdicts, strict=True):
            if accepted and len(tally.kept) < tally.quota:
                tally.kept.append(prompt)
    _report(tallies.values(), distinct, passed)
    return {stratum: tally.kept for stratum, tally in tallies.items()}


def _report(tallies: Collection[_Tally], distinct: int, passed: int) -> None:
    """Says so if prompts are missing.

    Raises:
        PromptError: All are.
    """
    kept, quota, drawn = (sum(counts) for counts in zip(*((len(t.kept), t.quota, t.drawn) for t in tallies), strict=True))
    if not kept:
        raise PromptError(
            f"None of the {quota} prompts asked for is left: {drawn} were drawn, {distinct} of them distinct, and {passed} (0 %) passed "
            "the filter. The model cannot do this task; take another model or task, or turn the filter off (task.filter=false)."
        )
    if kept < quota:
        worst = min(tallies, key=lambda tally: len(tally.kept) / tally.quota)
        _log.warning(
            "Only %d of %d prompts asked for were found: %d were drawn, %d of them distinct, and %.0f %% of those passed the filter. "
            "Fewest: %s, with %d of %d.",
            kept, quota, drawn, distinct, 100 * passed / distinct, worst.name, len(worst.kept), worst.quota,
        )  # fmt: skip
