"""Probability difference."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class ProbDiff(Metric):
    """Probability of the right next member minus probability of the last shown one. Final."""

    name = "prob_diff"
    unit = "probability"
    higher_is_better = True
    floor = Floor.ZERO

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: Logits | None = None) -> Values:
        return functional.prob_diff(logits, prompts.answers, prompts.wrongs)
