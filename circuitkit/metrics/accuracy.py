"""Top-1 accuracy."""

from __future__ import annotations

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class Accuracy(Metric):
    """Share of prompts whose most likely next token is one of the answers. Final."""

    name = "accuracy"
    unit = "share"
    higher_is_better = True
    floor = Floor.ZERO
    reads_wrongs = False
    differentiable = False

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        return functional.accuracy(logits, prompts.answers)
