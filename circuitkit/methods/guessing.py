"""Scoring several candidates of a greedy search at once, by guessing the decisions between them. Never changes a decision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.records import Step
from circuitkit.core.universe import Universe


@dataclass(frozen=True)
class Decision:
    """Whether a candidate, a node or an edge, stays, and the score without it."""

    candidate: Any
    score: float
    kept: bool


class Guesser:
    """Guesses that the next decisions will be like the last one, and looks as far ahead as that proves right. Final.

    Attributes:
        depth: How many candidates to score at once.
        removing: The guess: the next candidates will be removed.
    """

    def __init__(self, limit: int, *, removing: bool) -> None:
        self._limit = limit
        self.depth = min(2, limit)
        self.removing = removing

    def masks(self, universe: Universe, mask: Bool[Tensor, " unit"], candidates: Sequence[Any]) -> list[Bool[Tensor, " unit"]]:
        """For each candidate the mask without it, were the guess right about those before it."""
        if self.removing:
            return [universe.without(mask, candidates[: place + 1]) for place in range(len(candidates))]
        return [universe.without(mask, [candidate]) for candidate in candidates]

    def recall(self, candidates: Sequence[Any], history: Sequence[Step]) -> list[Decision]:
        """What scoring these candidates at once gave in an earlier process; nothing if that process did not get to its end.

        Scores then have the same neighbours in every process, and are the same to the last bit.
        """
        decisions: list[Decision] = []
        for candidate, step in zip(candidates, history, strict=False):
            decisions.append(Decision(candidate, step.score, step.kept))
            if step.kept == self.removing:
                break
        else:
            if len(decisions) < len(candidates):
                return []
        self.learn(decisions, len(candidates))
        return decisions

    def decide(self, candidates: Sequence[Any], scores: Iterable[float], threshold: float) -> list[Decision]:
        """Those decisions whose guesses about earlier ones came true, from the scores without the candidates, in %.

        Args:
            candidates: As they were scored.
            scores: Drawn one after the other, and none behind the first wrong guess.
            threshold: In %; a candidate goes if the score stays above it.
        """
        decisions: list[Decision] = []
        for candidate, score in zip(candidates, scores, strict=False):
            decisions.append(Decision(candidate, score, kept=not score > threshold))
            if decisions[-1].kept == self.removing:
                break
        self.learn(decisions, len(candidates))
        return decisions

    def learn(self, decisions: Sequence[Decision], asked: int) -> None:
        """Looks twice as far after a run of right guesses, half as far after a wrong one, and then guesses the other way."""
        right = sum(decision.kept != self.removing for decision in decisions)
        if right == asked:
            self.depth = min(2 * self.depth, self._limit)
        else:
            self.depth = max(1, min(self.depth // 2, self._limit))
            self.removing = not decisions[-1].kept
