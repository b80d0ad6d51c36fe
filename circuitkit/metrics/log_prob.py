"""Log-probability of the answer."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class LogProb(Metric):
    """Log-probability of the answers together, nats. 100 % is the untouched model, 0 % everything ablated. Final."""

    name = "log_prob"
    unit = "nats"
    higher_is_better = True
    floor = Floor.ABLATED
    reads_wrongs = False

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        return functional.log_prob(logits, prompts.answers)
