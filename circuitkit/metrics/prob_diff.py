"""Probability difference."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class ProbDiff(Metric):
    """Probability difference: weighted probability of all answers minus that of all wrong answers. Final.

    Source: "How does GPT-2 compute greater-than?" (arXiv 2305.00586), where the answers are all later years.
    """

    name = "prob_diff"
    unit = "probability"
    higher_is_better = True
    floor = Floor.ZERO

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        return functional.prob_diff(logits, prompts.answers, prompts.wrongs)
