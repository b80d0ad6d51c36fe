"""Rank of the answer."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class AnswerRank(Metric):
    """How many tokens are more likely than the likeliest answer; 0 is on top. Final."""

    name = "answer_rank"
    unit = "tokens"
    higher_is_better = False
    floor = Floor.ABLATED
    reads_wrongs = False
    differentiable = False

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        return functional.answer_rank(logits, prompts.answers)
