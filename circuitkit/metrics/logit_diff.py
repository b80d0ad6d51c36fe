"""Logit difference."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class LogitDiff(Metric):
    """Logit difference: logit of the answer minus logit of the wrong answer, the last member shown. The paper's metric. Final.

    A set of several tokens counts as one token with the probability of all of them: the difference is the log of the weighted probability
    of the answers over that of the wrong answers.
    """

    name = "logit_diff"
    unit = "logits"
    higher_is_better = True
    floor = Floor.ZERO
    reads_others = False

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        return functional.logit_diff(logits, prompts.answers, prompts.wrongs)
