"""Divergence from the untouched model."""

from __future__ import annotations

from circuitkit.core.errors import MeasurementError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Logits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class KL(Metric):
    """KL(untouched || patched) of the next-token distributions, nats. 100 % is zero divergence, 0 % everything ablated. Final."""

    name = "kl"
    unit = "nats"
    higher_is_better = False
    floor = Floor.ABLATED
    reads_answers = False
    reads_wrongs = False

    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        if clean_logits is None:
            raise MeasurementError("KL compares with the untouched model: give its logits as clean_logits.")
        return functional.kl_divergence(logits, clean_logits)
