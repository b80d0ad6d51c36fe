"""Logit difference."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class LogitDiff(Metric):
    """Logit of the right next member minus logit of the last shown one. The paper's metric. Final."""

    name = "logit_diff"
    unit = "logits"
    higher_is_better = True
    floor = Floor.ZERO

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: Logits | None = None) -> Values:
        return functional.logit_diff(logits, prompts.answers, prompts.wrongs)
